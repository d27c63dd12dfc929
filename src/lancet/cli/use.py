"""`lancet use`: the pair that is opened where none is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lancet.cli import show


def run(name: str | None, saes: Sequence[str], json: bool) -> None:
    from lancet import settings
    from lancet.errors import UsageError

    if name is None and saes:
        raise UsageError("name the model as well: lancet use MODEL --sae SAE")
    if name is not None:
        check(name, saes)
        pair = settings.use(name, saes)
    else:
        pair = settings.default()
    if json:
        show.as_json({"model": pair.model, "saes": list(pair.saes), "file": str(settings.file())})
    else:
        show.line(f"{pair.model} with {', '.join(pair.saes) or 'its default SAE'}")


def check(name: str, saes: Sequence[str]) -> None:
    """Refuses a name that nothing has, before it is kept and every command fails on it."""
    from lancet import addressed, catalogue, names
    from lancet.loading import NAMES

    if not (Path(name).is_dir() or name in NAMES):
        names.check(name, tuple(NAMES))
    for sae in saes:
        if addressed.is_address(sae):
            addressed.Address.parse(sae)
        elif not Path(sae).is_dir() and catalogue.load().release_of(sae):
            catalogue.load().entry(sae)
