"""What candidate features cause of a concept: the effect lens towards its words, first mentions, the output score, the
features that say its words, and the blend of features that together cause it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lancet import effect
from lancet.algebra import Direction
from lancet.errors import UsageError
from lancet.logit_lens import logit_lens, toward

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.background import Background, Sentences
    from lancet.lab import Lab
    from lancet.sae import Sae

TRIED = 30  # features tried on continuations
BEGINNINGS = ("I think that", "Yesterday we saw", "Someone once said that", "She wanted to talk about")
TOKENS, STRENGTH = 10, 0.45  # of a continuation; rn
ROWS = 64  # continuations a batch
OUTPUT_PROMPT, OUTPUT_TIMES, OUTPUT_TOKENS = "From my experience,", 10.0, 20  # the published output score's
LIT, POOL = 4096, 60  # features whose rows are looked at for a blend; features that it is chosen from
SHORTLIST = 200  # features that the logit lens proposes where the effects of all are not known


def measure(
    lab: Lab, sae: Sae, features: Sequence[int], signs: Sequence[int], words: Sequence[int], first: Sequence[int] = ()
) -> dict[int, dict[str, Any]]:
    """{feature: {"lens", "mention", "plain", "output", "logits"}} of the TRIED that the lens likes best and of those
    that come first; attributes as in `find.Candidate`.

    Args:
        signs: of each feature, 1, or -1 for those of AbsTopK SAEs that fire below zero on the examples.
    """
    import torch

    rows = unit_rows(sae, features) * torch.tensor(signs, device=sae.device)[:, None] * lab.facts(sae).norm
    lens = towards(lab, sae, rows * effect.STRENGTH, words)
    best = [features[i] for i in lens.topk(min(TRIED, len(features))).indices.tolist()]
    tried = list(dict.fromkeys([*first, *best]))[: max(TRIED, len(first))]
    place = {f: i for i, f in enumerate(features)}
    chosen = torch.tensor([place[f] for f in tried])
    mentions = first_mentions(lab, sae, torch.cat([rows[:1] * 0, rows[chosen] * STRENGTH]), words)
    outputs, logits = output_scores(lab, sae, tried, [signs[place[f]] for f in tried])
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


def unit_rows(sae: Sae, features: Sequence[int]) -> Tensor:
    """[n, d_out] what features write, each of length 1."""
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
    of the words and does not end the text, so that at every step the question is whether the first mention comes now.
    """
    import torch

    parts = [_first_mentions(lab, sae, part, words) for part in vectors.split(ROWS)]
    return torch.cat(parts)


def _first_mentions(lab: Lab, sae: Sae, vectors: Tensor, words: Sequence[int]) -> Tensor:
    import torch

    model, ids = lab.model, torch.tensor(list(words), device=lab.model.device)
    barred = torch.tensor([*words, *model.ends], device=model.device)
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
                positions = torch.arange(length + step - new.shape[1], length + step, device=model.device)
                mask = torch.ones(len(vectors), length + step, dtype=torch.long, device=model.device)
                scores = model.forward(new, mask, positions.expand(len(vectors), -1), cache, last=True)[:, -1].float()
                missed *= 1 - scores.softmax(-1)[:, ids].sum(-1).cpu().clamp_max(1)
                scores[:, barred] = float("-inf")
                new = scores.argmax(-1, keepdim=True)
        total += 1 - missed
    return total / len(BEGINNINGS)


def output_scores(
    lab: Lab, sae: Sae, features: Sequence[int], signs: Sequence[int]
) -> tuple[list[float | None], list[str]]:
    """The published output score of each feature (arXiv 2505.20063), and its first words by the logit lens.

    As its authors' code has it: at the last position of a neutral prompt ten times the largest activation there is
    added to the feature, the SAE's error kept; (1 - best rank / vocabulary) x highest probability, over the feature's
    20 top tokens of the logit lens. None where the model's final norm has no logit lens, or the SAE writes elsewhere
    than into the stream.
    """
    import torch

    model = lab.model
    which = torch.tensor(list(features), device=sae.device)
    rows = sae.rows(which) * torch.tensor(signs, device=sae.device)[:, None]
    try:
        tokens = logit_lens(model, rows).topk(min(OUTPUT_TOKENS, model.d_vocab), dim=-1).indices
    except UsageError:
        return [None] * len(features), [""] * len(features)
    batch = model.batch([model.tokenize(OUTPUT_PROMPT)])
    x = model.values(batch, [sae.site])[sae.site][0]
    (lit,) = sae.features_of(x[None], batch.content)
    here = lit.value[lit.token == lit.shape[0] - 1].abs()
    change = OUTPUT_TIMES * float(here.max()) if len(here) else 0.0
    moved = change * rows * sae.scale(x[-1:])
    probabilities = []
    for part in moved.split(ROWS):

        def put(value: Tensor, part: Tensor = part) -> Tensor:
            value = value.clone()
            value[:, -1] = (value[:, -1].float() + part.to(value.device)).to(value.dtype)
            return value

        with torch.inference_mode(), model.at(sae.writes, put):
            logits = model.forward(batch.ids.expand(len(part), -1), last=True)[:, -1]
        probabilities.append(logits.float().softmax(-1))
    probability = torch.cat(probabilities)
    mine = probability.gather(1, tokens).max(1).values
    rank = (probability > mine[:, None]).sum(1)
    scores = (1 - rank / probability.shape[1]) * mine
    told = [effect.words((model.decode([t]) for t in row), 3) for row in tokens.tolist()]
    return scores.tolist(), told


