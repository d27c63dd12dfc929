"""`lancet encode`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.cli import show
from lancet.errors import UsageError
from lancet.units import count

if TYPE_CHECKING:
    from lancet.cli.opening import Choice


def run(corpus: list[str], out: Path, tokens: str | None, choice: Choice, json: bool, **how: Any) -> None:
    limit = None if tokens is None else count(tokens)  # mistakes are told before a model is opened
    from lancet.atlas.corpus import sources
    from lancet.atlas.rows import check_pool

    check_pool(how["pool"])
    sources(corpus)
    if len(choice.saes) > 1:
        raise UsageError(f"encode writes the features of one SAE, got {len(choice.saes)}; give one --sae")
    lab = choice.open()
    from lancet.atlas.encode import encode

    with show.working("encoding"):
        found = encode(lab, corpus, out, tokens=limit, say=show.say, **how)
    if json:
        told = {
            "file": str(found.file),
            "rows": found.rows,
            "documents": found.documents,
            "tokens": found.tokens,
            "pool": how["pool"],
            "sae": lab.sae().name,
            "site": str(lab.sae().site),
            "bad": found.bad.splitlines(),
            "seconds": round(found.seconds, 1),
        }
        show.as_json(told)
        return
    show.line(f"wrote {found.file}")
    show.say(
        f"{found.rows:,} rows: {found.tokens:,} tokens of {found.documents:,} documents in {found.seconds:,.0f} s; "
        f"{found.bad_lines:,} bad lines left out"
    )
