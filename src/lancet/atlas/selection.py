"""Which peaks are kept as examples: the strongest of each feature, and a fair draw from each bin of its histogram.

A peak is a feature's strongest token in a piece. Both choices are the first few of a total order, which merge exactly:
what is among the first of the whole is among the first of every part that holds it. A hash that depends on the text
alone makes the order the same whatever order the corpus is read in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

STRONGEST = 20  # peaks of band 0, at most one of a document
DRAWN = 5  # peaks of lowest hash for each bin
BEFORE, AFTER = 16, 15  # tokens of a window around its peak
WINDOW = BEFORE + 1 + AFTER
WAITING = 1 << 16  # peaks that wait at least, before they are merged into those that are kept

Array = np.ndarray[Any, np.dtype[Any]]

# `piece` is the piece's number in the preparation, `peak` its token (0 is the first that is counted); `strengths` are
# those of the window's tokens, the peak's own at BEFORE, zero where the piece has no token.
PEAK = np.dtype(
    [
        ("feature", "<i4"),
        ("bin", "u1"),
        ("value", "<f4"),
        ("hash", "<u8"),
        ("document", "<u8"),
        ("piece", "<i4"),
        ("peak", "<i2"),
        ("strengths", "u1", (WINDOW,)),
    ]
)


def begins(*columns: Array) -> Array:
    """[n] True where a run of rows that are equal in all (sorted) columns begins."""
    out = np.zeros(len(columns[0]), dtype=bool)
    if len(out):
        out[0] = True
        for column in columns:
            out[1:] |= column[1:] != column[:-1]
    return out


def ranks(new: Array) -> Array:
    """[n] each row's place in its run, from 0; `new` is what `begins` returns."""
    at = np.arange(len(new))
    return at - np.maximum.accumulate(np.where(new, at, 0)) if len(new) else at


def strongest(peaks: Array, count: int = STRONGEST) -> Array:
    """The `count` strongest peaks of each feature, at most one of a document, ties by hash; by feature, then rank."""
    size = -np.abs(peaks["value"])
    peaks = peaks[np.lexsort((peaks["hash"], size, peaks["document"], peaks["feature"]))]
    peaks = peaks[begins(peaks["feature"], peaks["document"])]
    peaks = peaks[np.lexsort((peaks["hash"], -np.abs(peaks["value"]), peaks["feature"]))]
    return peaks[ranks(begins(peaks["feature"])) < count]


def drawn(peaks: Array, count: int = DRAWN) -> Array:
    """The `count` peaks of lowest hash in each bin of each feature; by feature, bin, then hash."""
    peaks = peaks[np.lexsort((peaks["hash"], peaks["bin"], peaks["feature"]))]
    return peaks[ranks(begins(peaks["feature"], peaks["bin"])) < count]


@dataclass
class Peaks:
    """The kept peaks of all features, and those that wait to be merged into them.

    Attributes:
        d_sae, bins: of the SAE and its histogram.
        top, low: the chosen peaks as `strongest` and `drawn` return them.
        floor: [d_sae] a weaker peak cannot be among the strongest any more.
        ceiling: [d_sae * bins] a peak of higher hash cannot be among the drawn any more.
    """

    d_sae: int
    bins: int

    def __post_init__(self) -> None:
        self.top = self.low = np.empty(0, PEAK)
        self.floor = np.zeros(self.d_sae, np.float32)
        self.ceiling = np.full(self.d_sae * self.bins, ~np.uint64(0))
        self._waiting: dict[str, list[Array]] = {"top": [], "low": []}

    def wanted(self, feature: Array, size: Array, bin_: Array, hash_: Array) -> tuple[Array, Array]:
        """Which peaks may be among the strongest, and which among the drawn."""
        return size >= self.floor[feature], hash_ <= self.ceiling[feature.astype(np.int64) * self.bins + bin_]

    def add(self, top: Array, low: Array) -> None:
        """Takes peaks in (PEAK)."""
        for name, more in (("top", top), ("low", low)):
            self._waiting[name].append(more)
            kept = len(getattr(self, name))
            if sum(map(len, self._waiting[name])) > max(WAITING, kept // 2):
                self._settle(name)

    def settle(self) -> None:
        """Merges what waits."""
        for name in self._waiting:
            self._settle(name)

    def merge(self, other: Peaks) -> None:
        """Takes all of another's peaks in."""
        other.settle()
        self.add(other.top, other.low)

    def _settle(self, name: str) -> None:
        if not self._waiting[name]:
            return
        every = np.concatenate([getattr(self, name), *self._waiting[name]])
        self._waiting[name] = []
        if name == "top":
            self.top = strongest(every)
            last = self.top[STRONGEST - 1 :][_full(begins(self.top["feature"]), STRONGEST)]
            self.floor[last["feature"]] = np.abs(last["value"])
        else:
            self.low = drawn(every)
            last = self.low[DRAWN - 1 :][_full(begins(self.low["feature"], self.low["bin"]), DRAWN)]
            self.ceiling[last["feature"].astype(np.int64) * self.bins + last["bin"]] = last["hash"]


def _full(new: Array, count: int) -> Array:
    """[n - count + 1] whether the row `count - 1` further is the last of a run of so many."""
    return ranks(new)[count - 1 :] == count - 1
