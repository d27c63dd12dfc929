"""Which features belong together: those whose directions are nearest, and those that fire on the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lancet.atlas.selection import begins, ranks
from lancet.atlas.sketch import AllPairs
from lancet.atlas.statistics import Statistics

if TYPE_CHECKING:
    from lancet.sae import Sae

NEAR = 10  # features listed
TOGETHER = 10
COSINES = 64 << 20  # cosines held at once, 4 bytes each
COLUMNS = 16384  # decoder rows at once on the other side

Array = np.ndarray[Any, np.dtype[Any]]


def near(sae: Sae) -> Iterator[tuple[Array, Array]]:
    """The features whose decoder directions are nearest, by blocks: [n, NEAR] numbers and cosines, nearest first."""
    import torch

    columns = min(COLUMNS, sae.d_sae)
    block, count = max(1, COSINES // 4 // columns), min(NEAR, sae.d_sae - 1)
    with torch.no_grad():
        for first in range(0, sae.d_sae, block):
            rows = _unit(sae, first, min(first + block, sae.d_sae))
            own = torch.arange(first, first + len(rows), device=rows.device)
            best: tuple[Any, Any] | None = None
            for begin in range(0, sae.d_sae, columns):
                others = _unit(sae, begin, min(begin + columns, sae.d_sae))
                cosine = rows @ others.t()
                at = torch.arange(begin, begin + len(others), device=rows.device)
                cosine[own[:, None] == at] = -2
                values, index = cosine.topk(min(count, len(others)), dim=1)
                index = index + begin
                if best is not None:
                    values, index = torch.cat([best[0], values], 1), torch.cat([best[1], index], 1)
                    values, chosen = values.topk(min(count, values.shape[1]), dim=1)
                    index = index.gather(1, chosen)
                best = values, index
            assert best is not None
            yield best[1].int().cpu().numpy(), best[0].clamp(-1, 1).cpu().numpy()


def _unit(sae: Sae, first: int, last: int) -> Any:
    rows = sae.rows(slice(first, last)).float()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def together(statistics: Statistics, block: int = 1024) -> Iterator[tuple[Array, Array, Array, Array]]:
    """The features that fire on the same tokens most, block by block.

    Ordered by `n_ij / sqrt(n_i n_j)`. Where tokens were sampled, `n_ij` is the share of the feature's firings in its
    own sample, times all of its firings.

    Yields:
        (feature, other, share): [n] each, at most TOGETHER rows a feature, the first one first; and [features of the
        block] the firings that its shares rest on.
    """
    pairs, fired = statistics.pairs, statistics.fired.astype(np.float64)
    own, every = (None, None) if isinstance(pairs, AllPairs) else pairs.matrices()
    columns = own.tocsc() if own is not None else None
    for first in range(0, statistics.d_sae, block):
        last = min(first + block, statistics.d_sae)
        if columns is None:
            assert isinstance(pairs, AllPairs)
            part = pairs.count[first:last]
            row, other = np.nonzero(part)
            count = part[row, other].astype(np.int64)
            firings = statistics.fired[first:last]
        else:
            found = (columns[:, first:last].T.tocsr() @ every).tocoo()
            row, other, count = found.row, found.col, found.data.astype(np.int64)
            firings = np.diff(columns.indptr[first : last + 1]).astype(np.int64)
        feature = row.astype(np.int64) + first
        keep = feature != other
        row, other, count, feature = row[keep], other[keep], count[keep], feature[keep]
        share = count / firings[row]
        score = share * np.sqrt(fired[feature] / fired[other])
        order = np.lexsort((other, -score, feature))
        order = order[ranks(begins(feature[order])) < TOGETHER] if len(order) else order
        yield feature[order], other[order].astype(np.int32), share[order].astype(np.float32), firings
