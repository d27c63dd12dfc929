"""How much of a site's values SAEs rebuild, how sparsely, and what the model still predicts with the rebuilt values.

All sums are float64 and grow with nothing but the SAE's width: no token is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lancet import massive, passes, splice
from lancet.check import Left, rebuild

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.features import Features
    from lancet.model import Model
    from lancet.sae import Sae
    from lancet.site import Site
    from lancet.splice import Passed

SCORES_BYTES = 256 << 20  # logits of one pass, in float32
KL_ROWS = 64  # tokens whose distributions are compared at once


@dataclass
class Totals:
    """Sums over tokens for one SAE, start tokens left out.

    Attributes:
        left: what it leaves unexplained of the value at the site that it writes, in its own basis, massive tokens left
            out (`lancet.massive`); all: the same with them in.
        median: norm of the values of the first pass, which massive tokens are told by.
        cosine: summed cosine between value and reconstruction.
        lit: features lit, over all tokens.
        fired: [d_sae] on how many tokens each feature fires.
        nats, zeros, kl: over `count` tokens the cost with the reconstruction and with zeros at the site, and the
            divergence KL(plain || spliced).
        plain: what the same tokens cost the model as it is.
    """

    fired: Tensor
    left: Left = field(default_factory=Left)
    all: Left = field(default_factory=Left)
    median: float | None = None
    cosine: float = 0.0
    lit: int = 0
    plain: float = 0.0
    nats: float = 0.0
    zeros: float = 0.0
    kl: float = 0.0
    count: int = 0

    @property
    def tokens(self) -> int:
        return self.all.tokens

    @property
    def massive(self) -> int:
        """Tokens that `left` leaves out."""
        return self.all.tokens - self.left.tokens

    @property
    def recovered(self) -> float:
        """(zeros - spliced) / (zeros - plain); NaN where zeros cost no more than the model as it is."""
        return (self.zeros - self.nats) / (self.zeros - self.plain) if self.zeros > self.plain else math.nan


def sites_of(saes: Sequence[Sae]) -> list[Site]:
    """Every site whose value scoring needs, in the order in which a model computes them."""
    return sorted({site for sae in saes for site in (sae.site, sae.writes, sae.writes.entry)})


def together(model: Model) -> int:
    """Tokens of one pass, padding counted, whose logits have room."""
    return min(passes.TOGETHER, max(1, SCORES_BYTES // (4 * model.d_vocab)))


def lit(sae: Sae, x: Tensor, keep: Tensor) -> Iterator[tuple[Tensor, Features, Tensor]]:
    """The features of padded texts, all at once or, where an SAE sees the tokens before, text by text.

    Args:
        x: [batch, seq, d_in]; keep: [batch, seq] True at the tokens that are read.

    Yields:
        (which [rows], features with a row for each of them, reconstruction [rows, d_out]); `which` counts the True
        entries of `keep`, row by row.
    """
    if not sae.kind.contextual:
        own = x[keep].float()
        every = torch.ones(len(own), dtype=torch.bool, device=own.device)
        features = sae.features(own)
        yield torch.arange(len(own), device=own.device), features, rebuild(sae, features, own, every)
        return
    first = 0
    for text, wanted in zip(x, keep, strict=True):
        features = sae.features(text.float(), wanted)
        count = features.shape[0]
        if count:
            which = torch.arange(first, first + count, device=x.device)
            yield which, features, rebuild(sae, features, text.float(), wanted)
        first += count


@torch.no_grad()
def measure(
    model: Model, saes: Sequence[Sae], rows: Sequence[Sequence[int]], totals: Sequence[Totals], losses: bool
) -> None:
    """Counts some texts in, one pass of the model for all SAEs.

    Args:
        rows: token ids, the start token first.
        losses: also what the model predicts: a pass more for each SAE, and one for each site that they write.
    """
    sites = sites_of(saes)
    for which in passes.alike(rows, together(model) if losses else passes.TOGETHER):
        batch = model.batch([rows[i] for i in which])
        passed = splice.through(model, batch, sites) if losses else None
        values = passed.values if passed else model.values(batch, sites)
        zeros: dict[Site, float] = {}
        for sae, total in zip(saes, totals, strict=True):
            y = values[sae.writes][batch.content].float()
            norms = y.norm(dim=1)
            total.median = float(norms.median()) if total.median is None else total.median
            usual = massive.ordinary(norms, total.median)
            new = torch.empty_like(y)
            for at, features, rebuilt in lit(sae, values[sae.site], batch.content):
                own = sae.out_basis(y[at])
                _count(total, features, own, rebuilt, usual[at])
                new[at] = rebuilt + (y[at] - own)  # what lies outside its basis, it never saw
            if passed is not None and passed.count:
                _splice(model, passed, sae.writes, new, total, zeros)


def _count(total: Totals, features: Features, own: Tensor, rebuilt: Tensor, usual: Tensor) -> None:
    total.all.add(own, rebuilt)
    total.left.add(own[usual], rebuilt[usual])
    total.cosine += float(torch.cosine_similarity(own.double(), rebuilt.double(), dim=1).sum())
    total.lit += len(features.value)
    total.fired += torch.bincount(features.feature, minlength=features.shape[1]).cpu()


def _splice(model: Model, passed: Passed, site: Site, new: Tensor, total: Totals, zeros: dict[Site, float]) -> None:
    scores = splice.replaced(model, passed, site, new)
    if site not in zeros:
        zeros[site] = passed.cost(splice.replaced(model, passed, site, torch.zeros_like(new)))
    total.count += passed.count
    total.plain += passed.nats
    total.zeros += zeros[site]
    total.nats += passed.cost(scores)
    total.kl += divergence(passed.scores, scores)


def divergence(plain: Tensor, other: Tensor) -> float:
    """KL(plain || other) in nats, summed over rows of logits [rows, vocab]."""
    total = 0.0
    for p, q in zip(plain.split(KL_ROWS), other.split(KL_ROWS), strict=True):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
    return total
