"""How well features detect what examples are about: evidence, AUROC, calibrated F1, a few features as one, baselines.

How rarely neutral text reaches an example's value is an empirical p-value. A feature's evidence is the mean over the
examples of -log p, of the sentence's maximum and of its mean, each capped: a few sentences that all surprise a little
tell more than one that surprises much. Six examples cannot tell the concept from a word that they happen to share, so
the neutral sentences that the first features together find most alike count too, with a smaller weight
(benchmarks/meaning_find.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.background import Background, Sentences
    from lancet.tails import Sorted
    from lancet.tokens import Tokens

CAP, BEYOND = 5.0, 0.01  # nats, so that no single sentence decides; weight of what lies above
ENDING = 3.0  # nats off a feature that is strongest at a sentence's closing mark, where much is summed up
LEADERS, ALIKE, ALIKE_WEIGHT = 8, 20, 0.4  # features that find the neutral sentences most alike; how many; their weight
WORD_WEIGHT = 0.25  # of the evidence at the words that set the examples apart
PRIOR = 1e-3  # of the concept in the wild, for the calibrated F1
RIDGE = 0.01  # of the mean variance, added to LDA's covariance


class Figures(NamedTuple):
    """How well one feature detects; attributes as in `find.Candidate`."""

    auroc: float
    unlike_auroc: float | None
    f1: float
    threshold: float
    elsewhere: float
    token_auroc: float
    token_f1: float


def score(
    rows: Sequence[Tokens], own: Sentences, against: Sequence[Sentences], base: Background, tokens: Tensor | None
) -> Tensor:
    """[d_sae] how much each feature speaks for the examples, in nats.

    Args:
        against: groups of counter-examples; what speaks for one of the groups speaks against.
        tokens: [examples, longest] True where the concept sits, None where that is not known.
    """
    import torch

    found = evidence(own, base) - ENDING * at_the_end(rows, own, base.maximum.d_sae)
    if against:
        found = found - torch.stack([evidence(group, base) for group in against]).amax(0)
    found = found + ALIKE_WEIGHT * alike(found, base)
    return found if tokens is None else found + evidence_at(own, base, tokens)


def evidence(found: Sentences, base: Background) -> Tensor:
    """[d_sae] mean over texts of the capped surprise of maximum and mean; what lies above the cap decides ties."""
    import torch

    high = base.maximum.surprise(found.feature, found.maximum)
    broad = base.mean.surprise(found.feature, found.mean)
    told = high.clamp_max(CAP) + broad.clamp_max(CAP) + BEYOND * (high + broad)
    return torch.zeros(base.maximum.d_sae).index_add_(0, found.feature, told.float()) / max(1, found.count)


def at_the_end(rows: Sequence[Tokens], found: Sentences, d_sae: int) -> Tensor:
    """[d_sae] share of the texts in which a feature is strongest at the closing mark."""
    import torch

    last = torch.tensor([len(row) - 1 for row in rows])
    marks = torch.tensor([not any(map(str.isalnum, row.piece(len(row) - 1))) for row in rows])
    inside = (found.token_position == last[found.token_text]) & marks[found.token_text]
    text, feature, size = found.token_text[inside], found.token_feature[inside], found.token_value[inside].abs()
    highest = found.maximum[torch.searchsorted(found.text * d_sae + found.feature, text * d_sae + feature)]
    here = size >= highest
    return torch.zeros(d_sae).index_add_(0, feature[here], torch.ones(int(here.sum()))) / max(1, len(rows))


def alike(score: Tensor, base: Background) -> Tensor:
    """[d_sae] evidence from the neutral sentences that the leading features together find most alike."""
    import torch

    leaders = score.topk(min(LEADERS, len(score))).indices
    values = base.maximum.dense(leaders)
    said = base.maximum.surprise(leaders.repeat(len(values)), values.flatten()).view(len(values), -1).sum(1)
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[said.topk(min(ALIKE, len(said))).indices] = True
    total = torch.zeros(len(score))
    for part in (base.maximum, base.mean):
        assert part.member is not None
        inside = chosen[part.member.long()].nonzero()[:, 0]
        feature = torch.searchsorted(part.begin, inside, right=True) - 1
        surprise = part.surprise(feature, part.value[inside]).clamp_max(CAP).float()
        total.index_add_(0, feature, surprise)
    return total / int(chosen.sum())


def evidence_at(found: Sentences, base: Background, tokens: Tensor) -> Tensor:
    """[d_sae] mean over texts of the capped surprise at the tokens that count, the strongest of each text's."""
    import torch

    inside = tokens[found.token_text, found.token_position]
    text, feature, size = found.token_text[inside], found.token_feature[inside], found.token_value[inside].abs()
    surprise = base.token.surprise(feature, size).clamp_max(CAP).float()
    d_sae = base.token.d_sae
    key, inverse = (text * d_sae + feature).unique(return_inverse=True)
    best = torch.zeros(len(key)).scatter_reduce_(0, inverse, surprise, "amax")
    return torch.zeros(d_sae).index_add_(0, key % d_sae, best) / max(1, found.count)


def together(found: Sentences, base: Background, features: Tensor) -> Tensor:
    """[texts] summed surprise of a few features' maxima, in nats."""
    maxima = found.dense(features)
    which = features.repeat(found.count)
    return base.maximum.surprise(which, maxima.flatten()).view(found.count, -1).sum(1).float()


