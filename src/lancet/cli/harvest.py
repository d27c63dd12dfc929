"""`lancet harvest`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.cli import show
from lancet.units import count

if TYPE_CHECKING:
    from lancet.cli.opening import Choice


def run(corpus: list[str], out: Path | None, tokens: str | None, choice: Choice, json: bool, **how: Any) -> None:
    limit = None if tokens is None else count(tokens)  # a typo is told before a model is opened
    from lancet.atlas.corpus import sources

    sources(corpus)
    lab = choice.open()
    from lancet.atlas.harvest import harvest

    with show.working("harvesting"):
        found = harvest(lab, corpus, out, limit, say=show.say, **how)
    told = {
        "atlases": [str(folder) for folder in found.folders],
        "corpus": found.corpus,
        "bad": found.bad.splitlines(),
        "seconds": round(found.seconds, 1),
    }
    if json:
        show.as_json(told)
        return
    counted = found.corpus
    for folder in found.folders:
        show.line(f"wrote {folder}")
    show.say(
        f"{counted['tokens']:,} tokens of {counted['documents']:,} documents in {found.seconds:,.0f} s; "
        f"{counted['repeats']:,} repeats and {counted['bad_lines']:,} bad lines left out"
    )
