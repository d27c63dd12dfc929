"""`lancet chat`: a conversation with an edited mind, and the same question to the plain one beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lancet.cli import show
from lancet.errors import LancetError, UsageError

if TYPE_CHECKING:
    from lancet.cli.opening import Choice
    from lancet.edit import Edit
    from lancet.generate import Sampling
    from lancet.lab import Lab

HELP = """/edit EDIT; EDIT   replace the edits (/edit alone takes them off)
/plain             also ask the unedited model, or stop asking it
/again             the last answer once more, with other luck
/reset             forget the conversation
/quit              leave (so does the end of input, Ctrl-D)"""


@dataclass
class Talk:
    """A conversation as it stands.

    Attributes:
        messages: the turns so far, the edited model's answers among them.
        edits: what its answers are made under.
        plain: whether the unedited model is asked too; its answers are shown and not kept.
    """

    lab: Lab
    edits: list[Edit]
    plain: bool
    tokens: int
    sampling: Sampling
    messages: list[dict[str, str]] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, said: str, quiet: bool) -> None:
        """One turn: the answer is written as it is made and becomes part of the conversation."""
        asked = [*self.messages, {"role": "user", "content": said}]
        ready = self.lab.tokenize(asked)
        self.lab.steps(self.edits, ready, len(ready) + self.tokens)  # an edit that cannot be made is told before a word
        plain = self.answer("plain", asked, [], quiet) if self.plain and self.edits else None
        reply = self.answer("edited" if self.edits else "plain", asked, self.edits, quiet)
        turn = {"user": said, "assistant": reply, "edits": [str(edit) for edit in self.edits]}
        self.told.append(turn | ({"plain": plain} if plain is not None else {}))
        # A template has no place for an empty turn: such an answer is shown and not kept.
        self.messages = [*asked, {"role": "assistant", "content": reply}] if reply.strip() else self.messages

    def answer(self, name: str, asked: list[dict[str, str]], edits: list[Edit], quiet: bool) -> str:
        """The text of one answer; Ctrl-C ends it with what was written so far."""
        pieces: list[str] = []
        if not quiet:
            show.begin(f"{name}: ", "green" if edits else "white")
        try:
            for piece in self.lab.stream(asked, edits, self.tokens, self.sampling):
                pieces.append(piece)
                if not quiet:
                    show.piece(piece)
        except KeyboardInterrupt:
            pass
        if not quiet:
            show.line("")
        return "".join(pieces)

    def command(self, line: str) -> bool:
        """Obeys a line that begins with a slash; False ends the conversation."""
        from lancet.edit import Edit

        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/edit":
            self.edits = [Edit.parse(part) for part in rest.split(";") if part.strip()]
            show.say(f"edits: {'; '.join(map(str, self.edits)) or 'none'}")
        elif word == "/plain":
            self.plain = not self.plain
            show.say("the unedited model answers too" if self.plain else "the edited model answers alone")
        elif word == "/reset":
            self.messages = []
            show.say("the conversation begins anew")
        elif word == "/again":
            if not self.told:
                raise UsageError("nothing was asked yet")
            kept = self.messages[-1:] and self.messages[-1]["role"] == "assistant"
            self.messages = self.messages[:-2] if kept else self.messages
            self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
            self.ask(self.told[-1]["user"], quiet=False)
        else:
            show.say(HELP)
        return True


def lines() -> Iterator[str]:
    """What the user types, or the lines of a pipe, until there are no more."""
    asks = sys.stdin.isatty()
    if asks:
        with suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history in `input`, where the system has them
    while True:
        try:
            line = input("you: " if asks else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def run(
    edits: list[str], system: str | None, tokens: int, plain: bool, sampling: Sampling, choice: Choice, json: bool
) -> None:
    from lancet.edit import Edit

    parsed = [Edit.parse(edit) for edit in edits]
    lab = choice.open()
    talk = Talk(lab, parsed, plain, tokens, sampling)
    if system is not None:
        talk.messages = [{"role": "system", "content": system}]
    lab.tokenize([*talk.messages, {"role": "user", "content": "hello"}])  # refuses a model that has no template
    start = list(talk.messages)
    if not json:
        show.say("; ".join([*lab.model.notes, "/help lists the commands"]))
    for line in lines():
        try:
            if line.startswith("/"):
                if not talk.command(line):
                    break
                talk.messages = talk.messages or list(start)
            else:
                talk.ask(line, quiet=json)
        except LancetError as error:  # the conversation survives a mistake
            show.say(str(error))
    if json:
        show.as_json(talk.told)
