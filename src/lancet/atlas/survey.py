"""Many features asked about at once, so that a kill costs only the questions that were on their way.

Every answer is appended to a file as it comes, under a digest of the model and the messages that it answers. A later
run reads it there and asks only what is not in it: nothing is asked twice. Names go into the store of explanations a
few at a time. One process asks about an SAE at a time.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any

from lancet.atlas import asking, explanations
from lancet.atlas.asking import Evidence, Named
from lancet.atlas.completions import Answer, BudgetReached, Message, Server
from lancet.atlas.explanations import Explanation
from lancet.errors import LancetError, UsageError

if TYPE_CHECKING:
    from lancet.atlas.atlas import Atlas

KEPT_EVERY = 15.0  # seconds; the store is written whole each time
AT_ONCE = 16  # features whose evidence is read together


class Answers:
    """The answers that were got about one SAE's features, in a file of JSON lines. Safe to use from several threads."""

    def __init__(self, file: Path, fresh: bool = False) -> None:
        self.file, self.reused, self.new = file, 0, 0
        self._held: dict[str, str] = {}
        self._lock = threading.Lock()
        self._out: IO[str] | None = None
        if file.is_file() and not fresh:
            for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    told = json.loads(line)
                    self._held[str(told["digest"])] = str(told["text"])
                except (ValueError, KeyError, TypeError):  # the line that a kill cut off
                    continue

    @staticmethod
    def digest(model: str, messages: Sequence[Message]) -> str:
        """What an answer is kept under."""
        told = json.dumps([model, [dict(message) for message in messages]], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def get(self, digest: str) -> str | None:
        """An answer that was got before."""
        found = self._held.get(digest)
        if found is not None:
            with self._lock:
                self.reused += 1
        return found

    def put(self, digest: str, answer: Answer) -> None:
        """Keeps an answer; it is in the file when this returns."""
        line = {"digest": digest, "text": answer.text, "tokens": [answer.prompt_tokens, answer.completion_tokens]}
        with self._lock:
            self.new += 1
            self._held[digest] = answer.text
            if self._out is None:
                self._out = self.file.open("a", encoding="utf-8")
                self._out.write("\n")  # ends what a kill cut off; empty lines are passed over
            self._out.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._out.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._out is not None:
            self._out.close()
            self._out = None


@contextmanager
def answers(key: str, fresh: bool = False) -> Iterator[Answers]:
    """The answers about an SAE, held by this process inside the block.

    Args:
        fresh: those of earlier runs are not read.

    Raises:
        LancetError: another process is asking about it.
        UsageError: the user's data folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    file = explanations.path(key).with_suffix(".answers.jsonl")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_suffix(".lock"), timeout=0.5)
        lock.acquire()
    except Timeout as error:
        raise LancetError("another `lancet names ask` is at work for this SAE; let it end first") from error
    except OSError as error:
        raise UsageError(
            f"cannot write {file}: {error.strerror}; set LANCET_DATA to a folder that you may write to"
        ) from error
    held = Answers(file, fresh)
    try:
        yield held
    finally:
        held.close()
        lock.release()


@dataclass
class Survey:
    """How a run of questions ended.

    Attributes:
        named: what came, by number; those without a name say why.
        silent: features that never fired, which were not asked about.
        left: how many were not come to.
        stopped: "" where all were asked about, else why not.
    """

    named: list[Named] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    left: int = 0
    stopped: str = ""


def survey(
    atlas: Atlas,
    features: Sequence[int],
    server: Server,
    held: Answers,
    most: int = 512,
    concurrency: int = 4,
    language: str = "English",
    given: Mapping[int, str] | None = None,
    seed: int = 0,
    came: Callable[[Named, int, int], None] = lambda named, done, of: None,
) -> Survey:
    """Asks for a name for each feature and scores it; keeps what came, whatever ends it.

    Args:
        features: in the order in which they are asked about.
        most: tokens that one answer may have.
        concurrency: questions that are on their way at once.
        given: feature -> a name that is to be scored; no others are then asked for, and nothing is kept here.
        seed: of the windows and their order.
        came: called with each result, how many have come, and of how many.

    Raises:
        ServerError: the server cannot be reached or refuses; what came before is kept.
    """
    out = Survey()
    fresh: list[Named] = []
    kept_at = time.monotonic()

    def ask(messages: Sequence[Message]) -> str:
        digest = held.digest(server.model, messages)
        found = held.get(digest)
        if found is None:
            answer = server.ask(messages, most)
            held.put(digest, answer)
            found = answer.text
        return found

    def keep() -> None:
        if given is None:
            explanations.keep(atlas.manifest.key, [_entry(named, server.model) for named in fresh if named.text])
        fresh.clear()

    trouble: BaseException | None = None
    source = _evidence(atlas, features, seed, out)
    pending: set[Future[Named]] = set()
    begin = _threads(concurrency)
    try:
        while True:
            while not (trouble or out.stopped) and len(pending) < 2 * concurrency:
                about = next(source, None)
                if about is None:
                    break
                name = "" if given is None else given[about.feature]
                pending.add(begin(partial(asking.named, about, ask, language, name)))
            if not pending:
                break
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                named, problem = _result(future)
                if isinstance(problem, BudgetReached):
                    out.stopped = "the budget"
                elif problem is not None:
                    trouble = trouble or problem
                    server.stop()
                if named is not None and (named.text or named.why):
                    fresh.append(named)
                    out.named.append(named)
                    came(named, len(out.named), len(features))
            if trouble or out.stopped:  # what has not been begun stays so; what is on its way is waited for
                pending = {future for future in pending if not future.cancel()}
            if time.monotonic() - kept_at > KEPT_EVERY:
                keep()
                kept_at = time.monotonic()
    finally:
        server.stop()
        for future in pending:  # after Ctrl-C; the threads end with the process
            future.cancel()
        keep()
    out.named.sort(key=lambda named: named.feature)
    out.left = len(features) - len(out.named) - len(out.silent)
    if trouble is not None:
        raise trouble
    return out


def _threads(count: int) -> Callable[[Callable[[], Named]], Future[Named]]:
    """A function that has work done by one of `count` threads.

    An executor's threads hold up the end of the process until their last request is answered or times out; after
    Ctrl-C nobody waits two minutes for that. These do not.
    """
    todo: SimpleQueue[tuple[Future[Named], Callable[[], Named]]] = SimpleQueue()

    def work() -> None:
        while True:
            future, what = todo.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(what())
                except BaseException as error:
                    future.set_exception(error)

    def begin(what: Callable[[], Named]) -> Future[Named]:
        future: Future[Named] = Future()
        todo.put((future, what))
        return future

    for number in range(count):
        threading.Thread(target=work, name=f"ask-{number}", daemon=True).start()
    return begin


def _evidence(atlas: Atlas, features: Sequence[int], seed: int, out: Survey) -> Iterator[Evidence]:
    """What is known of each feature, read a few at a time as they are needed."""
    for at in range(0, len(features), AT_ONCE):
        some = list(features[at : at + AT_ONCE])
        examples = atlas.examples_of(some)
        for record in atlas.records(some):
            if examples[record.feature]:
                yield asking.evidence(atlas, record, examples[record.feature], seed)
            else:
                out.silent.append(record.feature)


def _result(future: Future[Named]) -> tuple[Named | None, BaseException | None]:
    """(what is known, what stopped it)."""
    error = future.exception()
    if isinstance(error, asking.Half):
        return error.done, error.__cause__
    return (None, error) if error is not None else (future.result(), None)


def _entry(named: Named, model: str) -> Explanation:
    return Explanation(named.feature, named.text, f"ask: {model}", named.score, named.asked)


def to_json(named: Named) -> dict[str, Any]:
    """{"feature", "text", "score", "asked", "why"}."""
    return {"feature": named.feature, "text": named.text, "score": named.score, "asked": named.asked, "why": named.why}
