"""The ways of making a model speak of a concept that a dose is compared with, each a Direction at a site.

DiffMean: mean value over the examples less that over neutral sentences. The same seen through the SAE: the mean
difference of activations, decoded. The likelihood gradient: of the examples' log-likelihood less neutral text's, with
respect to a vector added at every position. Neuronpedia's orthogonal method needs no direction of its own: the value's
component along the target is taken out and the target added, which is what `=` does to a direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lancet import background
from lancet.algebra import Direction

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.lab import Lab
    from lancet.sae import Sae
    from lancet.tokens import Tokens

NEUTRAL = 24  # neutral sentences that the gradient is held against
BATCH = 16


def directions(lab: Lab, sae: Sae, like: Sequence[str]) -> dict[str, Direction]:
    """DiffMean, DiffMean through the SAE and the likelihood gradient, from examples.

    A transcoder's directions would mix two sites: for one there is DiffMean and the gradient at the site it writes.
    """
    rows = [lab.model.tokenize(text, most=min(lab.model.context, background.TOKENS)) for text in like]
    neutral = [
        lab.model.tokenize(text, most=min(lab.model.context, background.TOKENS))
        for text in background.neutral_sentences()[:NEUTRAL]
    ]
    pull = gradient(lab, sae, rows) - gradient(lab, sae, neutral)
    out = {"likelihood gradient": Direction(sae.writes, pull, "likelihood gradient")}
    if sae.site != sae.writes:
        values = [mean_value(lab, sae, part) for part in (rows, neutral)]
        return {"DiffMean": Direction(sae.writes, values[0] - values[1], "DiffMean"), **out}
    base, own = background.of(lab.model, sae), background.statistics(lab.model, sae, rows)
    through = seen_through(sae, own, base)
    return {
        "DiffMean": Direction(sae.writes, difference_of_means(own, base), "DiffMean"),
        "DiffMean through the SAE": Direction(sae.writes, through, "DiffMean through the SAE"),
        **out,
    }


def difference_of_means(own: background.Sentences, base: background.Background) -> Tensor:
    """[d_out] mean over examples of their mean value less that of neutral sentences."""
    return own.values.mean(0) - base.examples.mean(0)


def difference_of_features(sae: Sae, own: background.Sentences, base: background.Background) -> Tensor:
    """[d_sae] mean activation over the examples' tokens less that over neutral tokens."""
    import torch

    mean = torch.zeros(sae.d_sae).index_add_(0, own.token_feature, own.token_value) / float(own.lengths.sum())
    return mean - base.activation


def seen_through(sae: Sae, own: background.Sentences, base: background.Background) -> Tensor:
    """[d_out] the mean difference of activations, decoded."""
    import torch

    difference = difference_of_features(sae, own, base)
    lit = difference.nonzero()[:, 0]
    total = torch.zeros(sae.d_out)
    for first in range(0, len(lit), 4096):
        part = lit[first : first + 4096]
        total += difference[part] @ sae.rows(part.to(sae.device)).cpu()
    return total


def mean_value(lab: Lab, sae: Sae, rows: Sequence[Tokens]) -> Tensor:
    """[d_out] mean over texts of the mean value at the site that the SAE writes."""
    import torch

    means = []
    for first in range(0, len(rows), BATCH):
        batch = lab.model.batch(list(rows[first : first + BATCH]))
        x, keep = lab.model.values(batch, [sae.writes])[sae.writes].float(), batch.content
        means.append((x * keep[..., None]).sum(1).cpu() / keep.sum(1).cpu()[:, None].clamp_min(1))
    return torch.cat(means).mean(0)


def gradient(lab: Lab, sae: Sae, rows: Sequence[Tokens]) -> Tensor:
    """[d_out] gradient of the mean log-likelihood a token of texts, with respect to a vector added at every position
    but the start token."""
    import torch

    model, total, count = lab.model, torch.zeros(sae.d_out), 0
    for first in range(0, len(rows), BATCH):
        batch = model.batch(list(rows[first : first + BATCH]))
        vector = torch.zeros(sae.d_out, device=model.device, requires_grad=True)
        keep = batch.content[..., None]

        def add(value: Tensor, vector: Tensor = vector, keep: Tensor = keep) -> Tensor:
            return value + (vector * keep).to(value.dtype)

        with torch.enable_grad(), model.at(sae.writes, add):
            logits = model.forward(batch.ids, batch.mask.long())
            told = logits[:, :-1].float().log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
            inside = batch.content[:, 1:]
            (found,) = torch.autograd.grad((told * inside).sum(), vector)
        total += found.cpu()
        count += int(inside.sum())
    return total / max(1, count)
