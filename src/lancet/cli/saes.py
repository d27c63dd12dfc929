"""`lancet saes`: the published SAEs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lancet.catalogue import Entry
from lancet.cli import show

UNKNOWN = "unknown until fetched"


def run(model: str | None, site: str | None, release: str | None, search: str | None, limit: int, json: bool) -> None:
    from lancet import catalogue
    from lancet.errors import UsageError

    if limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}")
    listed = catalogue.load()
    found = listed.find(model, site, release, search)
    if json:
        show.as_json(
            [as_object(entry) for entry in found[:limit]] if len(found) > limit else [as_object(e) for e in found]
        )
    elif not found:
        raise UsageError("no published SAE fits all of that; `lancet saes` lists the releases")
    elif len(found) <= limit:
        each(found)
    else:
        by_release(found)
    if len(found) > limit:
        show.say(
            f"{len(found):,} of {len(listed.entries):,} SAEs fit, in {len({e.release for e in found})} releases; "
            + (
                f"the first {limit} are shown, --limit shows more"
                if json
                else "--release NAME lists one of them, --limit more rows"
            )
        )


def each(entries: Sequence[Entry]) -> None:
    """A row for each SAE."""
    from lancet import machine

    rows = []
    for entry in entries:
        known = as_object(entry)
        rows.append(
            [
                entry.name,
                entry.site or "unknown",
                f"{known['width']:,}" if known["width"] else "unknown",
                _number(entry.l0),
                f"{entry.explained:.0%}" if entry.explained is not None else "not stated",
                f"{known['disk_bytes'] / 1e6:,.0f} MB" if known["disk_bytes"] else "not here",
                machine.room().needs(known["bytes"]) if known["bytes"] else "unknown",
            ]
        )
    memory = f"of the {machine.room().where}'s {machine.room().total / 1e9:.1f} GB"
    columns = ["sae", "site", "width", "L0", "explained", "on disk", memory]
    show.table(columns, rows, right=["width", "L0", "explained", "on disk"])
    if any("unknown" in row for row in rows):
        show.say("what is unknown stands in no list: it is known once the SAE is fetched (lancet get NAME)")


def by_release(entries: Sequence[Entry]) -> None:
    """A row for each release: too many SAEs fit to list them."""
    releases: dict[str, list[Entry]] = {}
    for entry in entries:
        releases.setdefault(entry.release, []).append(entry)
    rows = []
    for release, inside in releases.items():
        kinds = dict.fromkeys(_kind(entry) for entry in inside)
        widths = sorted({entry.width for entry in inside if entry.width})
        here = sum(bool(disk_bytes(entry)) for entry in inside)
        rows.append(
            [
                release,
                inside[0].model,
                len(inside),
                ", ".join(kinds),
                _range(widths),
                _range(sorted({entry.layer for entry in inside if entry.layer is not None})),
                here,
            ]
        )
    columns = ["release", "model", "SAEs", "sites", "widths", "layers", "here"]
    show.table(columns, rows, right=["SAEs", "widths", "here"])


def as_object(entry: Entry) -> dict[str, Any]:
    """{"name", "release", "id", "model", "hub_model", "repo", "site", "layer", "width", "l0", "explained", "bytes",
    "fits", "here", "disk_bytes", "pickle", "page"}; None where the list does not say it."""
    from lancet import names, published

    told = published.told(published.folder(entry)) if published.here(entry) else None
    shape = _shape(entry) if told else None
    size = shape[1] if shape else entry.bytes
    return {
        "name": entry.name,
        "release": entry.release,
        "id": entry.id,
        "model": entry.model,
        "hub_model": names.hub_id(entry.model),
        "repo": entry.repo,
        "site": entry.site,
        "layer": entry.layer,
        "width": shape[0] if shape else entry.width,
        "l0": entry.l0,
        "explained": entry.explained,
        "bytes": size,
        "fits": _fits(size),
        "here": told is not None,
        "disk_bytes": disk_bytes(entry),
        "pickle": entry.pickle,
        "page": f"{url.rsplit('/', 1)[0]}" if (url := entry.url(0)) else None,
    }


def disk_bytes(entry: Entry) -> int | None:
    """What its folder takes, None where it is not here."""
    from lancet import published

    if not published.here(entry):
        return None
    return sum(file.stat().st_size for file in published.folder(entry).iterdir())


def _shape(entry: Entry) -> tuple[int, int] | None:
    """(width, bytes of the matrices in float32) of an SAE that is here."""
    from lancet import published
    from lancet.errors import LancetError
    from lancet.files import check_safetensors

    try:
        header = check_safetensors(published.folder(entry) / "sae_weights.safetensors")
        rows, columns = header["W_dec"]["shape"]
    except (LancetError, KeyError, ValueError):
        return None
    return rows, 2 * 4 * rows * columns


def _fits(size: int | None) -> str:
    from lancet import machine

    return machine.room().fits(size) if size else UNKNOWN


def _kind(entry: Entry) -> str:
    if entry.site is None:
        return "unknown"
    return entry.site.split(".", 2)[-1] if entry.site.startswith("blocks.") else entry.site


def _range(values: Sequence[int]) -> str:
    if not values:
        return "unknown"
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _number(value: float | None) -> str:
    return f"{value:g}" if value is not None else "not stated"
