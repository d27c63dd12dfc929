"""A card: what an atlas says about one feature, gathered for a terminal, a page, a picture or JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lancet.atlas import explanations as kept_of
from lancet.atlas import terms
from lancet.atlas.atlas import BANDS, Atlas, Example, Record
from lancet.atlas.manifest import Manifest

BINS_AN_OCTAVE = 4
POSITIONS = ("1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256-511", "512 on")
FEW = 4  # examples shown of each band but the strongest
MANY = 10  # of the strongest
ALIKE = 0.6  # of the words of two examples together: from here on they are the same line in two forms


@dataclass(frozen=True)
class Neighbour:
    """A feature beside another one.

    Attributes:
        feature: its number; name: the user's, "" where it has none; fires: the tokens it fires on.
        amount: the cosine of the directions, or the share of firings.
        error: the share's standard error, None for a cosine.
    """

    feature: int
    name: str
    fires: tuple[str, ...]
    amount: float
    error: float | None = None


@dataclass(frozen=True)
class Card:
    """What is known of one feature.

    Attributes:
        manifest: the atlas it comes from.
        record: its row.
        name: the user's names of it, "" where it has none.
        explanations: descriptions: {"text", "source", "score"}, the score None where there is none.
        agreed: words that both lenses say it makes likelier; None where one of them was not run.
        near, together: the features with the nearest directions, and those that fire on the same tokens.
        examples: by band and rank.
    """

    manifest: Manifest
    record: Record
    name: str
    explanations: tuple[dict[str, Any], ...]
    agreed: tuple[str, ...] | None
    near: tuple[Neighbour, ...]
    together: tuple[Neighbour, ...]
    examples: tuple[Example, ...]

    @property
    def feature(self) -> int:
        """Its number."""
        return self.record.feature

    @property
    def rates(self) -> tuple[float, ...]:
        """[10] share of the tokens at each bin of positions on which it fires."""
        return tuple(
            fired / of if of else 0.0 for fired, of in zip(self.record.positions, self.manifest.positions, strict=True)
        )

    @property
    def agreement(self) -> str:
        """Whether the two lenses agree, in words; "" where one of them was not run."""
        if self.agreed is None:
            return ""
        most = min(len(self.record.effect_up), len(self.record.logit_up))
        if not self.agreed:
            return f"the two lenses have none of {most} words in common"
        return f"the two lenses agree on {len(self.agreed)} of {most} words: {', '.join(self.agreed)}"

    def band(self, band: int) -> str:
        """What a band holds, in words and in activations."""
        if band == 0:
            return "strongest"
        low, high = self.record.bounds[band - 1], self.record.bounds[band]
        return f"{(band - 1) * 20}-{band * 20}% of the maximum ({low:.3g} to {high:.3g})"

    def by_band(self) -> list[tuple[int, list[Example]]]:
        """The examples, the strongest band first."""
        order = [0, *range(BANDS - 1, 0, -1)]
        found = [(band, [e for e in self.examples if e.band == band]) for band in order]
        return [(band, examples) for band, examples in found if examples]

    def edge(self, bin: int) -> float:
        """The activation's size at which a bin of the histogram begins."""
        return self.manifest.scale * 2.0 ** ((bin - len(self.record.histogram)) / BINS_AN_OCTAVE)

    def filled(self) -> tuple[int, int]:
        """The first bin of the histogram that holds something, and the one after the last; equal where none does."""
        held = [i for i, count in enumerate(self.record.histogram) if count]
        return (held[0], held[-1] + 1) if held else (0, 0)

    def to_json(self) -> dict[str, Any]:
        """As in docs/json.md."""
        record = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self.record).items()}
        told = {
            "sae": self.manifest.sae,
            "site": self.manifest.site,
            "model": self.manifest.model,
            "tokens": self.manifest.tokens,
            "name": self.name,
            "explanations": list(self.explanations),
        }
        return {
            "feature": self.feature,
            **told,
            **record,
            "rates": list(self.rates),
            "agreed": None if self.agreed is None else list(self.agreed),
            "near": [_told(n, "cosine") for n in self.near],
            "together": [_told(n, "share") for n in self.together],
            "examples": [vars(e) | {"tokens": list(e.tokens), "strengths": list(e.strengths)} for e in self.examples],
        }


def _told(neighbour: Neighbour, amount: str) -> dict[str, Any]:
    out: dict[str, Any] = {"feature": neighbour.feature, "name": neighbour.name, "fires": list(neighbour.fires)}
    out[amount] = neighbour.amount
    return out | ({} if neighbour.error is None else {"error": neighbour.error})


def cards(atlas: Atlas, features: Sequence[int], many: int = MANY, few: int = FEW) -> list[Card]:
    """The cards of several features, in the order asked for.

    Args:
        many, few: how many examples of the strongest band, and of each other.

    Raises:
        UsageError: there is no such feature; DamagedError: the files are damaged.
    """
    records = atlas.records(features)
    beside = sorted({other for record in records for other in (*record.near, *record.together)})
    rows = {r.feature: r for r in atlas.records(beside)} if beside else {}
    examples = atlas.examples_of(list(dict.fromkeys(features)))
    names: dict[int, list[str]] = {}
    for name, feature in atlas.names.items():
        names.setdefault(feature, []).append(name)

    def neighbour(other: int, amount: float, of: int | None) -> Neighbour:
        error = None if of is None else share_error(amount, of)
        return Neighbour(other, ", ".join(names.get(other, [])), rows[other].fires_tokens[:3], amount, error)

    return [
        Card(
            manifest=atlas.manifest,
            record=record,
            name=", ".join(names.get(record.feature, [])),
            explanations=explanations(atlas.manifest.key, record.feature),
            agreed=agreed(record),
            near=tuple(neighbour(o, c, None) for o, c in zip(record.near, record.near_cosines, strict=True)),
            together=tuple(
                neighbour(o, share, record.together_fired)
                for o, share in zip(record.together, record.together_shares, strict=True)
            ),
            examples=tuple(shown(examples[record.feature], many, few)),
        )
        for record in records
    ]


def shown(examples: Iterable[Example], many: int, few: int) -> Iterator[Example]:
    """The first `many` of the strongest band and `few` of each other, those that are all but the same as one before
    them last: a corpus of letters or logs has the same line in many forms."""
    for band, group in groupby(examples, key=lambda e: e.band):
        rest, kept = [], []
        for example in group:
            words = set(terms.terms(example.text))
            alike = any(len(words & other) > ALIKE * len(words | other) for other in kept)
            if alike:
                rest.append(example)
            else:
                kept.append(words)
                if len(kept) <= (few if band else many):
                    yield example
        yield from rest[: max(0, (few if band else many) - len(kept))]


def share_error(share: float, of: int) -> float:
    """The standard error of a share of `of` firings."""
    share = min(1.0, max(0.0, share))
    return math.sqrt(share * (1 - share) / of) if of > 0 else math.nan


def agreed(record: Record) -> tuple[str, ...] | None:
    """Words that both lenses say a feature makes likelier, None where one of them was not run."""
    if not record.effect_up or not record.logit_up:
        return None
    by_logit = {token.strip().casefold() for token in record.logit_up}
    both = [token.strip() for token in record.effect_up if token.strip().casefold() in by_logit]
    return tuple({token.casefold(): token for token in both if token}.values())


def explanations(key: str, feature: int) -> tuple[dict[str, Any], ...]:
    """What is kept of one feature's descriptions: {"text", "source", "score"}."""
    return tuple(
        {"text": e.text, "source": e.source, "score": e.score} for e in kept_of.of(key, [feature]).get(feature, ())
    )
