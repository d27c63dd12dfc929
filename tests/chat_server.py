"""A small chat-completions server on the loopback that really answers: it names a feature by the words in double
brackets, tells pieces that have the name's words from others, counts tokens, and fails as a test orders."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Chat:
    """The server, as a test sees it.

    Attributes:
        faults: what the next requests meet, one each: a status (with "Retry-After" as `(429, "1")`), "drop" (the
            connection is closed), "silence" (for a second), "html" (status 200, no JSON), "nonsense" (an answer
            without JSON), "short" (a verdict is missing).
        delay: seconds that each answer takes.
        usage: whether answers say how many tokens they took.
        refused: parameters that are answered with status 400.
        asked: every request's body; `keys`: its Authorization header; `at`: when it came.
        answered: how often each list of messages was answered.
    """

    faults: list[Any] = field(default_factory=list)
    delay: float = 0.0
    usage: bool = True
    thinking: bool = False
    refused: set[str] = field(default_factory=set)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    together: int = 0
    most_together: int = 0
    tokens: int = 0
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def names_asked(self) -> int:
        return sum("Name it in" in body["messages"][1]["content"] for body in self.asked)


def reply(messages: list[dict[str, str]]) -> str:
    """What the model says."""
    first = messages[1]["content"]
    if first.startswith("Description:"):
        name = first.split("\n", 1)[0].removeprefix("Description: ")
        words = [word for word in name.lower().split() if word]
        pieces = re.findall(r"(?m)^(\d+)\. (.*)$", first)
        return json.dumps({number: any(word in text.lower() for word in words) for number, text in pieces})
    peaks = Counter(peak.strip().lower() for peak in re.findall(r"\[\[\*(.*?)\*\]\]", first))
    return "Here it is:\n```json\n" + json.dumps({"name": " ".join(word for word, _ in peaks.most_common(3))}) + "\n```"


@contextmanager
def serving(**settings: Any) -> Iterator[Chat]:
    """The server, up inside the block."""
    chat = Chat(**settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with chat.lock:
                chat.asked.append(body)
                chat.keys.append(self.headers.get("Authorization"))
                chat.at.append(time.monotonic())
                chat.together += 1
                chat.most_together = max(chat.most_together, chat.together)
                fault = chat.faults.pop(0) if chat.faults else None
            try:
                time.sleep(chat.delay)
                self.answer(body, fault)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with chat.lock:
                    chat.together -= 1

        def answer(self, body: dict[str, Any], fault: Any) -> None:
            if self.path != "/v1/chat/completions":
                return self.send(404, {"error": {"message": f"no {self.path}"}})
            if bad := chat.refused & set(body):
                return self.send(400, {"error": {"message": f"Unsupported parameter: {sorted(bad)[0]}"}})
            if fault == "drop":
                self.close_connection = True
                return None
            if fault == "silence":
                time.sleep(1.0)
            if fault == "html":
                return self.send(200, None, raw=b"<html>busy</html>")
            if isinstance(fault, int):
                return self.send(fault, {"error": {"message": f"told {self.headers.get('Authorization')}"}})
            if isinstance(fault, tuple):
                return self.send(fault[0], {"error": {"message": "slow down"}}, {"Retry-After": fault[1]})
            text = reply(body["messages"])
            if fault == "nonsense":
                text = "I would rather talk about the weather."
            if fault == "short":
                text = json.dumps({"1": True})
            if chat.thinking:
                text = f'<think>perhaps {{"name": "wrong"}}?</think>{text}'
            prompt = sum(len(message["content"].encode()) for message in body["messages"]) // 3
            wrote = len(text) // 3
            told: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}}]}
            if chat.usage:
                told["usage"] = {"prompt_tokens": prompt, "completion_tokens": wrote}
            with chat.lock:
                chat.tokens += prompt + wrote
                chat.answered[json.dumps(body["messages"])] += 1
            return self.send(200, told)

        def send(self, code: int, told: Any, headers: dict[str, str] | None = None, raw: bytes = b"") -> None:
            data = raw or json.dumps(told).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    chat.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
