"""`lancet cache`: what is kept on disk, and deleting of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lancet.cli import show

if TYPE_CHECKING:
    from lancet.keeping import Kept


def run(json: bool) -> None:
    from lancet import keeping
    from lancet.files import cache_dir

    found = keeping.everything()
    if json:
        show.as_json([item.to_json() for item in found])
        return
    table(found)
    show.say(
        f"Lancet's cache is {cache_dir()}; `lancet cache prune NAME` deletes, --all everything that can be made again"
    )


def prune(names: Sequence[str], everything: bool, yes: bool, json: bool) -> None:
    """Shows what was named, then deletes it."""
    from lancet import keeping
    from lancet.errors import UsageError

    if bool(names) == everything:
        raise UsageError("name what to delete (`lancet cache` lists it), or --all for all of Lancet's own cache")
    chosen = keeping.chosen(names) if names else [item for item in keeping.everything() if item.own]
    if not json:
        table(chosen)
    if chosen and not yes and not _agreed(sum(item.bytes for item in chosen)):
        show.say("nothing was deleted")
        return
    for item in chosen:
        keeping.delete(item)
    if json:
        show.as_json([item.to_json() for item in chosen])
    else:
        show.line(f"deleted {sum(item.bytes for item in chosen) / 1e6:,.1f} MB")


def table(items: Sequence[Kept]) -> None:
    """A row for each thing, the largest first."""
    rows = [[item.name, item.what, f"{item.bytes / 1e6:,.1f}"] for item in items]
    show.table(["name", "what", "MB"], rows, right=["MB"])


def _agreed(size: int) -> bool:
    """Whether the user says yes; without a terminal to ask in, --yes says it."""
    from lancet.errors import UsageError

    if not sys.stdin.isatty():
        raise UsageError("this deletes; say --yes where there is no terminal to ask in")
    print(f"Delete these {size / 1e6:,.1f} MB? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
