"""Cutting features out: what the model would have said instead, and whether any other features would have done.

Next-token distribution, loss and continuation are compared before and after; the same is done to random features that
are as active there, moved by the same length. `each` cuts the features of a token one at a time and ranks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lancet.continuation import Comparison, Continuation
from lancet.controls import Pools, matched
from lancet.cut import Cut, Target, listed
from lancet.errors import UsageError
from lancet.forced import Branches, Changes, answer_losses, first_changed
from lancet.generate import Sampling, rows
from lancet.span import Span
from lancet.tokens import followed

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.lab import Lab, Prompt
    from lancet.reading import Spot
    from lancet.tokens import Tokens

CONTROLS = 10
TOKENS = 24
ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Mover:
    """A token whose probability as the next one changes.

    Attributes:
        before, after: its probability; control: its mean probability under the controls, None where there are none.
    """

    token: str
    before: float
    after: float
    control: float | None = None


@dataclass(frozen=True)
class Damage:
    """How far one set of features, cut out, takes the model from itself.

    Attributes:
        features: what was cut.
        activity: each one's mean activation over the tokens that are cut, None for a direction.
        kl: of the next-token distribution before from that after, in nats.
        loss: of the text, in nats a token.
        surprise: loss of the continuation under the plain model, in nats a token; NaN where none was written.
    """

    features: tuple[str, ...]
    activity: tuple[float | None, ...]
    kl: float
    loss: float
    surprise: float

    def to_json(self) -> dict[str, Any]:
        """All attributes; NaN as null."""
        numbers = {"kl": self.kl, "loss": self.loss, "surprise": self.surprise}
        rounded = {name: None if value != value else round(value, 6) for name, value in numbers.items()}
        return {"features": list(self.features), "activity": list(self.activity)} | rounded


@dataclass(repr=False)
class Ablation:
    """What cutting features out of one text does.

    Attributes:
        prompt: the text.
        what: the edits in their notation, or in words for a removal at every layer.
        plain, cut, controls: the model as it is, the ablation, and the controls beside it.
        up, down: tokens that gain and lose most probability as the next one, most first.
        likeliest: the likeliest next tokens before.
        continuations: "plain", "cut", and "control" (the first control).
    """

    prompt: Tokens
    what: tuple[str, ...]
    plain: Damage
    cut: Damage
    controls: list[Damage]
    up: list[Mover]
    down: list[Mover]
    likeliest: list[Mover]
    continuations: Comparison
    notes: list[str] = field(default_factory=list)

    def control(self, of: str) -> float:
        """The controls' mean of "kl", "loss" or "surprise"; NaN without controls."""
        values = [getattr(damage, of) for damage in self.controls]
        return sum(values) / len(values) if values else float("nan")

    def stands_out(self) -> int:
        """How many controls change the next token less than the ablation does."""
        return sum(damage.kl < self.cut.kl for damage in self.controls)

    def to_json(self) -> dict[str, Any]:
        """{"prompt", "what", "plain", "cut", "controls", "stands_out", "up", "down", "likeliest", "continuations"}."""
        return {
            "prompt": self.prompt.text,
            "what": list(self.what),
            "plain": self.plain.to_json(),
            "cut": self.cut.to_json(),
            "controls": [damage.to_json() for damage in self.controls],
            "stands_out": self.stands_out(),
            "up": [vars(mover) for mover in self.up],
            "down": [vars(mover) for mover in self.down],
            "likeliest": [vars(mover) for mover in self.likeliest],
            "continuations": self.continuations.to_json(),
        }

    def to_frame(self) -> Any:
        """A pandas data frame, one row for the plain model, the ablation and each control."""
        import pandas

        named = [("plain", self.plain), ("cut", self.cut), *((f"control {i}", d) for i, d in enumerate(self.controls))]
        return pandas.DataFrame([{"name": name, **damage.to_json()} for name, damage in named])

    def __str__(self) -> str:
        lines = [f"without {', '.join(self.what)}: KL {self.cut.kl:.3f} nats (controls {self.control('kl'):.3f})"]
        lines += [f"  {m.token!r} {m.before:.1%} -> {m.after:.1%}" for m in (*self.up[:5], *self.down[:5])]
        return "\n".join([*lines, str(self.continuations)])


# ---- the verb ------------------------------------------------------------------------------------------------------


