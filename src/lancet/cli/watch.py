"""`lancet watch`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lancet.cli import show

if TYPE_CHECKING:
    from lancet.cli.opening import Choice
    from lancet.watch import Context, Watch


def run(feature: str, file: Path | None, others: Path | None, plot: Path | None, choice: Choice, json: bool) -> None:
    from lancet.files import text_lines

    texts = text_lines(file) if file is not None else None
    beside = text_lines(others) if others is not None else None
    lab = choice.open()
    with show.working("watching"):
        found = lab.watch(int(feature) if feature.isdigit() else feature, texts, beside)
    if plot is not None:
        show.say(f"drew {found.plot(plot)}")
    if json:
        show.as_json(found.to_json())
    else:
        told(found)
        for note in (*found.notes, *lab.model.notes):
            show.say(note)


def told(watch: Watch) -> None:
    """The feature in the sentences about it, then the three beside each other, then where else each is strong."""
    fired, own, elsewhere, others = watch.fired
    name = f" {watch.name}" if watch.name else ""
    rows = [[s.text, show.visible(s.token), f"{s.value:.1f}", s.rank or ""] for s in watch.sightings if s.about]
    show.table(
        ["sentence", "strongest at", "strength", "rank"],
        rows,
        right=["strength", "rank"],
        title=f"#{watch.feature}{name} fires in {fired} of {own} sentences about {watch.about}, "
        f"and in {elsewhere} of {others} others",
    )
    for sighting in sorted((s for s in watch.sightings if not s.about and s.value > 0), key=lambda s: -s.value)[:5]:
        show.say(f"also {sighting.value:.1f} at {show.visible(sighting.token)!r} in: {sighting.text[:100]}")
    rows = [
        [
            unit.label,
            f"{unit.auroc:.3f}",
            f"{unit.usual:.2f}",
            f"{unit.level:.2f}",
            f"{unit.reached} of {unit.of}",
            unit.where,
        ]
        for unit in watch.units
    ]
    show.table(
        ["", "AUROC", "usual", "in these", "others half way there", "at"],
        rows,
        right=["AUROC", "usual", "in these"],
        title="which single number tells these sentences from the others",
    )
    for unit in watch.units:
        show.heading(f"{unit.label}: where it is strongest in neutral sentences that are not about it")
        rows = [[show.visible(c.token), f"{c.value:.2f}", around(c)] for c in unit.contexts]
        if rows:
            show.table(["token", "strength", "where"], rows, right=["strength"])
        else:
            show.line("nowhere")


def around(context: Context) -> str:
    """A token with what stands around it, in one line."""
    return f"...{context.before}[{context.token}]{context.after}...".replace("\n", "\\n")
