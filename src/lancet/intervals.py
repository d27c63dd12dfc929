"""How far a measured rate or mean can be trusted, and one number for several qualities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
DRAWS = 2000
FEW = 4  # groups below which a draw of whole groups says nothing


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its 95 % interval; NaN throughout where nothing was measured."""

    value: float
    low: float
    high: float

    def to_json(self) -> list[float | None]:
        """[value, low, high]; null where nothing was measured."""
        return [None if math.isnan(v) else round(v, 4) for v in (self.value, self.low, self.high)]

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def rate(hits: int, of: int) -> Interval:
    """A share with Wilson's score interval.

    Args:
        hits: how many; of: out of how many.
    """
    from scipy.stats import norm

    if not of:
        return Interval(math.nan, math.nan, math.nan)
    z = float(norm.ppf((1 + LEVEL) / 2))
    p, square = hits / of, z * z / of
    middle = (p + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(p * (1 - p) / of + square / of / 4)
    # At 0 and at 1 an end lies on the share itself; rounding must not put it on the wrong side.
    return Interval(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def mean(values: Sequence[float], groups: Sequence[int] | None = None, seed: int = 0) -> Interval:
    """A mean with its bootstrap percentile interval (2,000 draws); NaN values are left out.

    Args:
        values: one a text.
        groups: which texts belong together (one prompt's): whole groups are drawn, since texts of one prompt are
            alike; each text by itself where None, or where there are too few groups to draw from.
        seed: of the draws.
    """
    import numpy as np

    given = np.asarray(values, dtype=float)
    labels = np.arange(len(given)) if groups is None else np.asarray(groups)
    fine = ~np.isnan(given)
    given, labels = given[fine], labels[fine]
    if not len(given):
        return Interval(math.nan, math.nan, math.nan)
    if len(np.unique(labels)) < FEW:
        labels = np.arange(len(given))
    _, which = np.unique(labels, return_inverse=True)
    sums, counts = np.bincount(which, given), np.bincount(which)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(given.mean()), float(low), float(high))


def harmonic(values: Sequence[float]) -> float:
    """The harmonic mean of numbers from 0 on; 0 where one of them is 0."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)