def ablate(
    lab: Lab,
    prompt: Prompt,
    targets: Target | Sequence[Target],
    to: str | float = 0,
    span: str | Span = "all",
    everywhere: bool = False,
    controls: int = CONTROLS,
    tokens: int = TOKENS,
    sampling: Sampling | None = None,
    count: int = 10,
) -> Ablation:
    """Cuts features out of a text and out of what is written after it, beside random controls.

    Args:
        targets: features and directions, by number, name or expression.
        to: what their activations are set to: 0 switches them off, `-10` or `-1x` pushes below zero.
        span: where, in the notation of edits; `where #77 > 5` cuts only where another feature fires.
        everywhere: remove the targets' directions from the output of every block instead.
        controls: how many sets of random features stand beside it: as many as targets, each drawn from those that are
            about as active over the same tokens, moved at every token by the length of the real change.
        tokens: new tokens of the continuations; 0 writes none.
        sampling: its seed also draws the controls.
        count: tokens listed among movers.

    Raises:
        UsageError, UnknownName: as for edits.
    """
    if controls < 0 or tokens < 0 or count < 1:
        raise UsageError(f"controls ({controls}) and tokens ({tokens}) must be at least 0, count ({count}) at least 1")
    sampling = sampling or Sampling()
    ready = lab.tokenize(prompt)
    if len(ready) < 2:
        raise UsageError("the text has a single token, and nothing in it is predicted; give a longer one")
    cut = Cut.of(lab, listed(targets), ready, len(ready) + tokens, to, span, everywhere)
    plain = _written(lab, ready, [{}], tokens, sampling)
    pools = Pools(lab, cut, [followed(ready, plain[0])], [cut.mask])
    others = [pools.control(sampling.seed + i) for i in range(controls)]
    real = cut.changes()
    every: list[Changes] = [{}, real, *(matched(other.changes(), real) for other in others)]
    texts = [*plain, *_written(lab, ready, every[1:], tokens, sampling)]
    nexts, losses = scores(lab, ready, every)
    surprise = [float("nan")] * len(every)
    if tokens:
        surprise = answer_losses(lab.model, [ready] * len(every), texts).nanmean(1).tolist()
    damages = [
        Damage(one.names if one else (), pools.activities(one) if one else (), *numbers)
        for one, *numbers in zip([None, cut, *others], kl(nexts[:1], nexts).tolist(), losses, surprise, strict=True)
    ]
    named = [("plain", None), ("cut", cut), *([("control", others[0])] if others else [])]
    written = {
        name: Continuation(
            name,
            ready,
            tuple(text),
            lab.model.decode(text),
            one.notation() if one else (),
            sampling,
            "length" if len(text) == tokens else "end of text",
            lab.recipe(),
        )
        for (name, one), text in zip(named, texts, strict=False)
    }
    chance = nexts.exp()
    change = chance[1] - chance[0]
    up, down, likeliest = (_movers(lab, chance, by, count) for by in (change, -change, chance[0]))
    comparison = Comparison(written if tokens else {})
    plain_one, cut_one, *rest = damages
    notes = list(lab.model.notes)
    return Ablation(ready, cut.notation(), plain_one, cut_one, rest, up, down, likeliest, comparison, notes)


def _movers(lab: Lab, chance: Tensor, by: Tensor, count: int) -> list[Mover]:
    """The first tokens by a number [vocab], from probabilities [plain, cut, controls...; vocab]."""
    picks = by.topk(min(count, len(by))).indices.tolist()
    control = chance[2:].mean(0) if len(chance) > 2 else None
    return [
        Mover(
            lab.model.decode([t]),
            float(chance[0, t]),
            float(chance[1, t]),
            None if control is None else float(control[t]),
        )
        for t in picks
    ]


def scores(lab: Lab, text: Tokens, changes: Sequence[Changes]) -> tuple[Tensor, list[float]]:
    """Under each change the log-probabilities of the token after a text, [changes, vocab], and its loss.

    The loss is in nats a token, over all tokens but the first.
    """
    import torch

    first = first_changed(changes, len(text))
    branches = Branches(lab.model, text, first)
    ids = branches.ids[0, 1:]
    known = branches.head.float().log_softmax(-1)
    before = -known.gather(-1, ids[:first, None]).sum()
    nexts, losses = [], []
    for logits in branches.logits(changes):
        chance = logits.log_softmax(-1)
        own = ids[first:].expand(len(chance), -1)[..., None]
        losses += ((before - chance[:, :-1].gather(-1, own).sum((1, 2))) / len(ids)).tolist()
        nexts.append(chance[:, -1])
    return torch.cat(nexts), losses


def kl(before: Tensor, after: Tensor) -> Tensor:
    """[...] KL divergence in nats of log-probabilities `after` from `before`, both [..., vocab]."""
    return (before.exp() * (before - after)).sum(-1).clamp_min(0)


