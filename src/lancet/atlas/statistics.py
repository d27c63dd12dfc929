"""All that is counted about the features of one SAE: a value that parts of a corpus add up to, in any order, exactly.

Counts and sums are integers, extremes are extremes, examples are the first of a total order (selection.py), and what
would grow with the corpus is sampled by the text's own hash (sketch.py). A shard's statistics are computed from all its
activations at once; nothing here loops over features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lancet.atlas.selection import AFTER, BEFORE, PEAK, WINDOW, Array, Peaks, begins
from lancet.atlas.sketch import DENSE, AllPairs, SomePairs, TokenMass, levels, mixed
from lancet.errors import DamagedError, LancetError
from lancet.files import check_safetensors, whole_file

BINS, PLACES = 50, 10
UNIT = 1 << 20  # of an activation's sum
QUARTERS = tuple(int(np.float32(2 ** (i / 4)).view(np.int32)) & (1 << 23) - 1 for i in (1, 2, 3))  # mantissa bits


@dataclass(frozen=True, eq=False)
class Layout:
    """The counted tokens of a shard, piece after piece.

    Attributes:
        piece: [tokens] which piece of the shard each is of; position: [tokens] in it, from 1; ids: [tokens].
        hash, document: [pieces] uint64; number: [pieces] int32, in the whole preparation.
    """

    piece: Array
    position: Array
    ids: Array
    hash: Array
    document: Array
    number: Array

    @cached_property
    def uid(self) -> Array:
        """[tokens] uint64, of piece and position."""
        return mixed(self.hash[self.piece], self.position)

    @cached_property
    def place(self) -> Array:
        """[tokens] the bin of the position: 1, 2-3, 4-7, ... 512 and beyond."""
        return np.minimum(np.frexp(self.position.astype(np.float64))[1] - 1, PLACES - 1)


@dataclass(frozen=True, eq=False)
class Active:
    """What fires in a shard, sorted by feature, then by token.

    Attributes:
        feature, token: [nnz] int32; value: [nnz] float32.
        by_token, by_feature: the same firings as CSR matrices of ones, [tokens, d_sae] and [d_sae, tokens].
        layout: the shard's tokens.
    """

    feature: Array
    token: Array
    value: Array
    by_token: Any
    by_feature: Any
    layout: Layout

    @classmethod
    def of(cls, token: Array, feature: Array, value: Array, d_sae: int, layout: Layout) -> Active:
        """From entries in any order.

        Raises:
            LancetError: a value is not finite.
        """
        from scipy.sparse import coo_matrix, csr_matrix

        check_finite(value)
        tokens = len(layout.piece)
        rows = coo_matrix((value, (token, feature)), (tokens, d_sae)).tocsr()  # two counting sorts, each stable
        columns = rows.tocsc()
        ones = np.ones(len(value), np.int32)
        return cls(
            np.repeat(np.arange(d_sae, dtype=np.int32), np.diff(columns.indptr)),
            columns.indices,
            columns.data,
            csr_matrix((ones, rows.indices, rows.indptr), (tokens, d_sae)),
            csr_matrix((ones, columns.indices, columns.indptr), (d_sae, tokens)),
            layout,
        )


def check_finite(value: Array) -> None:
    """Raises LancetError where an activation is not finite."""
    if not np.isfinite(value).all():
        raise LancetError(
            "the SAE's activations are not finite on this corpus; open the model with --dtype float32, or run "
            "`lancet check`"
        )


def bins(size: Array, octave: int) -> Array:
    """[n] uint8 the quarter octave of activations' sizes, read off their bits.

    Args:
        octave: the scale's logarithm to base 2; bin i begins at `2 ** octave * 2 ** ((i - BINS) / 4)`.
    """
    bits = size.view(np.int32)
    mantissa = bits & (1 << 23) - 1
    index = ((bits >> 23) - (127 + octave)) * 4 + BINS
    for quarter in QUARTERS:
        index += mantissa >= quarter
    return index.clip(0, BINS - 1).astype(np.uint8)


class Statistics:
    """The statistics of one SAE over some shards.

    Args:
        d_sae: how many features it has.
        octave: of the histogram, see `bins`.

    Attributes:
        fired, total: [d_sae] int64; total in units of 1 / UNIT.
        maximum, minimum: [d_sae] float32, 0 where it never fired.
        histogram: [d_sae, BINS], positions: [d_sae, PLACES] int64.
        places: [PLACES] int64 tokens at each position; pieces: how many.
        peaks, fires, pairs: see selection.py and sketch.py.
    """

    def __init__(self, d_sae: int, octave: int) -> None:
        self.d_sae, self.octave = d_sae, octave
        self.fired, self.total = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.int64)
        self.maximum, self.minimum = np.zeros(d_sae, np.float32), np.zeros(d_sae, np.float32)
        self.histogram = np.zeros((d_sae, BINS), np.int64)
        self.positions = np.zeros((d_sae, PLACES), np.int64)
        self.places, self.pieces = np.zeros(PLACES, np.int64), 0
        self.peaks = Peaks(d_sae, BINS)
        self.fires = TokenMass(d_sae)
        self.pairs: AllPairs | SomePairs = AllPairs(d_sae) if d_sae <= DENSE else SomePairs(d_sae)

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return int(self.places.sum())

    def add(self, active: Active) -> None:
        """Takes a shard in; each shard once."""
        layout, feature, token, value = active.layout, active.feature, active.token, active.value
        self.places += np.bincount(layout.place, minlength=PLACES)
        self.pieces += len(layout.hash)
        if not len(value):
            return
        size = np.abs(value)
        fixed = np.rint(value.astype(np.float64) * UNIT).astype(np.int64)
        bin_ = bins(size, self.octave)
        starts = np.flatnonzero(begins(feature))
        seen = feature[starts]
        before = self.fired[seen] > 0
        for extreme, own in ((np.maximum, self.maximum), (np.minimum, self.minimum)):
            found = extreme.reduceat(value, starts)
            own[seen] = np.where(before, extreme(own[seen], found), found)
        self.fired[seen] += np.diff(np.r_[starts, len(feature)])
        self.total[seen] += np.add.reduceat(fixed, starts)
        wide = feature.astype(np.int64)
        np.add.at(self.histogram.reshape(-1), wide * BINS + bin_, 1)
        np.add.at(self.positions.reshape(-1), wide * PLACES + layout.place[token], 1)
        self.fires.add(feature, layout.ids[token], levels(layout.uid)[token], np.abs(fixed))
        self.pairs.add(active.by_token, active.by_feature, layout.uid)
        self._peaks(active, size, bin_)

    def _peaks(self, active: Active, size: Array, bin_: Array) -> None:
        layout, feature = active.layout, active.feature
        piece = layout.piece[active.token]
        new = begins(feature, piece)
        starts = np.flatnonzero(new)
        strongest = np.maximum.reduceat(size, starts)
        at = np.flatnonzero(size == np.repeat(strongest, np.diff(np.r_[starts, len(size)])))
        run = np.searchsorted(starts, at, side="right")
        at = at[begins(run)]  # the first of equals
        top, low = self.peaks.wanted(feature[at], size[at], bin_[at], layout.hash[piece[at]])
        either = top | low
        at, top, low = at[either], top[either], low[either]
        own = piece[at]
        peaks = np.empty(len(at), PEAK)
        peaks["feature"], peaks["bin"], peaks["value"] = feature[at], bin_[at], active.value[at]
        peaks["hash"], peaks["document"], peaks["piece"] = layout.hash[own], layout.document[own], layout.number[own]
        peaks["peak"] = layout.position[active.token[at]] - 1
        peaks["strengths"] = _strengths(active, at, piece)
        self.peaks.add(peaks[top], peaks[low])

    def merge(self, other: Statistics) -> None:
        """Takes in the statistics of other shards."""
        mine, theirs = self.fired > 0, other.fired > 0
        for name, extreme in (("maximum", np.maximum), ("minimum", np.minimum)):
            a, b = getattr(self, name), getattr(other, name)
            setattr(self, name, np.where(mine & theirs, extreme(a, b), np.where(theirs, b, a)))
        for name in ("fired", "total", "histogram", "positions", "places", "pieces"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("peaks", "fires", "pairs"):
            getattr(self, name).merge(getattr(other, name))

    def settle(self) -> None:
        """Merges what waits to be merged."""
        for part in (self.peaks, self.fires, self.pairs):
            part.settle()

    # ---- files -------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, Array]:
        """All of it as arrays, the same whatever order the shards came in."""
        self.settle()
        names = ("fired", "total", "maximum", "minimum", "histogram", "positions", "places")
        found: dict[str, Array] = {name: getattr(self, name) for name in names}
        found["pieces"] = np.array([self.pieces])
        found["top"], found["low"] = (_bytes(part) for part in (self.peaks.top, self.peaks.low))
        found |= {f"fires.{name}": getattr(self.fires, name) for name in ("key", "mass", "floor")}
        pairs = ("count",) if isinstance(self.pairs, AllPairs) else ("uid", "size", "feature", "floor")
        return found | {f"pairs.{name}": getattr(self.pairs, name) for name in pairs}

    def save(self, path: Path, **told: Any) -> None:
        """Writes one safetensors file, whole or not at all; `told` is returned by `load`."""
        from safetensors.numpy import save_file

        metadata = {"statistics": json.dumps({"d_sae": self.d_sae, "octave": self.octave} | told)}
        with whole_file(path) as temporary:
            save_file(self.arrays(), temporary, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> tuple[Statistics, dict[str, Any]]:
        """What `save` wrote, and what was told.

        Raises:
            DamagedError: the file is not what was written.
        """
        from safetensors import safe_open

        check_safetensors(path)
        try:
            with safe_open(path, "np") as file:
                told = json.loads(file.metadata()["statistics"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return cls.of(found, told["d_sae"], told["octave"]), told
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{path} holds no statistics of a harvest ({error}); delete it") from error

    @classmethod
    def of(cls, found: dict[str, Array], d_sae: int, octave: int) -> Statistics:
        """From what `arrays` returned; the arrays are copied where they will be written to."""
        out = cls(d_sae, octave)
        for name in ("fired", "total", "maximum", "minimum", "histogram", "positions", "places"):
            setattr(out, name, found[name].copy())
        out.pieces = int(found["pieces"][0])
        out.peaks.add(*(found[name].reshape(-1).view(PEAK) for name in ("top", "low")))
        for prefix in ("fires", "pairs"):
            part = getattr(out, prefix)
            for name, value in found.items():
                if name.startswith(f"{prefix}."):
                    setattr(part, name.removeprefix(f"{prefix}."), value.copy())
        out.peaks.settle()
        return out


def _bytes(peaks: Array) -> Array:
    return peaks.view(np.uint8).reshape(len(peaks), PEAK.itemsize)


def _strengths(active: Active, at: Array, piece: Array) -> Array:
    """[peaks, WINDOW] uint8 the feature's strength around each peak, 255 the peak's own; the other sign counts as 0."""
    feature, token, value = active.feature, active.token, active.value
    out = np.zeros((len(at), WINDOW), np.uint8)
    out[:, BEFORE] = 255
    for step, most in ((-1, BEFORE), (1, AFTER)):
        peak, row, offset = at, np.arange(len(at)), 0
        while len(row):  # entry by entry away from the peaks; few stay on after the first steps
            offset += step
            entry = peak + offset
            inside = (entry >= 0) & (entry < len(token))
            entry = entry.clip(0, len(token) - 1)
            distance = token[entry] - token[peak]
            inside &= (feature[entry] == feature[peak]) & (piece[entry] == piece[peak]) & (np.abs(distance) <= most)
            peak, row, entry, distance = peak[inside], row[inside], entry[inside], distance[inside]
            share = (value[entry] / value[peak]).clip(0, 1)
            out[row, BEFORE + distance] = np.rint(share * 255).astype(np.uint8)
    return out
