"""Which atlas is meant: the folder that was named, else the one of the SAE that would be opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lancet import names
from lancet.atlas import place
from lancet.atlas.atlas import Atlas
from lancet.atlas.manifest import FACTS, NAME
from lancet.errors import MissingError, UnknownName, UsageError
from lancet.files import read_json

if TYPE_CHECKING:
    from lancet.model import Model
    from lancet.sae import Sae

INSIDE = "atlas"  # the folder of the atlas that comes with an SAE, inside the SAE's own


def find(model: str, saes: Sequence[str] = (), folder: Path | None = None) -> Atlas:
    """Opens the atlas in `folder`, else the one that ships with an SAE, else the one that was harvested for it.

    The model is not opened, and an SAE only where its name alone does not tell whose a harvested atlas is: two folders
    may have one name.

    Args:
        model: the model's name; saes: its SAEs' names as `--sae` takes them, none for the model's default.

    Raises:
        MissingError: there is no atlas; says where it was looked for. DamagedError: it cannot be read.
    """
    if folder is not None:
        return Atlas.open(folder)
    looked = places(model, saes)
    for where, own in looked.items():
        if (where / NAME).is_file() and _fits(found := Atlas.open(where), own):
            return found
    what = ", ".join(saes) or f"the SAE of {model}"
    raise MissingError(
        f"there is no atlas of {what} (looked in {', '.join(map(str, looked)) or 'no place'}); make one with `lancet "
        f"harvest`, or name its folder with --atlas"
    )


def of(sae: Sae, shipped: Path | None = None) -> Atlas | None:
    """The atlas of an open SAE, None where there is none; one of other weights under the same name is none of it.

    Args:
        shipped: a file of the folder that the SAE came in.

    Raises:
        DamagedError: it cannot be read.
    """
    inside = [] if shipped is None else [shipped.parent / INSIDE]
    for where in [*inside, place.default(sae.name)]:
        if (where / NAME).is_file() and (found := Atlas.open(where)).belongs(sae):
            return found
    return None


def facts(model: Model, sae: Sae, shipped: Path | None = None) -> Path | None:
    """The file of facts in the atlas of a pair, None where there is none of this SAE on this very model.

    Args:
        shipped: as in `of`.

    Raises:
        DamagedError: the atlas cannot be read.
    """
    from lancet import fingerprint

    found = of(sae, shipped)
    if found is None or not (found.folder / FACTS).is_file():
        return None
    is_its = fingerprint.of_model(model) == found.manifest.told["model"]["fingerprint"]
    return found.folder / FACTS if is_its else None


def _fits(atlas: Atlas, folder: Path | None) -> bool:
    """Whether an atlas is about the SAE in a folder; what lies inside the folder, or goes by a release's name, is."""
    if folder is None or folder in atlas.folder.parents:
        return True
    from lancet.loading import sae_from_folder

    return atlas.belongs(sae_from_folder(folder))


def places(model: str, saes: Sequence[str] = ()) -> dict[Path, Path | None]:
    """Where the atlas of a pair may lie, the likeliest first, and the folder of the SAE that it must be about, None
    where its name says enough."""
    from lancet.loading import DEFAULT_SAES, bundled

    ours = bundled(model)
    default = DEFAULT_SAES.get(names.hub_id(model) or "")
    out: dict[Path, Path | None] = {}
    for name in saes or [None]:
        site = _site(name)
        if name is None and ours:
            out |= _of_folder(next(iter(ours.values())))
        elif name is None:
            out |= {place.default("/".join(default)): None} if default else {}
        elif Path(name).is_dir():
            out |= _of_folder(Path(name))
        elif site in ours:
            out |= _of_folder(ours[site])
        else:
            out[place.default(name)] = None
            out |= {place.default(f"{default[0]}/{site}"): None} if default and site else {}
    return out


def _of_folder(folder: Path) -> dict[Path, Path | None]:
    from lancet import published

    told = published.told(folder)
    names_of = [folder.resolve().name] + ([f"{told['release']}/{told['id']}"] if told else [])
    return dict.fromkeys([folder / INSIDE, *map(place.default, names_of)], folder)


def _site(name: str | None) -> str:
    from lancet.site import Site

    try:
        return "" if name is None else str(Site.parse(name))
    except UsageError:
        return ""


def feature(atlas: Atlas, text: str) -> int:
    """The feature that a number (`12`, `#12`), a name of the user's or a concept of the SAE's card stands for.

    Raises:
        UnknownName: nothing is called so. UsageError: there is no such feature, or the name stands for several.
    """
    from lancet.namefile import entries_of, normal

    bare = text.strip().removeprefix("#")
    if bare.isascii() and bare.isdigit():
        return atlas.check_feature(int(bare))
    name = normal(text.strip())
    card = atlas.folder.parent / "concepts.json"  # beside an atlas that ships with its SAE
    known = (read_json(card) if card.is_file() else {}) | entries_of(atlas.manifest.key)
    if name not in known:
        raise UnknownName("feature name", name, known, "or give its number, such as 12, or `lancet search` for words")
    entry = known[name]
    if isinstance(entry.get("feature"), int) and not entry.get("blend"):
        return atlas.check_feature(entry["feature"])
    parts = [f"{feature}" for feature, _ in entry.get("blend") or ()]
    hint = f"its features' cards: lancet card {' '.join(parts[:5])}" if parts else f"`lancet name {name}` tells it"
    raise UsageError(f"{name} is a blend or a direction, not a single feature; {hint}")