def _written(lab: Lab, prompt: Tokens, changes: Sequence[Changes], tokens: int, sampling: Sampling) -> list[list[int]]:
    """What is written under each change, with the same random draws."""
    out: list[list[int]] = [[] for _ in changes]
    if not tokens:
        return out
    for first in range(0, len(changes), ROWS_AT_ONCE):
        part = list(changes[first : first + ROWS_AT_ONCE])
        for made in rows(lab.model, [prompt] * len(part), part, tokens, sampling, [sampling.seed] * len(part)):
            for i, token in enumerate(made):
                if token is not None:
                    out[first + i].append(token)
    return out


# ---- one at a time -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A feature of a token and what its removal there does.

    Attributes:
        feature: its number.
        value: its activation, the largest where several tokens were asked about.
        kl: change of the token that follows the place, in nats; kl_end: of the token that follows the whole text.
        up, down: the token whose probability rises and falls most there, with its probability before and after.
        fires, says: what is known of the feature.
    """

    feature: int
    value: float
    kl: float
    kl_end: float
    up: Mover
    down: Mover
    fires: str = ""
    says: str = ""


@dataclass(repr=False)
class Ranking:
    """The features of a place in a text, those first whose removal there changes the next token most.

    Attributes:
        spot: the place.
        to: what each was set to.
        parts: ranked by `kl`.
    """

    spot: Spot
    to: str
    parts: list[Part]

    def to_json(self) -> dict[str, Any]:
        """{"prompt", "sae", "site", "at", "positions", "to", "features"}."""
        reading = self.spot.reading
        return {
            "prompt": reading.tokens.text,
            "sae": reading.sae.name,
            "site": str(reading.sae.site),
            "at": self.spot.text,
            "positions": list(self.spot.positions),
            "to": self.to,
            "features": [vars(part) | {"up": _plain(part.up), "down": _plain(part.down)} for part in self.parts],
        }

    def to_frame(self) -> Any:
        """A pandas data frame, one row a feature."""
        import pandas

        return pandas.DataFrame([vars(part) | {"up": part.up.token, "down": part.down.token} for part in self.parts])

    def __str__(self) -> str:
        lines = [f"#{p.feature} {p.value:.1f}: {p.kl:.4f} nats, {p.down.token!r} -> {p.up.token!r}" for p in self.parts]
        return "\n".join([f"at {self.spot.text!r}", *lines[:20]])


def _plain(mover: Mover) -> dict[str, Any]:
    return {"token": mover.token, "before": mover.before, "after": mover.after}


def each(
    lab: Lab,
    prompt: Prompt,
    at: str | None = None,
    targets: Sequence[int] | None = None,
    to: str | float = 0,
    sae: str | None = None,
) -> Ranking:
    """Cuts the features that are active at a place, one at a time and there alone, and ranks them by what that changes.

    Many are cut in one forward pass, a row for each; what precedes the place is computed once.

    Args:
        at: the place, as characters of the text; the last token where none are given.
        targets: only these features; all that are active there where none are given.
        to: what each is set to.
        sae: the site of the SAE; the default one where none is named.

    Raises:
        UsageError: no feature is active there, or the characters do not occur.
    """
    from lancet.cut import one_feature

    reading = lab.read(prompt, sae=sae)
    text = reading.tokens
    spot = reading.at(at) if at is not None else reading.spot([len(text) - 1])
    lit = {x.feature: x for x in spot.top(reading.sae.d_sae, dense=True)}
    chosen = list(lit) if targets is None else [reading.sae.check_feature(t) for t in targets]
    if not chosen:
        raise UsageError(f"no feature is active at {spot.text!r}; choose another place")
    changes: list[Changes] = [{}, *(one_feature(lab, reading.sae, f, text, spot.positions, to) for f in chosen)]
    branches = Branches(lab.model, text, first_changed(changes, len(text)), scored=False)
    place = max(spot.positions) - branches.first
    decode = lab.model.decode
    base = None
    parts: list[Part] = []
    for logits in branches.logits(changes):
        here, end = logits[:, place].log_softmax(-1), logits[:, -1].log_softmax(-1)
        if base is None:
            base = here[:1], end[:1]
        near, far = kl(base[0], here).tolist(), kl(base[1], end).tolist()
        was, now = base[0][0].exp(), here.exp()
        for i in range(len(here)):
            number = len(parts)
            feature = chosen[number - 1] if number else -1  # the first row is the plain one
            up, down = int((now[i] - was).argmax()), int((now[i] - was).argmin())
            moved = [Mover(decode([t]), float(was[t]), float(now[i, t])) for t in (up, down)]
            known = lit.get(feature)
            told = (lab.fires(feature, reading.sae), lab.says(feature, reading.sae)) if number else ("", "")
            parts.append(Part(feature, known.value if known else 0.0, near[i], far[i], moved[0], moved[1], *told))
    return Ranking(spot, str(to), sorted(parts[1:], key=lambda part: -part.kl))
