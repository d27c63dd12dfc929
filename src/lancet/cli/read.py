"""`lancet read`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lancet.cli import show

if TYPE_CHECKING:
    from lancet.cli.opening import Choice
    from lancet.reading import Lit, Reading, Spot


def run(
    text: str,
    at: str | None,
    top: int,
    dense: bool,
    chat: bool,
    plot: Path | None,
    choice: Choice,
    json: bool,
) -> None:
    lab = choice.open()
    with show.working("reading"):
        prompt = [{"role": "user", "content": text}] if chat else text
        readings = [lab.read(prompt, top=top, sae=sae.site, dense=dense) for sae in lab.saes]
    found = []
    for reading in readings:
        spot = reading.at(at) if at is not None else None
        if plot is not None:
            show.say(f"drew {reading.plot(numbered(plot, readings, reading), at)}")
        found.append(spot_json(spot, top, dense) if spot else reading.to_json())
        if json:
            continue
        if len(readings) > 1:
            show.heading(f"{reading.sae.name} at {reading.sae.site}")
        if spot:
            recipe(spot, top, dense)
        else:
            every_token(reading)
        remarks(reading)
    if json:
        show.as_json(found[0] if len(found) == 1 else found)


def run_direction(text: str, direction: str, chat: bool, choice: Choice, json: bool) -> None:
    """How far each token reaches along a direction."""
    from lancet.grammar import parse_expression

    parse_expression(direction)  # a typo is told before a model is opened
    lab = choice.open()
    with show.working("reading"):
        found = lab.read_direction([{"role": "user", "content": text}] if chat else text, direction)
    told = found.to_json()
    if json:
        show.as_json(told)
        return
    most = max(4.0, *(abs(token["standing"]) for token in told["tokens"]))
    rows = [
        [
            token["position"],
            show.visible(token["text"]),
            f"{token['projection']:+.2f}",
            f"{token['standing']:+.1f}",
            show.bar(token["standing"], most),
        ]
        for token in told["tokens"]
    ]
    show.table(
        ["position", "token", "along it", "deviations", ""],
        rows,
        right=["position", "along it", "deviations"],
        title=f"{told['direction']} at {told['site']}",
    )
    show.say(
        f"deviations from neutral text, which lies at {told['neutral']['mean']:+.2f} and spreads by "
        f"{told['neutral']['deviation']:.2f} along it"
    )
    show.say("; ".join(lab.model.notes))


def numbered(plot: Path, readings: list[Reading], reading: Reading) -> Path:
    """The picture's file; with several SAEs the site is part of its name."""
    return plot if len(readings) == 1 else plot.with_stem(f"{plot.stem}-{reading.sae.site}")


def every_token(reading: Reading) -> None:
    """A row for each token: its characters, how many features are lit, how much they explain, the strongest."""
    rows = []
    for spot in reading:
        listed = "  ".join(told(lit) for lit in spot.top(reading.top, reading.dense))
        rows.append([spot.positions[0], show.visible(spot.text), spot.lit[0], f"{spot.explained[0]:.0%}", listed])
    show.table(
        ["position", "token", "lit", "explained", "features"],
        rows,
        right=["position", "lit", "explained"],
        title=f"{reading.sae.d_sae:,} features at {reading.sae.site}",
    )


def recipe(spot: Spot, top: int, dense: bool) -> None:
    """The recipe of the cocktail: the features of some tokens with their shares of the reconstruction."""
    sae = spot.reading.sae
    for position, lit, explained in zip(spot.positions, spot.lit, spot.explained, strict=True):
        piece = show.visible(spot.reading.tokens.piece(position))
        show.line(f"{piece!r} (position {position}): {lit} of {sae.d_sae:,} features lit, {explained:.0%} explained")
    lits = spot.top(top, dense)
    most = max((lit.value for lit in lits), default=1.0)
    page = spot.reading.sae.page
    rows = [
        [
            f"#{lit.feature} {lit.name or lit.described}".rstrip(),
            f"{lit.value:.1f}",
            show.bar(lit.value, most),
            f"{lit.share:.1%}",
            lit.fires,
            lit.says,
        ]
        + ([f"{page}/{lit.feature}"] if page else [])
        for lit in lits
    ]
    columns = ["feature", "strength", "", "share", "fires on", "makes the model say", *(["page"] if page else [])]
    show.table(columns, rows, right=["strength", "share"])


def told(lit: Lit) -> str:
    """One feature in few characters: number, activation, and its name, description or what it fires on."""
    return f"#{lit.feature} {lit.value:.1f} {lit.name or lit.described or lit.fires}".rstrip()


def remarks(reading: Reading) -> None:
    """What was left out and how it was computed."""
    if not reading.dense and (hidden := reading.hidden()):
        show.say(f"{hidden} features that fire on more than a tenth of all tokens are hidden; --dense shows them")
    show.say("; ".join(reading.notes))


def spot_json(spot: Spot, top: int, dense: bool) -> dict[str, object]:
    """{"text", "sae", "site", "positions", "lit", "explained", "top": [as in docs/json.md]}."""
    page = spot.reading.sae.page
    return {
        "text": spot.text,
        "sae": spot.reading.sae.name,
        "site": str(spot.reading.sae.site),
        "positions": list(spot.positions),
        "lit": list(spot.lit),
        "explained": [round(e, 4) for e in spot.explained],
        "top": [vars(lit) | ({"url": f"{page}/{lit.feature}"} if page else {}) for lit in spot.top(top, dense)],
    }
