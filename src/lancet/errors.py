"""Every error that Lancet raises on purpose.

    LancetError
    ├── UsageError        the request cannot be meant: bad text, amount, name, site, expression
    │   └── UnknownName   a name that nothing has; carries the nearest ones
    ├── MissingError      something must be fetched or installed first; says with which command
    ├── DamagedError      a file is truncated, corrupt, of the wrong hash or of a refused kind
    ├── DivergedError     a training whose loss is no number any more; names its last good checkpoint
    └── MismatchError     two things that do not belong together: an SAE of another model or width

A message is one line: what is wrong, what was got, what is allowed, what to do next. The command line prints it as it
is and leaves with 2 for a UsageError and 1 for the rest.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LancetError(Exception):
    """Root of all errors raised on purpose. Its text is a single line meant for a person."""


class UsageError(LancetError):
    """The request itself is wrong; trying again unchanged cannot help."""


class UnknownName(UsageError):  # noqa: N818 - what happened, not what kind of thing it is
    """A name that nothing answers to.

    Args:
        kind: what was named, in words ("feature name", "site", "model").
        name: the name that was given.
        known: all names that would have been accepted; the nearest are quoted.
        do: the next step, a command where there is one.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], do: str = "") -> None:
        known = sorted(set(known))
        lower = {k.lower(): k for k in known}
        near = [lower[k] for k in difflib.get_close_matches(name.lower(), list(lower), n=5, cutoff=0.4)]
        if near:
            hint = "nearest: " + ", ".join(near)
        elif known:
            hint = "known: " + ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        else:
            hint = "none are known"
        super().__init__(f"unknown {kind} {name!r}; {hint}" + (f"; {do}" if do else ""))
        self.nearest = near


class MissingError(LancetError):
    """Something that is needed is not here; the message names the command that brings it."""


class DamagedError(LancetError):
    """A file that cannot be trusted: truncated, corrupt, of another hash, or a pickle."""


class MismatchError(LancetError):
    """Two parts that do not fit each other."""


class DivergedError(LancetError):
    """A loss or a weight of what is trained is no longer a finite number."""
