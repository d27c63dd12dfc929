"""A client of the chat-completions interface that OpenAI, vLLM, llama.cpp, Ollama and others offer.

Text goes to the one server that the user named and to no other: redirects are not followed. A key comes out of an
environment variable; it is never written, and blotted out of whatever a server says.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lancet.errors import LancetError, UsageError

Message = Mapping[str, str]
TRIES = 6
LONGEST = 300.0  # seconds; a server that asks for a longer pause is asked another day
BYTES_A_TOKEN = 3.0  # for a first guess: English has about 4, Chinese about 3; what a server counts corrects it
OVERHEAD = 8  # tokens that a chat's template puts around each message


class ServerError(LancetError):
    """The server cannot be reached, refuses, or does not recover."""


class BudgetReached(Exception):  # noqa: N818 - nothing went wrong
    """The next request could exceed the budget."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and the tokens that it took."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Budget:
    """Tokens that may be used, prompts and answers together; None for no limit. Safe to use from several threads.

    Attributes:
        spent: what servers counted, or the estimate where they did not.
        requests: answers that came.
        estimated: how many of these had no count.
    """

    limit: int | None = None
    spent: int = 0
    requests: int = 0
    estimated: int = 0
    _held: int = 0
    _rate: float = 1 / BYTES_A_TOKEN
    _lock: threading.Condition = field(default_factory=threading.Condition)

    def hold(self, messages: Sequence[Message], most: int) -> tuple[int, int]:
        """Sets aside what a request may take: (its prompt's estimate, all that is held).

        Waits while other requests hold what this one would need, since most take less than they hold.

        Raises:
            BudgetReached: that is more than is left.
        """
        size = sum(len(message["content"].encode()) for message in messages)
        with self._lock:
            prompt = int(size * self._rate) + 1 + OVERHEAD * (len(messages) + 1)
            while self.limit is not None and self.spent + self._held + prompt + most > self.limit:
                if not self._held:
                    raise BudgetReached
                self._lock.wait()
            self._held += prompt + most
            return prompt, prompt + most

    def settle(self, held: int, used: int) -> None:
        """What a request took in the end; 0 for one that the server turned away."""
        with self._lock:
            self._held -= held
            self.spent += used
            self._lock.notify_all()

    def counted(self, messages: Sequence[Message], prompt: int | None) -> None:
        """Learns from a server's own count of a prompt (None where it gave none)."""
        size = sum(len(message["content"].encode()) for message in messages)
        with self._lock:
            self.requests += 1
            self.estimated += prompt is None
            if prompt is not None and size:
                self._rate = max(self._rate, prompt / size)


