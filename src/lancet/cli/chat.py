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
/again             the last question once more, with other luck
/reset             forget the conversation
/help              this list
/quit              leave (so does the end of input, Ctrl-D); Ctrl-C ends an answer
//...              say something that begins with a slash"""

Messages = list[dict[str, str]]


@dataclass
class Talk:
    """A conversation as it stands.

    Attributes:
        beginning: what every conversation begins with: a system turn, or nothing.
        edits: what the answers are made under.
        plain: whether the unedited model is asked too; its answers are shown and not kept.
        tokens: the most that an answer has.
        quiet: answers are kept in `told` alone.
        messages: the turns so far, the edited model's answers among them.
        asked: the last question and the turns before it, None where nothing was asked.
        told: what `--json` prints.
    """

    lab: Lab
    beginning: Messages
    edits: list[Edit]
    plain: bool
    tokens: int
    sampling: Sampling
    quiet: bool
    messages: Messages = field(init=False)
    asked: tuple[Messages, str] | None = None
    told: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()
        self.ready([*self.messages, user("hello")])  # refuses a model without a template, and edits that do not apply

    def reset(self) -> None:
        """Forgets all but the system turn."""
        self.messages, self.asked = list(self.beginning), None

    def ready(self, asked: Messages) -> int:
        """How many tokens an answer to these turns may have.

        Raises:
            UsageError, UnknownName: there is no room for one, or an edit cannot be made.
        """
        try:
            prompt = self.lab.tokenize(asked)
        except UsageError as error:
            if len(asked) == len(self.beginning) + 1:
                raise
            raise UsageError(f"{error}; /reset forgets the turns before") from error
        room = min(self.tokens, self.lab.model.context - len(prompt))
        if room < 1:
            raise UsageError(
                f"the conversation has {len(prompt)} tokens, all that {self.lab.model.name} takes; /reset begins anew"
            )
        self.lab.changes(self.edits, prompt, len(prompt) + room)
        return room

    def ask(self, said: str) -> None:
        """One turn: the answer is written as it is made and becomes part of the conversation."""
        self.asked = (list(self.messages), said)
        asked = [*self.messages, user(said)]
        room = self.ready(asked)  # an edit that cannot be made is told before a word is written
        edits = [str(edit) for edit in self.lab.settled(self.edits)]
        turn: dict[str, Any] = {"user": said, "edits": edits, "seed": self.sampling.seed}
        if self.plain and self.edits:
            turn["plain"] = self.answer("plain", asked, [], room)
        turn["assistant"] = reply = self.answer("edited" if self.edits else "plain", asked, self.edits, room)
        self.told.append(turn)
        # A template has no place for an empty turn: such an answer is shown and not kept.
        if reply.strip():
            self.messages = [*asked, {"role": "assistant", "content": reply}]

    def answer(self, name: str, asked: Messages, edits: list[Edit], room: int) -> str:
        """The text of one answer; in a terminal Ctrl-C ends it with what was written so far."""
        pieces: list[str] = []
        if not self.quiet:
            show.begin(f"{name}: ", "green" if edits else "white")
        try:
            for piece in self.lab.stream(asked, edits, room, self.sampling):
                pieces.append(piece)
                if not self.quiet:
                    show.piece(piece)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        finally:
            if not self.quiet:
                show.line("")
        return "".join(pieces)

    def again(self) -> None:
        """The last question once more, in place of the answer that it got."""
        if self.asked is None:
            raise UsageError("nothing was asked yet; say something first")
        now, (self.messages, said) = self.messages, self.asked
        luck, self.sampling = self.sampling, replace(self.sampling, seed=self.sampling.seed + 1)
        try:
            self.ask(said)
        except LancetError:
            self.messages, self.sampling = now, luck
            raise

    def edit(self, text: str) -> None:
        """Takes edits, with `;` between several, in place of those before, which stay where one is wrong."""
        from lancet.edit import Edit

        before, self.edits = self.edits, [Edit.parse(part.strip()) for part in text.split(";") if part.strip()]
        try:
            self.ready([*self.beginning, user("hello")])
        except LancetError:
            self.edits = before
            raise

    def command(self, line: str) -> bool:
        """Obeys a line that begins with a slash; False ends the conversation."""
        word, _, rest = line.partition(" ")
        match word:
            case "/quit":
                return False
            case "/edit":
                self.edit(rest)
                show.say(f"edits: {'; '.join(map(str, self.edits)) or 'none'}")
            case "/plain":
                self.plain = not self.plain
                show.say("the unedited model answers too" if self.plain else "the edited model answers alone")
            case "/reset":
                self.reset()
                show.say("the conversation begins anew")
            case "/again":
                self.again()
            case "/help":
                show.say(HELP)
            case _:
                raise UsageError(f"no command {word}; /help lists them, and //... says what begins with a slash")
        return True

    def hear(self, line: str) -> bool:
        """Obeys or answers one line; False ends the conversation."""
        if line.startswith("/") and not line.startswith("//"):
            return self.command(line)
        self.ask(line[1:] if line.startswith("//") else line)
        return True


def user(said: str) -> dict[str, str]:
    """A user's turn."""
    return {"role": "user", "content": said}


def lines() -> Iterator[str]:
    """What the user types, until there is no more: in a terminal after a prompt, where Ctrl-C takes a line back."""
    if not sys.stdin.isatty():
        yield from _piped()
        return
    prompt = "you: "
    if sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history in `input`, where the system has them
    while True:
        try:
            if sys.stdout.isatty():
                line = input(prompt)
            else:  # what is redirected holds answers alone
                print(prompt, end="", file=sys.stderr, flush=True)
                line = input()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            show.say("Ctrl-D leaves")
            continue
        except UnicodeDecodeError:
            show.say("that was not text in this terminal's encoding; say it again")
            continue
        if line.strip():
            yield line.strip()


def _piped() -> Iterator[str]:
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            line = raw.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UsageError(f"line {number} of standard input is not text in UTF-8; convert it first") from error
        if line:
            yield line


def run(
    edits: list[str], system: str | None, tokens: int, plain: bool, sampling: Sampling, choice: Choice, json: bool
) -> None:
    from lancet.edit import Edit

    parsed = [Edit.parse(edit) for edit in edits]
    if tokens < 1:
        raise UsageError(f"the number of new tokens must be at least 1, got {tokens}")
    lab = choice.open()
    beginning = [] if system is None else [{"role": "system", "content": system}]
    talk = Talk(lab, beginning, parsed, plain, tokens, sampling, json)
    if not json:
        show.say("; ".join([*lab.model.notes, "/help lists the commands"]))
    failed = False
    for line in lines():
        try:
            if not talk.hear(line):
                break
        except LancetError as error:  # the conversation survives a mistake
            failed = True
            talk.told += [{"user": line, "error": str(error)}] if json else []
            show.say(str(error))
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            show.say("interrupted")
    if json:
        show.as_json(talk.told)
    if failed and not sys.stdin.isatty():  # whoever wrote the lines is not there to see it
        sys.exit(1)