def saying(lab: Lab, sae: Sae, groups: Sequence[Sequence[int]], count: int, notes: list[str]) -> dict[int, float]:
    """The features that make some words likelier than any other feature does: {feature: nats}, the strongest first.

    Looked up among the effects of all features where these are known (facts). Else the logit lens, over all features,
    proposes some and the effect lens is taken of them.

    Args:
        groups: for each word the ids of its spellings; a feature counts with the best of them, mean over the words.
    """
    import torch

    known = lab.facts(sae)
    if known.effect_ids is not None and known.effect_values is not None:
        total = torch.zeros(sae.d_sae)
        for ids in groups:
            hit = torch.isin(known.effect_ids.long(), torch.tensor(list(ids)))
            total += (known.effect_values.float() * hit).amax(1).clamp_min(0)
        nats, best = (total / len(groups)).topk(min(count, sae.d_sae))
        return {f: v for f, v in zip(best.tolist(), nats.tolist(), strict=True) if v > 0}
    try:
        proposed = _proposed(lab, sae, groups)
    except UsageError as error:
        notes.append(f"which features say it is not told: {error}")
        return {}
    notes.append(
        f"the effects of all features of {sae.name} are not known, so the logit lens chose the {len(proposed)} among "
        f"which those that say it were looked for"
    )
    rows = unit_rows(sae, proposed) * (lab.facts(sae).norm * effect.STRENGTH)
    told = [
        torch.stack([change[:, list(ids)].amax(1) for ids in groups], 1).mean(1).cpu()
        for change in effect.changes(lab.model, sae.writes, rows)
    ]
    nats, best = torch.cat(told).topk(min(count, len(proposed)))
    return {proposed[i]: v for i, v in zip(best.tolist(), nats.tolist(), strict=True) if v > 0}


def _proposed(lab: Lab, sae: Sae, groups: Sequence[Sequence[int]]) -> list[int]:
    """The features whose unit vectors the logit lens has furthest towards some words."""
    import torch

    flat = [i for ids in groups for i in ids]
    parts = []
    for piece in sae.pieces(sae.d_out):
        rows = sae.rows(piece)
        seen = toward(lab.model, rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12), flat).cpu()
        best = [part.amax(1) for part in seen.split([len(ids) for ids in groups], 1)]
        parts.append(torch.stack(best, 1).mean(1))
    return torch.cat(parts).topk(min(SHORTLIST, sae.d_sae)).indices.tolist()


def blend(
    lab: Lab, sae: Sae, own: Sentences, base: Background, words: Sequence[int], most: int
) -> tuple[tuple[tuple[int, float], ...], Direction | None]:
    """The features that differ most between examples and neutral text among those that make the words likelier.

    Returns:
        (feature, weight) of each, weights being the differences of their mean activations, and the Direction; nothing
        and None where no feature does.
    """
    import torch

    tokens = float(own.lengths.sum())
    mean = torch.zeros(sae.d_sae).index_add_(0, own.token_feature, own.token_value) / tokens
    difference = mean - base.activation
    more = (mean.abs() - base.activation.abs()).clamp_min(0)  # one that fires less in the examples is none of theirs
    lit = more.topk(min(LIT, sae.d_sae)).indices
    lit = lit[more[lit] > 0]
    if not len(lit):
        return (), None
    strength = more[lit] * sae.rows(lit.to(sae.device)).norm(dim=1).cpu()  # in units of what they write
    pool = lit[strength.topk(min(POOL, len(lit))).indices]
    signs = difference[pool].sign().to(sae.device)[:, None]
    rows = unit_rows(sae, pool.tolist()) * signs * (lab.facts(sae).norm * effect.STRENGTH)
    causing = pool[towards(lab, sae, rows, words) > 0][:most]
    if not len(causing):
        return (), None
    parts = tuple((int(f), float(difference[f])) for f in causing)
    vector = difference[causing].to(sae.device) @ sae.rows(causing.to(sae.device))
    return parts, Direction(sae.writes, vector, " + ".join(f"{weight:.3g} * #{f}" for f, weight in parts))