def address(endpoint: str) -> str:
    """Where requests go: an address, with /v1 where it has no path, and /chat/completions.

    Raises:
        UsageError: it is no http(s) address.
    """
    parts = urlsplit(endpoint.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--endpoint must be an address such as http://localhost:8000/v1, got {endpoint!r}")
    if parts.username or parts.password:
        raise UsageError("--endpoint must hold no password; put the key in a variable and name it with --api-key-env")
    path = parts.path.rstrip("/") or "/v1"
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def key_from(variable: str | None) -> str:
    """The key in an environment variable, "" where none was named.

    Raises:
        UsageError: it is not set, or holds what no header can.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UsageError(f"the environment variable {variable} is not set; put the server's key in it")
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"{variable} holds characters that no key has; put the server's key alone in it")
    return key


class Server:
    """One model at one server. Safe to use from several threads; close it in the end.

    Args:
        endpoint: as `address` takes it.
        model: the name that the server knows it under.
        key: sent as a bearer token, "" for none.
        timeout: seconds of silence after which a request is tried again.
        wait: seconds before the second try, twice as many before each further one.
        say: told about pauses.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        key: str = "",
        timeout: float = 120.0,
        budget: Budget | None = None,
        wait: float = 1.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        import httpx

        self.url, self.model, self.budget, self.wait, self.say = address(endpoint), model, budget or Budget(), wait, say
        self._key = key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, connect=min(timeout, 15.0)))
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._not_before = 0.0  # of time.monotonic: a 429 holds every thread back
        self._reached = False
        self._dropped: set[str] = set()  # parameters that this server refuses

    @property
    def host(self) -> str:
        """The server's name, for messages."""
        return urlsplit(self.url).netloc

    def stop(self) -> None:
        """No further request is begun, and pauses end."""
        self._stopped.set()

    def close(self) -> None:
        """Stops, and closes what is open."""
        self.stop()
        self._client.close()

    def ask(self, messages: Sequence[Message], most: int) -> Answer:
        """The model's answer.

        Args:
            messages: {"role", "content"} each.
            most: tokens that it may write.

        Raises:
            ServerError: the server cannot be reached, refuses the request, or still fails after six tries.
            BudgetReached: before anything is sent.
        """
        why = ""
        for attempt in range(TRIES):
            self._pause(attempt)
            prompt, held = self.budget.hold(messages, most)
            used = 0
            try:
                found, why, used = self._once(messages, most, prompt)
            finally:
                self.budget.settle(held, used)
            if found is not None:
                return found
        raise ServerError(f"{self.host} failed {TRIES} times, at last: {why}; try again later")

    def _once(self, messages: Sequence[Message], most: int, prompt: int) -> tuple[Answer | None, str, int]:
        """(answer or None, what went wrong, tokens used) of one request; what no further try can mend is raised."""
        import httpx

        try:
            response = self._client.post(self.url, json=self._body(messages, most))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if not self._reached:
                raise ServerError(f"no server answers at {self.url} ({error}); start it, or mend --endpoint") from error
            return None, f"no connection ({error})", 0
        except httpx.TransportError as error:  # it was sent, and may have been worked on and counted
            return None, f"{type(error).__name__} {error}".strip(), prompt
        except httpx.InvalidURL as error:
            raise UsageError(f"--endpoint {self.url} is no address ({error})") from error
        self._reached = True
        code = response.status_code
        if code == 429 or code >= 500 or code == 408:
            self._hold_back(response.headers.get("Retry-After"))
            return None, f"status {code} {self._said(response)}", 0
        if code == 400 and self._adapt(response.text):
            return None, "parameters", 0
        if code != 200:
            raise ServerError(f"{self.url} answers with status {code}: {self._said(response)}{_hint(code)}")
        try:
            told = response.json()
            content = told["choices"][0]["message"].get("content") or ""
            usage = dict(told.get("usage") or {})
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None, f"no chat completion but {self._said(response)!r}", prompt
        text = content if isinstance(content, str) else json.dumps(content)
        asked, wrote = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        self.budget.counted(messages, None if wrote is None else asked)
        if asked is None or wrote is None:
            asked, wrote = prompt, min(most, int(len(text.encode()) / BYTES_A_TOKEN) + 1)
        return Answer(text, asked, wrote), "", asked + wrote

    def _body(self, messages: Sequence[Message], most: int) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "stream": False}
        limit = "max_completion_tokens" if "max_tokens" in self._dropped else "max_tokens"
        return body | {name: value for name, value in ((limit, most), ("temperature", 0)) if name not in self._dropped}

    def _adapt(self, said: str) -> bool:
        """Whether a refusal names a parameter that can be left out or called otherwise."""
        named = {name for name in ("max_tokens", "temperature") if name in said} - self._dropped
        self._dropped |= named
        return bool(named)

    def _pause(self, attempt: int) -> None:
        """Waits for what the server asked for, and before a further try for a while that doubles."""
        own = self.wait * 2 ** (attempt - 1) * random.uniform(0.8, 1.2) if attempt else 0.0
        with self._lock:
            until = max(self._not_before, time.monotonic() + own)
        while (left := until - time.monotonic()) > 0 and not self._stopped.wait(left):
            pass
        if self._stopped.is_set():
            raise ServerError("stopped")

    def _hold_back(self, asked: str | None) -> None:
        seconds = _seconds(asked)
        if seconds is None:
            return
        if seconds > LONGEST:
            raise ServerError(f"{self.host} asks to wait {seconds:,.0f} seconds; run the same command again after that")
        with self._lock:
            new = time.monotonic() + seconds
            if new > self._not_before + 1:
                self.say(f"{self.host} asks to wait {seconds:.0f} seconds")
            self._not_before = max(self._not_before, new)

    def _said(self, response: Any) -> str:
        """The server's own words, on one line, without the key."""
        text = response.text
        try:
            told = response.json()
            error = told.get("error", told.get("detail", told.get("message", text)))
            text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        except (ValueError, AttributeError):
            pass
        text = " ".join(text.replace(self._key, "***").split() if self._key else text.split())
        return text[:200] or response.reason_phrase


def _seconds(asked: str | None) -> float | None:
    """Retry-After, in seconds or as a date (RFC 9110, 10.2.3)."""
    if not asked:
        return None
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _count(told: Any) -> int | None:
    return told if isinstance(told, int) and told >= 0 else None


def _hint(code: int) -> str:
    hints = {
        401: "name the variable that holds the key with --api-key-env",
        403: "the key may not use this model",
        404: "check --endpoint and --model",
        413: "the request is too long for this server",
    }
    return f"; {hints[code]}" if code in hints else "; redirects are not followed" if 300 <= code < 400 else ""
