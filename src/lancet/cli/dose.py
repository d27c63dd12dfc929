"""`lancet dose`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.cli import show

if TYPE_CHECKING:
    from lancet.cli.opening import Choice
    from lancet.dose import Dose, Row


def run(target: str | None, like_file: Path | None, plot: Path | None, choice: Choice, json: bool, **how: Any) -> None:
    from lancet.edit import Edit
    from lancet.files import text_lines
    from lancet.grammar import parse_expression
    from lancet.units import Amount

    if target is not None:  # a typo is told before a model is opened
        parse_expression(target)
    for strength in how["strengths"]:
        Amount.parse(strength)
    Edit.parse(f"#0 += 1 @ {how['span']}")
    how["like"] = [*how["like"], *(text_lines(like_file) if like_file else [])]
    lab = choice.open()
    with show.working("sweeping (some minutes)"):
        found = lab.dose(target, say=show.say, **how)
    if plot is not None:
        show.say(f"drew {found.plot(plot)}")
    if json:
        show.as_json(found.to_json())
        return
    table(found)
    if how["name"] and found.chosen:
        show.line(f"named {how['name']}: use it as `{how['name']} {found.chosen.sign} auto`")
    show.say("; ".join([*found.notes, *lab.model.notes]))


def table(found: Dose) -> None:
    """The sweep, then what was chosen, told on other prompts."""
    name, how = next(iter(found.detectors.items()))
    show.line(f"says the concept: {name} ({how})")
    limits = found.limits
    show.line(f"limits: {limits.surprise:g} nats a token above plain text, repeated 3-grams below {limits.repeats:g}")
    show.heading("calibration prompts")
    rows(found.calibration, found.chosen)
    show.heading("other prompts and seeds")
    rows(found.report, found.reported)
    if found.chosen is None:
        return
    show.line(f"recommended: {found.chosen.short}", style="bold")
    if len(found.chosen.edit) > len(found.chosen.short):
        show.line(f"as an edit: {found.chosen.edit}")
    for sign, amount in found.kept.items():
        show.line(f"from now on `{sign} auto` means {sign} {amount}")


def rows(listed: list[Row], chosen: Row | None) -> None:
    """A row for each strength, 95 % intervals in brackets."""
    others = [name for row in listed[:1] for name in row.said][1:]
    columns = ["way", "edit", "says", *others, "extra nats", "repeats", "distance", "score", ""]
    show.table(
        columns,
        [
            [
                row.way,
                row.edit.rpartition(") ")[2] if len(row.edit) > 40 else row.edit,
                row.rate,
                *(f"{row.said[name].value:.2f}" for name in others),
                row.extra,
                f"{row.repeats.value:.2f}",
                f"{row.distance.value:.2f}",
                f"{row.score:.2f}",
                "recommended" if row is chosen else "",
            ]
            for row in listed
        ],
        right=["score"],
    )
