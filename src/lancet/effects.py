"""What candidate features cause of a concept: the effect lens towards its words, first mentions, the output score, and
the blend of features that together cause it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lancet import effect
from lancet.algebra import Direction

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.background import Background, Sentences
    from lancet.lab import Lab
    from lancet.sae import Sae

TRIED = 30  # features tried on continuations
BEGINNINGS = ("I think that", "Yesterday we saw", "My friend told me that", "She wanted to talk about")
TOKENS, STRENGTH = 10, 0.45  # of a continuation; rn
OUTPUT_TIMES, OUTPUT_TOKENS = 10.0, 20  # the published output score's
POOL = 60  # features that a blend is chosen from


def measure(lab: Lab, sae: Sae, features: Sequence[int], words: Sequence[int], top: int) -> dict[int, dict[str, Any]]:
    """{feature: {"lens", "mention", "plain", "output", "logits"}} of the TRIED that the lens likes best and the `top`
    first ones; attributes as in `find.Candidate`."""
    import torch

    rows = _unit_rows(sae, features) * lab.facts(sae).norm
    lens = towards(lab, sae, rows * effect.STRENGTH, words)
    best = [features[i] for i in lens.topk(min(TRIED, len(features))).indices.tolist()]
    tried = list(dict.fromkeys([*features[:top], *best]))[: max(TRIED, top)]
    place = {f: i for i, f in enumerate(features)}
    chosen = torch.tensor([place[f] for f in tried])
    mentions = first_mentions(lab, sae, torch.cat([rows[:1] * 0, rows[chosen] * STRENGTH]), words)
    outputs, logits = output_scores(lab, sae, tried)
    return {
        f: {
            "lens": float(lens[place[f]]),
            "mention": float(mentions[1 + i]),
            "plain": float(mentions[0]),
            "output": outputs[i],
            "logits": logits[i],
        }
        for i, f in enumerate(tried)
    }


def _unit_rows(sae: Sae, features: Sequence[int]) -> Tensor:
    import torch

    rows = sae.rows(torch.tensor(list(features), device=sae.device))
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def towards(lab: Lab, sae: Sae, vectors: Tensor, words: Sequence[int]) -> Tensor:
    """[n] by how many nats each vector makes the words likelier than the vocabulary at large (the effect lens)."""
    import torch

    found = []
    for change in effect.changes(lab.model, sae.writes, vectors):
        found.append((change[:, list(words)].mean(1) - change.mean(1)).cpu())
    return torch.cat(found)


def first_mentions(lab: Lab, sae: Sae, vectors: Tensor, words: Sequence[int]) -> Tensor:
    """[n] probability that one of the words comes up within TOKENS tokens, mean over BEGINNINGS.

    Each vector is added at every position but the start token. The continuation takes the likeliest token that is none
    of the words, so that at every step the question is whether the first mention comes now.
    """
    import torch

    model, ids = lab.model, torch.tensor(list(words))
    total = torch.zeros(len(vectors))
    for text in BEGINNINGS:
        prompt = model.tokenize(text)
        row = torch.tensor([prompt.ids], device=model.device).expand(len(vectors), -1)
        cache, missed = model.new_cache(len(vectors)), torch.ones(len(vectors))
        first = 1 if prompt.roles[:1] == ("start",) else 0
        length = len(prompt)

        def add(value: Tensor, first: int = first) -> Tensor:
            moved = value + vectors[:, None].to(value)
            if value.shape[1] > 1:  # the prompt's own pass: the start token stays as it is
                moved[:, :first] = value[:, :first]
            return moved

        with torch.inference_mode(), model.at(sae.writes, add):
            new = row
            for step in range(TOKENS):
                positions = torch.arange(length + step - (new.shape[1] - 1) - 1, length + step, device=model.device)
                mask = torch.ones(len(vectors), length + step, dtype=torch.long, device=model.device)
                scores = model.forward(new, mask, positions.expand(len(vectors), -1), cache, last=True)[:, -1].float()
                missed *= 1 - scores.softmax(-1)[:, ids].sum(-1).cpu().clamp_max(1)
                scores[:, ids] = float("-inf")
                new = scores.argmax(-1, keepdim=True)
        total += 1 - missed
    return total / len(BEGINNINGS)


def output_scores(lab: Lab, sae: Sae, features: Sequence[int]) -> tuple[list[float | None], list[str]]:
    """The published output score of each feature (arXiv 2505.20063), and its first words by the logit lens.

    At the last position of a neutral prompt the feature is set to ten times its maximum, the SAE's error kept:
    (1 - best rank / vocabulary) x highest probability, over the feature's 20 top tokens of the logit lens. None where
    the feature never fired in the measured text, or the model's final norm has no logit lens.
    """
    import torch

    from lancet.errors import UsageError
    from lancet.logit_lens import logit_lens

    model, which = lab.model, torch.tensor(list(features))
    rows = sae.rows(which.to(sae.device))
    try:
        tokens = logit_lens(model, rows).topk(OUTPUT_TOKENS, dim=-1).indices
    except UsageError:
        return [None] * len(features), [""] * len(features)
    maximum = lab.facts(sae).maximum[which].to(model.device)
    ids = torch.tensor([model.tokenize(BEGINNINGS[0]).ids], device=model.device).expand(len(features), -1)

    def put(value: Tensor) -> Tensor:
        x = value[:, -1].float()
        now = sae.encode_at(x[:1], which.to(x.device))[0]
        change = OUTPUT_TIMES * maximum - now
        value = value.clone()
        value[:, -1] = (x + change[:, None] * rows * sae.scale(x)).to(value.dtype)
        return value

    with torch.inference_mode(), model.at(sae.writes, put):
        probability = model.forward(ids, last=True)[:, -1].float().softmax(-1)
    mine = probability.gather(1, tokens)
    rank = (probability > mine.max(1, keepdim=True).values).sum(1)
    scores = (1 - rank / probability.shape[1]) * mine.max(1).values
    told = [effect.words((model.decode([t]) for t in row), 3) for row in tokens.tolist()]
    return [float(s) if m > 0 else None for s, m in zip(scores, maximum, strict=True)], told


def blend(
    lab: Lab, sae: Sae, own: Sentences, base: Background, words: Sequence[int], most: int
) -> tuple[tuple[tuple[int, float], ...], Direction | None]:
    """The features that differ most between examples and neutral text among those that make the words likelier.

    Returns:
        (feature, weight) of each, weights being the differences of their mean activations, and the Direction.
    """
    import torch

    tokens = float(own.lengths.sum())
    mean = torch.zeros(sae.d_sae).index_add_(0, own.token_feature, own.token_value) / tokens
    difference = mean - base.activation
    strength = difference.clamp_min(0) * sae.decoder_norm.cpu()
    pool = strength.topk(min(POOL, sae.d_sae)).indices
    pool = pool[strength[pool] > 0]
    if not len(pool):
        return (), None
    rows = _unit_rows(sae, pool.tolist()) * (lab.facts(sae).norm * effect.STRENGTH)
    causing = pool[towards(lab, sae, rows, words) > 0][:most]
    if not len(causing):
        return (), None
    parts = tuple((int(f), float(difference[f])) for f in causing)
    vector = sum(weight * sae.rows(torch.tensor([f], device=sae.device))[0] for f, weight in parts)
    assert isinstance(vector, torch.Tensor)
    recipe = " + ".join(f"{weight:.3g} * #{f}" for f, weight in parts)
    return parts, Direction(sae.writes, vector, recipe)
