"""`lancet ablate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lancet.cli import show

if TYPE_CHECKING:
    from lancet.ablate import Ablation, Damage, Mover, Ranking
    from lancet.cli.opening import Choice
    from lancet.generate import Sampling


def run(
    prompt: str,
    features: list[str],
    each: bool,
    at: str | None,
    span: str,
    to: str,
    everywhere: bool,
    controls: int,
    tokens: int,
    chat: bool,
    top: int,
    sampling: Sampling,
    choice: Choice,
    json: bool,
) -> None:
    from lancet.errors import UsageError
    from lancet.grammar import parse_span
    from lancet.units import Amount

    where = parse_span(span)  # a typo is told before a model is opened
    Amount.parse(to)
    if top < 1:
        raise UsageError(f"--top must be at least 1, got {top}")
    if each and (everywhere or span != "all"):
        raise UsageError("--each cuts at one place, which --at names; leave out --span and --everywhere")
    if at is not None and where.parts != ("all",):
        raise UsageError(f"--at {at!r} and --span {span!r} both say where to cut; leave out one of them")
    if not each and not features:
        raise UsageError("name the features to cut (such as 123, or a name), or rank those of a token with --each")
    lab = choice.open()
    text = [{"role": "user", "content": prompt}] if chat else prompt
    if each:
        with show.working("cutting one at a time"):
            chosen = [lab.feature(int(f) if f.isdigit() else f).index for f in features] or None
            ranking = lab.ablate_each(text, at, targets=chosen, to=to)
        if json:
            show.as_json(ranking.to_json())
        else:
            ranked(ranking, top)
        return
    with show.working("cutting, and writing beside controls"):
        if at is not None:
            where = replace(where, parts=lab.tokenize(text).holding(at))
        found = lab.ablate(
            text,
            features,
            to=to,
            span=where,
            everywhere=everywhere,
            controls=controls,
            tokens=tokens,
            sampling=sampling,
            count=top,
        )
    if json:
        show.as_json(found.to_json())
    else:
        told(found)
        show.say("; ".join(lab.model.notes))


def told(found: Ablation) -> None:
    """The whole report: movers, then the ablation beside its controls, then the texts, then what it comes to."""
    show.heading(f"the next token, with {brief(found.what)}")
    movers("gains", found.up)
    movers("loses", found.down)
    show.heading("effect or damage")
    rows = [measured("plain", found.plain), measured("cut", found.cut)]
    rows += [measured(f"control {i}", damage) for i, damage in enumerate(found.controls, 1)]
    show.table(
        ["", "KL", "loss", "surprise", "features", "activity"],
        rows,
        right=["KL", "loss", "surprise"],
        title="KL: of the next token, in nats; loss: of the text; surprise: of what is written, to the plain model",
    )
    for name, row in found.continuations.items():
        show.heading(name if not row.edits else f"{name}: {brief(row.edits)}")
        show.line(show.visible(row.text))
    show.heading(verdict(found))


def brief(edits: Sequence[str]) -> str:
    """Edits in their notation; what several features are set to, and where, is said once."""
    named: dict[str, list[str]] = {}
    for edit in edits:
        name, sign, rest = edit.partition(" = ")
        named.setdefault(sign + rest, []).append(name)
    return ", ".join(f"{', '.join(names)}{rest}" for rest, names in named.items())


def verdict(found: Ablation) -> str:
    """One sentence: whether this is more than any blow of that size does."""
    if not found.controls:
        return "no controls: whether this is the features' doing or mere damage is not known"
    of, out = len(found.controls), found.stands_out()
    times = found.cut.kl / max(found.control("kl"), 1e-9)
    said = f"changes the next token more than {out} of {of} controls of the same size do ({times:.1f} times their mean)"
    return said + (": an effect" if out == of else ": no more than damage" if out <= of // 2 else "")


def measured(name: str, damage: Damage) -> list[str]:
    """A row of the table of effect and damage."""
    active = ", ".join("-" if a is None else f"{a:.2f}" for a in damage.activity)
    surprise = "-" if damage.surprise != damage.surprise else f"{damage.surprise:.2f}"
    return [name, f"{damage.kl:.4f}", f"{damage.loss:.3f}", surprise, " ".join(damage.features), active]


def movers(what: str, found: list[Mover]) -> None:
    """Tokens with their probability before and after, and under the controls."""
    rows = [
        [show.visible(m.token), f"{m.before:.2%}", f"{m.after:.2%}", "-" if m.control is None else f"{m.control:.2%}"]
        for m in found
    ]
    show.table([what, "before", "after", "controls"], rows, right=["before", "after", "controls"])


def ranked(ranking: Ranking, top: int) -> None:
    """The features of a place, first those whose removal changes the next token most."""
    rows = [
        [
            f"#{part.feature}",
            f"{part.value:.1f}",
            f"{part.kl:.4f}",
            f"{part.kl_end:.4f}",
            f"{show.visible(part.down.token)} {part.down.before:.1%} -> {part.down.after:.1%}",
            f"{show.visible(part.up.token)} {part.up.before:.1%} -> {part.up.after:.1%}",
            part.fires,
            part.says,
        ]
        for part in ranking.parts[:top]
    ]
    show.table(
        ["feature", "strength", "KL", "KL at the end", "loses", "gains", "fires on", "makes the model say"],
        rows,
        right=["strength", "KL", "KL at the end"],
        title=f"{len(ranking.parts)} features at {show.visible(ranking.spot.text)!r}, each set to {ranking.to} there",
    )
