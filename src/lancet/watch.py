"""Watching one feature over many sentences, beside the single neurons that tell the same sentences apart best.

A feature of an SAE has a number for good: whatever sentence speaks of the thing, the same number lights up, and little
else does. A single coordinate of the stream, or a single neuron of the MLP before it, may tell the very same sentences
apart nearly as well (it is picked here on the sentences that it is scored on, which flatters it), but it answers to
other things too: its strongest tokens in neutral text that is not about the thing show to what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lancet import about, neurons
from lancet.errors import UsageError
from lancet.facts import DENSE

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.hooks import Place
    from lancet.lab import Lab
    from lancet.sae import Sae
    from lancet.tokens import Tokens

CONTEXTS = 8  # other contexts told of each
AROUND = 24  # characters told on each side of a token

Kind = Literal["feature", "coordinate", "neuron"]


@dataclass(frozen=True)
class Sighting:
    """A feature in one sentence.

    Attributes:
        text: the sentence; about: whether it is one of those that are about the feature's context.
        token: where the feature is strongest, "" where it does not fire; value: its activation there.
        rank: its place among the features lit at that token, features that fire nearly everywhere left out; 0 where it
            does not fire or it was not looked up (sentences that are not about the context).
    """

    text: str
    about: bool
    token: str
    value: float
    rank: int


@dataclass(frozen=True)
class Context:
    """A token of neutral text where something is strong, with what stands around it, and how strong."""

    before: str
    token: str
    after: str
    value: float


@dataclass(frozen=True)
class Unit:
    """A feature, a coordinate of the value at its site, or a neuron of the MLP before it.

    Attributes:
        kind, index: which.
        where: the site.
        sign: -1 where low values mean the sentences; scores and values here are already multiplied by it.
        auroc: of the sentences' maxima.
        scores: the maximum over each sentence's tokens.
        level: the median of the maxima of the sentences about it.
        usual: the median over the tokens of neutral sentences, 0 for a feature that is seldom lit.
        reached: how many neutral sentences that are not about it come half way or more from `usual` to `level`; of so
            many.
        contexts: its strongest tokens in those, each sentence once.
    """

    kind: Kind
    index: int
    where: str
    sign: int
    auroc: float
    scores: tuple[float, ...]
    level: float
    usual: float
    reached: int
    of: int
    contexts: tuple[Context, ...]

    @property
    def label(self) -> str:
        """In few words: `#12`, `coordinate 300`, `MLP neuron 1200 (low)`."""
        if self.kind == "feature":
            return f"#{self.index}"
        kind = "coordinate" if self.kind == "coordinate" else "MLP neuron"
        return f"{kind} {self.index}" + (" (low)" if self.sign < 0 else "")


@dataclass(frozen=True)
class Watch:
    """One feature over many sentences, beside single neurons.

    Attributes:
        feature: its index; name: the user's, or "".
        sae, site: whose it is and where that reads.
        about: what the sentences are about: a concept of the bench, or the user's sentences.
        words: which mark a neutral sentence as being about it.
        sightings: every sentence, those about it first.
        units: the feature, the best coordinate and, where there is an MLP before the site, its best neuron.
        notes: what should be known about all this, in words.
    """

    feature: int
    name: str
    sae: str
    site: str
    about: str
    words: tuple[str, ...]
    sightings: tuple[Sighting, ...]
    units: tuple[Unit, ...]
    notes: tuple[str, ...]

    @property
    def fired(self) -> tuple[int, int, int, int]:
        """In how many sentences about it the feature fires, of how many; in how many others, of how many."""
        own, other = ([s for s in self.sightings if s.about is side] for side in (True, False))
        return sum(s.value > 0 for s in own), len(own), sum(s.value > 0 for s in other), len(other)

    def to_json(self) -> dict[str, Any]:
        """{"feature", "name", "sae", "site", "about", "words", "fired", "sentences": [...], "units": [...], "notes"};
        docs/json.md has the whole of it."""
        units = []
        for unit in self.units:
            told = {k: v for k, v in vars(unit).items() if k not in ("scores", "contexts")}
            told |= {key: round(told[key], 5) for key in ("auroc", "level", "usual")} | {"label": unit.label}
            told["scores"] = [round(score, 4) for score in unit.scores]
            told["contexts"] = [vars(c) | {"value": round(c.value, 4)} for c in unit.contexts]
            units.append(told)
        return {
            "feature": self.feature,
            "name": self.name,
            "sae": self.sae,
            "site": self.site,
            "about": self.about,
            "words": list(self.words),
            "fired": dict(zip(("about", "of_about", "others", "of_others"), self.fired, strict=True)),
            "sentences": [vars(s) | {"value": round(s.value, 4)} for s in self.sightings],
            "units": units,
            "notes": list(self.notes),
        }

    def to_frame(self) -> Any:
        """A pandas data frame, one row a sentence, with a column of scores for each unit."""
        import pandas

        frame = pandas.DataFrame([vars(s) for s in self.sightings])
        for unit in self.units:
            frame[unit.label] = unit.scores
        return frame

    def plot(self, path: str | Path) -> Path:
        """Draws the sentences' scores and the other contexts of each unit beside each other."""
        from lancet import figures

        return figures.contrast(self, Path(path))

    def __str__(self) -> str:
        fired, own, elsewhere, others = self.fired
        lines = [
            f"#{self.feature} fires in {fired} of {own} sentences about {self.about}, {elsewhere} of {others} others"
        ]
        for unit in self.units:
            told = ", ".join(repr(context.token.strip()) for context in unit.contexts)
            lines.append(
                f"{unit.label:>22}  AUROC {unit.auroc:.3f}  {unit.reached} of {unit.of} others half way  {told}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Picked:
    kind: Kind
    index: int
    sign: int
    auroc: float
    scores: Tensor  # [n]


def watch(
    lab: Lab, feature: int | str, texts: Sequence[str] | None = None, others: Sequence[str] | None = None
) -> Watch:
    """One feature over many sentences, beside the single coordinate and MLP neuron that tell them apart best.

    Args:
        feature: its number or name.
        texts: sentences about what it is for; None takes bundled ones about the concept that it separates best, which
            is found on other sentences than those that are scored.
        others: sentences that are not; None takes bundled ones about all (other) concepts.

    Raises:
        UsageError: no such feature; fewer than two sentences; a feature that fires in none of the bundled sentences.
    """
    import torch

    found = lab.feature(feature)
    sae = lab.sae(found.site)
    notes: list[str] = []
    sentences = about.bundled(lab, sae, found.index, others, notes) if texts is None else about.given(texts, others)
    place = _place(lab, sae, notes)

    rows, neutral = (
        [about.row(lab, text, notes) for text in texts]
        for texts in ((*sentences.own, *sentences.others), sentences.neutral)
    )
    positive = torch.arange(len(rows)) < len(sentences.own)
    picked, sightings = _scored(lab, sae, found.index, place, rows, positive)
    elsewhere = _elsewhere(lab, sae, place, picked, neutral, positive)
    if len(picked) > 1:
        notes.append(
            "the coordinate and the neuron are the best of all on the sentences themselves, which flatters them"
        )
    where = {"feature": str(sae.site), "coordinate": str(sae.site)}
    where["neuron"] = f"blocks.{neurons.layer_before(sae.site)}.mlp.hook_post"
    units = tuple(
        Unit(
            kind=unit.kind,
            index=unit.index,
            where=where[unit.kind],
            sign=unit.sign,
            auroc=unit.auroc,
            scores=tuple(unit.scores.tolist()),
            level=_level(unit, positive),
            usual=usual,
            reached=reached,
            of=len(neutral),
            contexts=tuple(contexts),
        )
        for unit, (usual, reached, contexts) in zip(picked, elsewhere, strict=True)
    )
    return Watch(
        feature=found.index,
        name=found.name,
        sae=sae.name,
        site=str(sae.site),
        about=sentences.about,
        words=sentences.words,
        sightings=tuple(sightings),
        units=units,
        notes=tuple(dict.fromkeys(notes)),
    )


def _place(lab: Lab, sae: Sae, notes: list[str]) -> Place | None:
    layer = neurons.layer_before(sae.site)
    if layer < 0:
        notes.append(f"no MLP comes before {sae.site}")
        return None
    try:
        return neurons.place(lab.model, layer)
    except UsageError as error:
        notes.append(str(error))
        return None


def _scored(
    lab: Lab, sae: Sae, feature: int, place: Place | None, rows: Sequence[Tokens], positive: Tensor
) -> tuple[list[_Picked], list[Sighting]]:
    """The units to be told of, with their scores, and the feature in each sentence."""
    import torch

    peaks: dict[str, list[Tensor]] = {}
    order: list[int] = []
    seen: dict[int, Sighting] = {}
    dense = lab.facts(sae).density > DENSE
    for which, x, lit, keep in neurons.passes(lab.model, sae.site, place, rows):
        order += which
        activation = about.activation(sae, x, feature)
        parts = {"feature": activation[..., None], "coordinate": x, "coordinate-": -x}
        if lit is not None:
            parts |= {"neuron": lit, "neuron-": -lit}
        for kind, values in parts.items():
            peaks.setdefault(kind, []).append(about.peak(values, keep).cpu())
        strongest = activation.masked_fill(~keep, -1).argmax(1).tolist()
        for i, row in enumerate(which):
            at, mine = strongest[i], bool(positive[row])
            value = float(activation[i, at])
            rank = _rank(sae, x[i], keep[i], at, feature, dense) if mine and value > 0 else 0
            token = rows[row].piece(at) if value > 0 else ""
            seen[row] = Sighting(rows[row].text, mine, token, value, rank)
    back = torch.tensor(order).argsort()
    scores = {kind: torch.cat(values)[back] for kind, values in peaks.items()}
    picked = [_Picked("feature", feature, 1, *_best(scores["feature"], positive)[1:])]
    for kind in ("coordinate", "neuron"):
        if kind in scores:
            sides = [(*_best(scores[kind + mark], positive), sign) for mark, sign in (("", 1), ("-", -1))]
            index, area, column, sign = max(sides, key=lambda side: side[1])
            picked.append(_Picked(kind, index, sign, area, column))
    return picked, [seen[row] for row in range(len(rows))]


def _best(scores: Tensor, positive: Tensor) -> tuple[int, float, Tensor]:
    """The column that separates best: which, its AUROC, and itself."""
    from lancet.scoring import auroc

    areas = auroc(scores.numpy(), positive.numpy())
    best = int(areas.argmax())
    return best, float(areas[best]), scores[:, best]


def _rank(sae: Sae, x: Tensor, keep: Tensor, at: int, feature: int, dense: Tensor) -> int:
    lit = sae.features(x, keep)
    here = lit.token == int(keep[:at].sum())
    other = lit.feature[here][~dense.to(lit.feature.device)[lit.feature[here]]]
    values = lit.value[here].abs()
    own = float(values[lit.feature[here] == feature].max())
    kept = values[~dense.to(lit.feature.device)[lit.feature[here]]]
    return 1 + int((kept[other != feature] > own).sum())


def _level(unit: _Picked, positive: Tensor) -> float:
    return float(unit.scores[positive].median())


def _elsewhere(
    lab: Lab, sae: Sae, place: Place | None, picked: Sequence[_Picked], rows: Sequence[Tokens], positive: Tensor
) -> list[tuple[float, int, list[Context]]]:
    """Where else each unit is strong: its usual value, how many texts come half way to its level, where they do."""
    import torch

    found: list[list[tuple[float, int, int]]] = [[] for _ in picked]
    every: list[list[Tensor]] = [[] for _ in picked]
    for which, x, lit, keep in neurons.passes(lab.model, sae.site, place, rows):
        for unit, strongest, tokens in zip(picked, found, every, strict=True):
            if unit.kind == "feature":
                values = about.activation(sae, x, unit.index)
            else:
                held = x if unit.kind == "coordinate" else lit
                assert held is not None
                values = held[..., unit.index] * unit.sign
            best = values.masked_fill(~keep, -float("inf")).max(1)
            strongest += zip(best.values.tolist(), which, best.indices.tolist(), strict=True)
            tokens.append(values[keep].cpu())
    out = []
    for unit, strongest, tokens in zip(picked, found, every, strict=True):
        usual = float(torch.cat(tokens).median())
        if unit.kind == "feature":
            strongest = [entry for entry in strongest if entry[0] > 0]
        half = (usual + _level(unit, positive)) / 2
        strongest.sort(key=lambda entry: -entry[0])
        contexts = [_told(rows[row], at, value) for value, row, at in strongest[:CONTEXTS]]
        out.append((usual, sum(value >= half for value, _, _ in strongest), contexts))
    return out


def _told(row: Tokens, at: int, value: float) -> Context:
    begin, end = row.spans[at]
    return Context(row.text[max(0, begin - AROUND) : begin], row.text[begin:end], row.text[end : end + AROUND], value)
