"""How alike the rows of a decoder are: features that split one direction between them have near twins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lancet.sae import Sae

WORK = 2e12  # multiplications that all cosines may take; some seconds of a laptop
LEAST = 1024  # features that are compared with all others whatever it costs
BLOCK = 1024
NEAR, TWIN = 0.7, 0.9


@dataclass(frozen=True)
class Similarity:
    """The highest cosine of features' decoder rows to another row.

    Attributes:
        median: of the highest cosines.
        near, twin: share of features whose highest cosine is above 0.7, above 0.9.
        asked: of how many features, spread evenly over all; each is compared with every other.
    """

    median: float
    near: float
    twin: float
    asked: int


@torch.no_grad()
def similarity(sae: Sae) -> Similarity:
    """Compares decoder rows; a row of zeros is like nothing, with cosine 0."""
    count = sae.d_sae
    affordable = int(WORK / (count * sae.d_out))
    asked = min(count, max(LEAST, affordable))
    which = torch.linspace(0, count - 1, asked, dtype=torch.float64).round().long()
    highest = torch.full((asked,), -1.0)
    mine = torch.nn.functional.normalize(sae.rows(which.to(sae.device)), dim=1)
    for part in sae.pieces(sae.d_out):
        for first in range(part.start, part.stop, 16 * BLOCK):
            last = min(part.stop, first + 16 * BLOCK)
            theirs = torch.nn.functional.normalize(sae.rows(slice(first, last)), dim=1)
            for begin in range(0, asked, BLOCK):
                cosines = mine[begin : begin + BLOCK] @ theirs.t()
                place = which[begin : begin + BLOCK] - first
                itself = (place >= 0) & (place < last - first)
                cosines[itself.nonzero()[:, 0].to(cosines.device), place[itself].to(cosines.device)] = -1
                best = cosines.amax(1).cpu()
                highest[begin : begin + BLOCK] = torch.maximum(highest[begin : begin + BLOCK], best)
    near, twin = (float((highest > bar).double().mean()) for bar in (NEAR, TWIN))
    return Similarity(float(highest.median()), near, twin, asked)
