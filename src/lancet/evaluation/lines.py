"""The concept bench's lines, read once for several SAEs: what each line reaches, of features and of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lancet import bench, passes
from lancet.atlas.statistics import check_finite

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.sae import Sae
    from lancet.site import Site

PER_CONCEPT = 12
SEED = 11  # of the held-out lines; the training lines take the next
TOKENS = 128  # of a line, the start token counted


@dataclass(frozen=True)
class Lines:
    """Labelled lines and what they reach.

    Attributes:
        labels: [n] each line's concept.
        mean, extreme: site -> [n, d] mean value over the line's tokens; [n, 2 d] the maxima of the coordinates and of
            their negatives. Start tokens are left out everywhere.
        strongest, written: for each SAE, scipy CSC [n, d_sae]: the size of the strongest activation in a line; the mean
            over its tokens of activation times the SAE's scale there, with its sign.
    """

    labels: np.ndarray
    mean: dict[Site, np.ndarray]
    extreme: dict[Site, np.ndarray]
    strongest: list[Any]
    written: list[Any]


def labelled(part: bench.Part) -> tuple[list[str], np.ndarray]:
    """The lines of one part of the bench, PER_CONCEPT for each concept, and their concepts."""
    found = list(bench.sentences(part, PER_CONCEPT, SEED + (part == "train")))
    return [text for _, text in found], np.array([name for name, _ in found])


@torch.no_grad()
def read(model: Model, saes: Sequence[Sae], texts: Sequence[str], labels: np.ndarray) -> Lines:
    """Passes labelled lines through the model, once for all SAEs.

    Raises:
        LancetError: an activation is not finite, and nothing could be ranked.
    """
    rows = [model.tokenize(text, most=min(model.context, TOKENS)) for text in texts]
    sites = sorted({sae.site for sae in saes})
    width = {site: model.d_site(site) for site in sites}
    mean = {site: np.zeros((len(rows), width[site]), np.float32) for site in sites}
    extreme = {site: np.zeros((len(rows), 2 * width[site]), np.float32) for site in sites}
    entries: list[list[tuple[np.ndarray, ...]]] = [[] for _ in saes]
    for which in passes.alike(rows):
        batch = model.batch([rows[i] for i in which])
        values, inside = model.values(batch, sites), batch.content[..., None]
        for site in sites:
            x = values[site].float()
            lowest = torch.finfo(torch.float32).min
            both = [side.masked_fill(~inside, lowest).amax(1) for side in (x, -x)]
            extreme[site][which] = torch.cat(both, 1).cpu().numpy()
            mean[site][which] = ((x * inside).sum(1) / inside.sum(1).clamp_min(1)).cpu().numpy()
        for sae, found in zip(saes, entries, strict=True):
            found.append(_pooled(sae, values[sae.site], batch.content, which))
    for found in entries:
        for *_, strongest, _ in found:
            check_finite(strongest)
    pooled = [_matrices(found, (len(rows), sae.d_sae)) for found, sae in zip(entries, saes, strict=True)]
    return Lines(labels, mean, extreme, [high for high, _ in pooled], [written for _, written in pooled])


def _pooled(sae: Sae, x: Tensor, keep: Tensor, which: Sequence[int]) -> tuple[np.ndarray, ...]:
    """(line, feature, strongest, written) of each feature that fires in a line."""
    lines = torch.tensor(which, device=x.device)[keep.nonzero()[:, 0]]  # of each token that is read
    lengths = keep.sum(1).float()[keep.nonzero()[:, 0]]
    scale = sae.scale(x[keep].float())[:, 0]
    parts, first = [], 0
    for features in sae.features_of(x, keep):
        token = features.token + first
        parts.append((lines[token] * sae.d_sae + features.feature, features.value, (scale / lengths)[token]))
        first += features.shape[0]
    key, value, weight = (torch.cat(part) for part in zip(*parts, strict=True))
    key, inverse = key.unique(return_inverse=True)
    strongest = torch.zeros(len(key), device=x.device).scatter_reduce_(0, inverse, value.abs(), "amax")
    written = torch.zeros(len(key), device=x.device).index_add_(0, inverse, value * weight)
    return tuple(part.cpu().numpy() for part in (key // sae.d_sae, key % sae.d_sae, strongest, written))


def _matrices(entries: Sequence[tuple[np.ndarray, ...]], shape: tuple[int, int]) -> tuple[Any, Any]:
    from scipy.sparse import csc_matrix

    line, feature, strongest, written = (np.concatenate(part) for part in zip(*entries, strict=True))
    return csc_matrix((strongest, (line, feature)), shape), csc_matrix((written, (line, feature)), shape)
