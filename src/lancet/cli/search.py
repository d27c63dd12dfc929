"""`lancet search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lancet.cli import show
from lancet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lancet.atlas.search import Hit
    from lancet.cli.opening import Choice


def run(words: str | None, like: list[str], top: int, folder: Path | None, choice: Choice, json: bool) -> None:
    if like:
        from lancet.cli.find import run as find

        if words is not None or folder is not None:
            raise UsageError("--like measures sentences in the model; leave words and --atlas out")
        find(None, like, [], (None, None), None, top, 4, 10, True, choice, json)
        return
    if words is None:
        raise UsageError("nothing to search for; give words, such as `lancet search bridge`, or --like SENTENCE")
    from lancet.atlas import terms
    from lancet.atlas.search import search
    from lancet.cli.card import opened

    atlas = opened(choice, folder)
    with show.working("searching"):
        hits = search(atlas, words, top, show.say)
    if json:
        show.as_json([hit.to_json() for hit in hits])
        return
    if not hits:
        show.say(f"nothing in {atlas.manifest.sae} has to do with {words!r}; `lancet find` measures words in the model")
        return
    several = len(words.split()) > 1
    rows = [
        [
            f"#{hit.feature} {hit.name}".rstrip(),
            _does(hit) if several else hit.does,
            _tokens(hit.record.fires_tokens),
            _tokens(terms.whole(hit.record.effect_up or hit.record.logit_up)),
            f"{hit.record.density:.3%}",
            *([hit.description] if any(h.description for h in hits) else []),
        ]
        for hit in hits
    ]
    head = ["feature", "does", "fires on", "says", "density", *(["described as"] if len(rows[0]) > 5 else [])]
    show.table(head, rows, right=["density"], title=f"{words}: {atlas.manifest.where}")


def _does(hit: Hit) -> str:
    """What it does, and with which of several words."""
    told = [f"{what}: {', '.join(found)}" for what, found in (("fires", hit.fires), ("says", hit.says)) if found]
    return "; ".join(told) or hit.does


def _tokens(tokens: Iterable[str]) -> str:
    """The first few different words of a list of tokens."""
    words = {token.strip().casefold(): token.strip() for token in reversed(list(tokens)) if token.strip()}
    return ", ".join(show.visible(word) for word in list(reversed(words.values()))[:4])
