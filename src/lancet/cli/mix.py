"""`lancet mix`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lancet.cli import show

if TYPE_CHECKING:
    from lancet.cli.opening import Choice
    from lancet.mix import Mix


def run(expression: str, near: int, strength: float, choice: Choice, json: bool) -> None:
    from lancet.grammar import parse_expression

    parsed = parse_expression(expression)  # a typo is told before a model is opened
    lab = choice.open()
    with show.working("mixing"):
        found = lab.mix(parsed, near=near, opposed=max(1, near // 2), strength=strength)
    if json:
        show.as_json(found.to_json())
    else:
        told(found)
        show.say("; ".join(lab.model.notes))


def told(mix: Mix) -> None:
    """Length, parts, neighbours and effect."""
    show.line(f"{mix.direction.recipe} at {mix.direction.site}: length {mix.direction.norm:.3f}, {mix.rn:.3f}rn")
    if mix.parts:
        rows = [[p.part, f"{p.norm:.3f}", f"{p.cosine:+.3f}", f"{p.along:+.3f}"] for p in mix.parts]
        show.table(["part", "length", "cosine", "along it"], rows, right=["length", "cosine", "along it"])
    several = len({x.sae for x in (*mix.nearest, *mix.opposed)}) > 1
    rows = [
        [f"#{x.feature} {x.name}".rstrip(), f"{x.cosine:+.3f}", x.fires, x.says, *([x.sae] * several)]
        for x in (*mix.nearest, *mix.opposed)
    ]
    show.table(
        ["nearest, opposed", "cosine", "fires on", "makes the model say", *(["SAE"] * several)], rows, right=["cosine"]
    )
    effect = mix.effect
    pairs = zip(effect.promotes[:10], effect.suppresses[:10], strict=False)
    rows = [[show.visible(up), f"{a:+.2f}", show.visible(down), f"{b:+.2f}"] for (up, a), (down, b) in pairs]
    show.table(
        ["promotes", "nats", "suppresses", "nats "],
        rows,
        right=["nats", "nats "],
        title=f"what {effect.strength:g}rn of it makes the model say",
    )
