"""How work that takes long says so: a line of text, and how far it is where that can be shown.

`say` is any function of a line. One that has an attribute `step` is also called with (text, done, of) while something
is counted, and one that has `progress` with (file, bytes so far, bytes in all) while something is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Say = Callable[[str], None]


@contextmanager
def counted(say: Say, text: str, of: int) -> Iterator[Callable[[int], None]]:
    """A function that tells how many of so many are done; what was shown goes away with the block."""
    step: Callable[[str, int, int], None] = getattr(say, "step", lambda text, done, of: None)
    step(text, 0, of)
    try:
        yield lambda done: step(text, done, of)
    finally:
        step(text, of, of)


def minutes(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