def together_at(found: Sentences, base: Background, features: Tensor, shape: Sequence[int]) -> Tensor:
    """[texts, longest] summed surprise of a few features at every token, in nats."""
    import torch

    inside = torch.isin(found.token_feature, features)
    text, position = found.token_text[inside], found.token_position[inside]
    told = base.token.surprise(found.token_feature[inside], found.token_value[inside].abs()).float()
    return torch.zeros(*shape).index_put_((text, position), told, accumulate=True)


def adds(own: Sentences, base: Background, features: Tensor) -> tuple[float, ...]:
    """AUROC of the first 1, 2, ... features as one, examples against background."""
    import torch

    theirs = base.maximum.dense(features)
    which = features.repeat(len(theirs))
    neutral = base.maximum.surprise(which, theirs.flatten()).view(len(theirs), -1).cumsum(1)
    ours = torch.stack([together(own, base, features[:n]) for n in range(1, len(features) + 1)], 1)
    return tuple(_area(mine, other) for mine, other in zip(ours.t(), neutral.t().to(ours), strict=True))


def _area(positive: Tensor, negative: Tensor) -> float:
    """AUROC of one column, ties counted half."""
    import torch

    ordered = negative.sort().values.contiguous()
    under, up_to = (torch.searchsorted(ordered, positive.contiguous(), right=right) for right in (False, True))
    return float((under + up_to).double().mean() / 2 / len(ordered))


def figures(own: Sentences, against: Sequence[Sentences], base: Background, tokens: Tensor, feature: int) -> Figures:
    """What one feature reaches on the examples.

    Args:
        tokens: [examples, longest] True at the tokens that token figures are about.
    """
    import torch

    which = torch.tensor([feature])
    maxima = own.dense(which)[:, 0]
    singles = at_tokens(own, feature, tokens.shape).abs()[tokens]
    f1, threshold = calibrated_f1(maxima, base.maximum, feature)
    fires = torch.tensor([threshold or torch.finfo(torch.float32).tiny])  # no threshold: wherever it fires at all
    return Figures(
        auroc=float(base.maximum.auroc(maxima[:, None], which)[0]),
        unlike_auroc=min((_area(maxima, group.dense(which)[:, 0]) for group in against), default=None),
        f1=f1,
        threshold=threshold,
        elsewhere=float(base.maximum.at_least(which, fires)[0]) / base.maximum.population,
        token_auroc=float(base.token.auroc(singles[:, None], which)[0]),
        token_f1=calibrated_f1(singles, base.token, feature)[0],
    )


def at_tokens(found: Sentences, feature: int, shape: Sequence[int]) -> Tensor:
    """[texts, longest] one feature's activation, with its sign, at every token."""
    import torch

    out = torch.zeros(*shape)
    mine = found.token_feature == feature
    out[found.token_text[mine], found.token_position[mine]] = found.token_value[mine]
    return out


def calibrated_f1(positives: Tensor, against: Sorted, feature: int) -> tuple[float, float]:
    """The best F1 of a feature and its threshold, as if the concept made up PRIOR of all text (arXiv 2605.31183):
    2 TP / (2 TP + c FP + FN) with c = q (1 - PRIOR) / (PRIOR (1 - q)), q the share of positives that were given.

    Returns:
        (0, 0) where it fires on none of them.
    """
    import torch

    share = len(positives) / (len(positives) + against.population)
    c = share * (1 - PRIOR) / (PRIOR * (1 - share))
    thresholds = positives[positives > 0].unique()
    if not len(thresholds):
        return 0.0, 0.0
    true = len(positives) - torch.searchsorted(positives.sort().values, thresholds).double()
    false = against.at_least(torch.full((len(thresholds),), feature), thresholds).double()
    f1 = 2 * true / (2 * true + c * false + (len(positives) - true))
    best = int(torch.argmax(f1))
    return float(f1[best]), float(thresholds[best])


def baselines(own: Tensor, neutral: Tensor) -> dict[str, float]:
    """AUROC, on the mean values of the same sentences, of what needs no SAE: DiffMean and LDA from the other examples,
    each tried on the one left out, and the best single coordinate.

    Args:
        own: [examples, d]; neutral: [n, d].
    """
    import torch

    centre = neutral.mean(0)
    centred = neutral - centre
    covariance = centred.t() @ centred / max(1, len(neutral) - 1)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    told: dict[str, float] = {}
    if len(own) > 1:
        rest = (own.sum(0) - own) / (len(own) - 1) - centre  # [examples, d] the difference without each
        for name, ways in (("DiffMean", rest), ("LDA", torch.linalg.solve(covariance, rest.t()).t())):
            mine, other = (own * ways).sum(1), neutral @ ways.t()
            below = (other < mine).double() + 0.5 * (other == mine).double()
            told[f"{name} (left out in turn)"] = float(below.mean())
    ordered = neutral.t().sort(1).values.contiguous()
    asked = own.t().contiguous()
    reach = torch.searchsorted(ordered, asked) + torch.searchsorted(ordered, asked, right=True)
    each = reach.double().mean(1) / 2 / len(neutral)
    return told | {"best coordinate": float(torch.maximum(each, 1 - each).max())}
