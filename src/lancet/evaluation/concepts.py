"""SAEs against the concept bench: is there a feature for each concept, is it one, and does it fire wherever it should?

Every choice (the feature, the coordinate, thresholds, the ridge) is made on training lines and scored on held-out ones;
what the best choice on the held-out lines themselves would have been stands beside it, and flatters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lancet import bench
from lancet.evaluation import probe
from lancet.evaluation.lines import Lines
from lancet.scoring import auroc, auroc_of_ranks, best_threshold, f1, ranks

if TYPE_CHECKING:
    from lancet.sae import Sae
    from lancet.site import Site

GOOD = 0.9  # AUROC from which a feature counts as a detector
GAIN, MOST = 0.03, 10  # F1 that another feature must add to a sparse probe; features of one (SAEBench's numbers)
ALIGNED = 0.1  # cosine to the probe's direction from which a feature may absorb (SAEBench's number)
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Detector:
    """How well one thing tells a concept's held-out lines from all others.

    Attributes:
        auroc: on held-out lines.
        f1: there, with the threshold of the best F1 on training lines.
        train: AUROC on training lines; for a probe of lines that it was not fitted to.
        index: the feature, or the coordinate; None for a probe.
        sign: -1 where low values of a coordinate speak for the concept.
    """

    auroc: float
    f1: float
    train: float
    index: int | None = None
    sign: int = 1

    def to_json(self) -> dict[str, Any]:
        """Its attributes; `index` and `sign` where they mean something."""
        out: dict[str, Any] = {"auroc": self.auroc, "f1": self.f1, "train": self.train}
        out |= {} if self.index is None else {"index": self.index}
        return out | ({"sign": self.sign} if self.sign < 0 else {})


@dataclass(frozen=True)
class Concept:
    """One concept of the bench.

    Attributes:
        name: of the concept.
        feature: the feature of the highest AUROC on training lines.
        best: (feature, AUROC) of the highest AUROC on held-out lines.
        coordinate: the best single coordinate of the values, of either sign, chosen on training lines.
        probe: a linear probe on the lines' mean values.
        detectors: how many features have an AUROC of 0.9 or more on training and on held-out lines both.
        split: the features of the sparse probe, the main one first; see `_sparse`.
        sparse_f1: that probe's F1 on held-out lines.
        absorbed: see `_absorbed`; None where that cannot be told.
    """

    name: str
    feature: Detector
    best: tuple[int, float]
    coordinate: Detector
    probe: Detector
    detectors: int
    split: tuple[int, ...]
    sparse_f1: float
    absorbed: float | None

    def to_json(self) -> dict[str, Any]:
        """Its attributes."""
        return {
            "concept": self.name,
            "feature": self.feature.to_json(),
            "best": {"feature": self.best[0], "auroc": self.best[1]},
            "coordinate": self.coordinate.to_json(),
            "probe": self.probe.to_json(),
            "detectors": self.detectors,
            "split": list(self.split),
            "sparse_f1": self.sparse_f1,
            "absorbed": self.absorbed,
        }


@dataclass(frozen=True)
class Bench:
    """All concepts.

    Attributes:
        concepts: one for each.
        lines: (training, held-out) lines of all concepts.
    """

    concepts: tuple[Concept, ...]
    lines: tuple[int, int]

    @cached_property
    def shared(self) -> dict[int, list[str]]:
        """Feature -> the concepts whose feature it is, of those that several share."""
        count = Counter(concept.feature.index for concept in self.concepts)
        return {
            index: [c.name for c in self.concepts if c.feature.index == index]
            for index, times in count.items()
            if times > 1 and index is not None
        }

    def figures(self) -> dict[str, Any]:
        """Means over concepts, and counts of concepts; `absorbed` is null where no concept's can be told."""
        told = self.concepts

        def mean(values: Sequence[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return float(np.mean(known)) if known else None

        return {
            "auroc": mean([c.feature.auroc for c in told]),
            "auroc_at_least_0.9": sum(c.feature.auroc >= GOOD for c in told),
            "f1": mean([c.feature.f1 for c in told]),
            "auroc_best": mean([c.best[1] for c in told]),
            "auroc_best_at_least_0.9": sum(c.best[1] >= GOOD for c in told),
            "auroc_coordinate": mean([c.coordinate.auroc for c in told]),
            "f1_coordinate": mean([c.coordinate.f1 for c in told]),
            "auroc_probe": mean([c.probe.auroc for c in told]),
            "f1_probe": mean([c.probe.f1 for c in told]),
            "detectors": mean([c.detectors for c in told]),
            "split": mean([len(c.split) for c in told]),
            "f1_sparse": mean([c.sparse_f1 for c in told]),
            "sharing": sum(map(len, self.shared.values())),
            "absorbed": mean([c.absorbed for c in told]),
        }

    def to_json(self) -> dict[str, Any]:
        """`figures`, and with them the shared features and every concept."""
        shared = [{"feature": feature, "concepts": names} for feature, names in self.shared.items()]
        train, heldout = self.lines
        each = [concept.to_json() for concept in self.concepts]
        return {"lines": {"train": train, "heldout": heldout}} | self.figures() | {"shared": shared, "concepts": each}


@dataclass(frozen=True)
class Beside:
    """What needs no SAE, at one site, for every concept: the probe and the best coordinate.

    Attributes:
        probes: of all concepts, in the bench's order; bars: [m] the threshold of each.
        probe, coordinate: how well they do.
    """

    probes: probe.Probes
    bars: list[float]
    probe: list[Detector]
    coordinate: list[Detector]


def beside(site: Site, train: Lines, heldout: Lines) -> Beside:
    """Probes and single coordinates at a site."""
    names = list(bench.concepts())
    probes = probe.fit(train.mean[site], np.stack([train.labels == name for name in names], 1))
    scores = probes.scores(heldout.mean[site])
    both = [ranks(lines.extreme[site]) for lines in (train, heldout)]
    bars, probed, coordinates = [], [], []
    for i, name in enumerate(names):
        mine, theirs = train.labels == name, heldout.labels == name
        bars.append(best_threshold(probes.left_out[:, i], mine))
        areas = [float(auroc(s[:, i : i + 1], of)[0]) for s, of in ((scores, theirs), (probes.left_out, mine))]
        probed.append(Detector(areas[0], f1(scores[:, i], theirs, bars[-1]), areas[1]))
        on_train, on_heldout = auroc_of_ranks(both[0], mine), auroc_of_ranks(both[1], theirs)
        best, width = int(on_train.argmax()), train.mean[site].shape[1]
        bar = best_threshold(train.extreme[site][:, best], mine)
        reached = f1(heldout.extreme[site][:, best], theirs, bar)
        area, told = float(on_heldout[best]), float(on_train[best])
        coordinates.append(Detector(area, reached, told, best % width, -1 if best >= width else 1))
    return Beside(probes, bars, probed, coordinates)


def score(sae: Sae, which: int, train: Lines, heldout: Lines, known: Beside) -> Bench:
    """One SAE against the bench.

    Args:
        which: its place among the SAEs that the lines were read with.
        known: `beside` of its site.
    """
    own, theirs = train.strongest[which], heldout.strongest[which]
    firing = np.flatnonzero(np.diff(own.indptr) + np.diff(theirs.indptr))  # a silent feature's AUROC is one half
    if not len(firing):
        firing = np.arange(1)
    names = list(bench.concepts())
    areas = [_areas(lines.strongest[which][:, firing], lines.labels, names) for lines in (train, heldout)]
    told = []
    for i, name in enumerate(names):
        on_train, on_heldout = areas[0][i], areas[1][i]
        best, chosen = int(on_heldout.argmax()), int(on_train.argmax())
        main = int(firing[chosen])
        marks = train.labels == name, heldout.labels == name
        columns = [lines.strongest[which][:, [main]].toarray()[:, 0] for lines in (train, heldout)]
        reached = f1(columns[1], marks[1], best_threshold(columns[0], marks[0]))
        split, sparse = _sparse(own, theirs, *marks, main)
        told.append(
            Concept(
                name=name,
                feature=Detector(float(on_heldout[chosen]), reached, float(on_train[chosen]), main),
                best=(int(firing[best]), float(on_heldout[best])),
                coordinate=known.coordinate[i],
                probe=known.probe[i],
                detectors=int(((on_train >= GOOD) & (on_heldout >= GOOD)).sum()),
                split=split,
                sparse_f1=sparse,
                absorbed=_absorbed(sae, which, heldout, marks[1], known, i, split),
            )
        )
    return Bench(tuple(told), (len(train.labels), len(heldout.labels)))


def _areas(columns: Any, labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """[concepts, m] AUROC of sparse columns [n, m]."""
    n, m = columns.shape
    step = max(1, BLOCK_BYTES // (8 * n))
    out = np.empty((len(names), m))
    for first in range(0, m, step):
        ranked = ranks(columns[:, first : first + step].toarray())
        for i, name in enumerate(names):
            out[i, first : first + step] = auroc_of_ranks(ranked, labels == name)
    return out


def _sparse(own: Any, theirs: Any, mine: np.ndarray, held: np.ndarray, main: int) -> tuple[tuple[int, ...], float]:
    """The features that a concept is split over, and the F1 of them all on held-out lines.

    As in SAEBench (arXiv 2503.09532, after arXiv 2409.14507): a probe on a single feature, on two, on three and so on,
    as long as another raises its F1 on held-out lines by more than 0.03; so many features the concept is split into.
    Here the probe is least squares on the lines' strongest activations, the first feature is the main one, and the next
    is the one that goes best with what is left over on training lines (orthogonal matching pursuit), of those that fire
    on at least two of the concept's training lines; SAEBench ranks features by an L1 probe's weights.
    """
    often = np.diff(own[mine].indptr) >= 2
    often[main] = True
    candidates = np.flatnonzero(often)
    dense = own[:, candidates].toarray().astype(np.float64)
    centred = dense - dense.mean(0)
    lengths = np.maximum(np.linalg.norm(centred, axis=0), 1e-12)
    chosen, label = [int(np.searchsorted(candidates, main))], mine.astype(np.float64)
    reached: list[float] = []
    while True:
        columns = candidates[chosen]
        ones = [np.ones((lines.shape[0], 1)) for lines in (own, theirs)]
        here, there = (
            np.hstack([one, lines[:, columns].toarray()]) for one, lines in zip(ones, (own, theirs), strict=True)
        )
        weights = np.linalg.lstsq(here, label, rcond=None)[0]
        bar = best_threshold(here @ weights, mine)
        reached.append(f1(there @ weights, held, bar))
        if len(reached) > 1 and reached[-1] - reached[-2] <= GAIN:
            chosen.pop()
            reached.pop()
            break
        if len(chosen) == min(MOST, len(candidates)):
            break
        # With their signs: a feature that speaks against the concept is no part of it.
        fits = centred.T @ (label - here @ weights) / lengths
        fits[chosen] = -np.inf
        chosen.append(int(fits.argmax()))
    return tuple(int(candidates[i]) for i in chosen), reached[-1]


def _absorbed(
    sae: Sae, which: int, heldout: Lines, positive: np.ndarray, known: Beside, label: int, split: Sequence[int]
) -> float | None:
    """Share of a concept's held-out lines on which another feature speaks for its own: those of `_sparse` are all
    silent, and the feature that writes most along the probe's direction (mean over the line's tokens) has a decoder row
    with a cosine of 0.1 or more to it.

    After SAEBench (arXiv 2503.09532; absorption is from arXiv 2409.14507), on lines instead of single words, and on
    those alone that the probe recognises. SAEBench also asks that the absorbing features make 0.4 of the projection:
    that is for one token; over all tokens of a line features seldom make so much. None where the probe recognises
    no line, and for a transcoder, which writes elsewhere than the probe reads.
    """
    import torch

    if sae.kind.transcoder:
        return None
    scores = known.probes.scores(heldout.mean[sae.site][positive])[:, label]
    seen = np.flatnonzero(positive)[scores >= known.bars[label]]
    if not len(seen):
        return None
    lines = heldout.strongest[which][seen][:, list(split)]
    silent = seen[np.asarray(abs(lines).sum(1)).ravel() == 0]
    way = known.probes.ways[:, label]
    unit = torch.tensor(way / max(1e-30, float(np.linalg.norm(way))), dtype=torch.float32, device=sae.device)
    count = 0
    written = heldout.written[which].tocsr()
    for line in silent:
        begin, end = written.indptr[line], written.indptr[line + 1]
        rows = sae.rows(torch.from_numpy(written.indices[begin:end].astype(np.int64)).to(sae.device))
        along = (rows @ unit).cpu().numpy()
        lengths = rows.norm(dim=1).clamp_min(1e-30).cpu().numpy()
        made = written.data[begin:end] * along
        top = int(made.argmax()) if len(made) else 0
        count += bool(len(made) and made[top] > 0 and along[top] / lengths[top] >= ALIGNED)
    return count / len(seen)
