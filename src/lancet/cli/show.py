"""How results look: tables and colours in a terminal, tab-separated text in a pipe, JSON when asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """Standard output. Colours follow the terminal and NO_COLOR."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


@cache
def notes() -> Console:
    """Standard error: progress and remarks, so that a pipe carries results alone."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, style="dim", soft_wrap=not sys.stderr.isatty())


_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class _Say:
    """`say(line)` is a remark on standard error; `say.progress` and `say.step` show in the line of `working` how far a
    download or some counted work is."""

    def __init__(self) -> None:
        self.status: Any = None  # the spinner of `working`, in a terminal
        self.own: Any = None  # that of `step`, where there is no other
        self.text = ""

    def __call__(self, line: str) -> None:
        notes().print(harmless(line), markup=False)

    def progress(self, file: str, done: int, of: int | None) -> None:
        """So many bytes of a file have come."""
        if self.status is None:
            return
        if of is not None and done >= of:
            self.status.update(self.text)
        elif of is None or of > 1_000_000:
            told = f"{done / 1e6:,.1f} MB" if of is None else f"{done / 1e6:,.1f} of {of / 1e6:,.1f} MB"
            drawn = "" if not of else f" {bar(done, of)}"
            self.status.update(f"{file}{drawn} {told}".replace("[", "("))

    def step(self, text: str, done: int, of: int) -> None:
        """So many of so many are done; work outside of `working` gets a line of its own."""
        if not sys.stderr.isatty():
            return
        if self.status is None and done < of:
            self.own = self.status = notes().status(text, spinner=_spinner())
            self.own.start()
        if self.status is not None:
            self.status.update(f"{text} {bar(done, of)} {done:,} of {of:,}" if done < of else self.text)
        if self.own is not None and done >= of:
            self.own.stop()
            self.own = self.status = None


say = _Say()


def as_json(value: Any) -> None:
    """JSON on standard output; characters outside ASCII as they are, or escaped where the console lacks them."""
    encoding = sys.stdout.encoding or "ascii"
    text = json.dumps(value, ensure_ascii=False, indent=1)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, indent=1)
    print(text)


def can_show(characters: str) -> bool:
    """Whether the console's encoding has these characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[str] = (), title: str = "") -> None:
    """A table in a terminal, tab-separated lines with a header in a pipe. Columns named in `right` are numbers."""
    if not sys.stdout.isatty():
        print("\t".join(columns))
        for row in rows:
            print("\t".join(str(cell).replace("\t", " ").replace("\n", "\\n") for cell in row))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, box=box.SIMPLE_HEAD if can_show("─") else box.ASCII, title_justify="left")
    for i, column in enumerate(columns):
        first = i == 0  # what a row is about: cut over two lines rather than cut short
        drawn.add_column(
            column,
            justify="right" if column in right else "left",
            style="bold" if first else None,
            overflow="fold" if first else "ellipsis",
        )
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else Text(harmless(str(cell))) for cell in row))
    console().print(drawn)


def heading(text: str) -> None:
    """A heading between the parts of a longer output."""
    if sys.stdout.isatty():
        console().print()
        console().print(harmless(text), style="bold cyan", markup=False)
    else:
        print(f"\n{text}")


def line(text: str, style: str | None = None) -> None:
    """A line of text, never read as markup."""
    if sys.stdout.isatty():
        console().print(harmless(text), style=style, markup=False)
    else:
        print(text)


def begin(text: str, style: str) -> None:
    """The beginning of a line that `piece` goes on with."""
    if sys.stdout.isatty():
        console().print(text, style=style, markup=False, end="")
    else:
        print(text, end="")


def piece(text: str) -> None:
    """Text as it is made: written at once, no line break after it."""
    sys.stdout.write(harmless(text))
    sys.stdout.flush()


def harmless(text: str) -> str:
    """Text without control characters: models and files may hold them, and a terminal would obey."""
    return text.translate(_CONTROL)


def bar(value: float, most: float, width: int = 20) -> str:
    """A bar of characters that the console has."""
    full, empty = ("█", "·") if can_show("█·") else ("#", ".")
    filled = round(width * max(0.0, min(1.0, value / most))) if most > 0 else 0
    return full * filled + empty * (width - filled)


def visible(token: str) -> str:
    """A token's characters with line breaks and a leading space made visible."""
    return token.replace("\n", "\\n").replace("\t", "\\t") if token.strip() or not token else repr(token)


def _spinner() -> str:
    return "dots" if can_show("⠋") else "line"


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner on standard error while something runs, in a terminal only."""
    if sys.stderr.isatty():
        with notes().status(text, spinner=_spinner()) as say.status:
            say.text = text
            try:
                yield
            finally:
                say.status = None
    else:
        yield


@contextmanager
def paused() -> Iterator[None]:
    """No spinner inside the block, so that something can be asked."""
    status = say.status
    if status is None:
        yield
        return
    status.stop()
    try:
        yield
    finally:
        status.start()
