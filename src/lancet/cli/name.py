"""`lancet name`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.cli import show
from lancet.errors import UsageError

if TYPE_CHECKING:
    from lancet.cli.opening import Choice
    from lancet.lab import Lab
    from lancet.naming import Kept
    from lancet.sae import Sae


@dataclass(frozen=True)
class Asked:
    """What is to be done with names: exactly one of these, or a target and a name to be given."""

    listing: bool = False
    remove: str | None = None
    export: Path | None = None
    take_in: Path | None = None

    def check(self, target: str | None, name: str | None) -> None:
        """Raises UsageError where several things are asked for, or too little."""
        wanted = [self.listing, self.remove is not None, self.export is not None, self.take_in is not None]
        if sum(wanted) + (target is not None) != 1:
            raise UsageError(
                "say one thing: `lancet name 12345 bridge` gives a name, `lancet name bridge` tells what it stands "
                "for, and there are --list, --remove NAME, --export FILE and --import FILE"
            )


def run(target: str | None, name: str | None, asked: Asked, force: bool, choice: Choice, json: bool) -> None:
    asked.check(target, name)
    lab = choice.open()
    if target is not None and name is not None:
        give(lab, target, name, force, json)
    elif target is not None:
        tell(lab, target, json)
    elif asked.remove is not None:
        was = lab.forget(asked.remove)
        if json:
            show.as_json({"removed": asked.remove, "stood_for": was})
        else:
            show.line(f"{asked.remove} no longer stands for {was}")
            if asked.remove in lab.concepts():
                show.say(f"{asked.remove} is a concept of the SAE's card again")
    elif asked.export is not None:
        export(lab, asked.export, json)
    elif asked.take_in is not None:
        take_in(lab, asked.take_in, force, json)
    else:
        listed(lab, json)


def give(lab: Lab, target: str, name: str, force: bool, json: bool) -> None:
    """Gives a name; a bare number is a feature's."""
    hidden = lab.name(name, int(target) if target.isdigit() else target, force)
    entry = next(entry for entry in entries(lab) if entry["name"] == name and entry["whose"] == "yours")
    if json:
        show.as_json(entry | {"hides": hidden})
        return
    fires = f", which fires on {entry['fires']}," if entry["fires"] else ""
    show.line(f"{name} is {entry['said'] or entry['stands_for']}{fires} of {entry['sae']} from now on")
    if hidden:
        show.say(f"{hidden}; `lancet name --remove {name}` brings that back")


def tell(lab: Lab, name: str, json: bool) -> None:
    """What one name, or which names one feature, has."""
    found = [entry for entry in entries(lab) if name in (entry["name"], entry["stands_for"], f"{entry['feature']}")]
    if not found:
        if name.lstrip("#").isdigit():
            raise UsageError(f"{name} has no name; give it one with `lancet name {name.lstrip('#')} NAME`")
        lab.direction(name)  # tells the nearest names
        raise UsageError(f"{name} has no name of its own; give it one with `lancet name {name!r} NAME`")
    if json:
        show.as_json(found)
    else:
        table(found)


def entries(lab: Lab) -> list[dict[str, Any]]:
    """Every name: the user's, then those of the SAEs' cards; {"name", "stands_for", "whose", "sae", "site", "feature",
    "said", "fires", "says", "dose", "hidden"}."""
    from lancet import naming

    out: list[dict[str, Any]] = []
    for sae in lab.saes:
        for name, kept in naming.load(sae).entries.items():
            out.append(entry_of(lab, sae, name, kept, "yours") | {"dose": naming.dose_of(sae, name), "hidden": False})
    own = {entry["name"] for entry in out}
    for name, (sae, told) in lab.concepts().items():
        kept = naming.of_concept(told)
        dose = naming.dose_of(sae, name, lab.facts(sae).concepts) if name not in own else None
        out.append(entry_of(lab, sae, name, kept, "card") | {"dose": dose, "hidden": name in own})
    return out


def entry_of(lab: Lab, sae: Sae, name: str, kept: Kept, whose: str) -> dict[str, Any]:
    """One name, as in docs/json.md, less its dose."""
    fires = "" if kept.feature is None else lab.fires(kept.feature, sae)
    says = "" if kept.feature is None else lab.says(kept.feature, sae)
    return {
        "name": name,
        "stands_for": kept.meaning,
        "whose": whose,
        "sae": sae.name,
        "site": str(sae.site),
        "feature": kept.feature,
        "said": kept.said,
        "fires": fires,
        "says": says,
    }


def listed(lab: Lab, json: bool) -> None:
    """All names: the user's, then those of the SAEs' cards."""
    found = entries(lab)
    if json:
        show.as_json(found)
        return
    own = [entry for entry in found if entry["whose"] == "yours"]
    if own:
        table(own)
    else:
        show.line("no names given yet; `lancet name 12345 bridge` gives one")
    if card := [entry for entry in found if entry["whose"] == "card"]:
        show.line(f"names of the SAE's card, {len(card)}:")
        table(card)


def table(found: list[dict[str, Any]]) -> None:
    """Names as a table."""
    several = len({entry["site"] for entry in found}) > 1
    rows = []
    for entry in found:
        stands = entry["said"] or short(entry["stands_for"])
        whose = "yours" if entry["whose"] == "yours" else "card, hidden by yours" if entry["hidden"] else "card"
        rows.append([entry["name"], stands, entry["fires"], entry["dose"] or "", whose, *([entry["site"]] * several)])
    show.table(["name", "stands for", "fires on", "dose", "whose", *(["site"] * several)], rows)


def short(blend: str, most: int = 3) -> str:
    """A long blend cut after its strongest parts."""
    parts = blend.split(" + ")
    if len(parts) <= most:
        return blend
    return f"blend of {len(parts)}: " + ", ".join(part.split(" * ")[-1] for part in parts[:most]) + ", ..."


def export(lab: Lab, file: Path, json: bool) -> None:
    """Writes the user's names of one SAE."""
    from lancet import naming

    if len(lab.saes) > 1:
        raise UsageError("a file holds the names of one SAE; name one with --sae")
    count = naming.export(lab.sae(), file)
    if json:
        show.as_json({"file": str(file), "names": count})
    else:
        show.line(f"wrote {count} name{'s' * (count != 1)} of {lab.sae().name} to {file}")


def take_in(lab: Lab, file: Path, force: bool, json: bool) -> None:
    """Takes in the names of a file."""
    from lancet import naming

    if len(lab.saes) > 1:
        raise UsageError("a file holds the names of one SAE; name one with --sae")
    names = naming.take_in(lab.sae(), file, force)
    if json:
        show.as_json({"file": str(file), "names": names})
    else:
        show.line(f"took in {len(names)} name{'s' * (len(names) != 1)}: {', '.join(names[:10])}")
