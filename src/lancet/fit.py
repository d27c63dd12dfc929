"""The blend that a concept's words ask for: a few of the features that detect it, weighted by what they cause.

Features that fire on a concept differ in what they do, and their best mixture is not the one in which they fire. The
weights are fitted to first mentions: in neutral sentences, read with the blend added at every position, the chance that
one of the concept's words comes up somewhere is to be high, while the predictions stay such as the plain model would
find likely. What is minimised over weights w >= 0 is

    mean over sentences of -log(1 - prod over positions (1 - p(word)))
    + PRICE * mean over positions of the surprise under the plain model that a token drawn there would have

Few features are kept: the smallest weights go in two steps. Raising the likelihood of lines that already name the thing
instead was tried and steers nothing (it makes the model better at going on about it, not at mentioning it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lancet import background, baselines

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.lab import Lab
    from lancet.sae import Sae

POOL = 64  # features that a blend may be made of
CONTEXTS, LENGTH, AT_ONCE = 24, 24, 8  # neutral sentences, tokens of each, sentences a step
STEPS = ((10, 0.4), (8, 0.0), (10, 0.0))  # of gradient: with all features, with some (share that stays), with few
RATE, START = 0.03, 0.35  # Adam's; the blend's first length in rn
PRICE = 1.0
HEADS = 6  # half sentences on which it is measured how often a first piece is the beginning of a whole phrase


class Contexts:
    """Neutral sentences, their values at a site and what the plain model predicts."""

    def __init__(self, lab: Lab, sae: Sae) -> None:
        import torch

        self.model, self.site = lab.model, sae.writes
        rows = [lab.model.tokenize(text, most=LENGTH) for text in background.neutral_sentences()]
        ids = [row.ids for row in rows if len(row) == LENGTH][:CONTEXTS]
        self.ids = torch.tensor(ids, device=lab.model.device)
        batch = lab.model.batch([list(row) for row in ids])
        self.entry = lab.model.values(batch, [self.site.entry])[self.site.entry].clone()
        self.content = batch.content[..., None]
        with torch.inference_mode():
            parts = [self._predictions(None, which) for which in self.parts()]
        self.plain = torch.cat(parts).clone()
        entropy = -(self.plain.exp() * self.plain).sum(-1)
        self.base = float(entropy.mean())  # what plain text surprises the plain model

    def parts(self) -> list[Tensor]:
        """The sentences in groups, one for each step."""
        import torch

        return list(torch.arange(len(self.ids)).split(AT_ONCE))

    def _predictions(self, vector: Tensor | None, which: Tensor) -> Tensor:
        entry, keep = self.entry[which], self.content[which]

        def enter(_: Tensor) -> Tensor:
            return entry

        def add(value: Tensor) -> Tensor | None:
            return None if vector is None else (value.float() + vector * keep).to(value.dtype)

        model = self.model
        with model.from_site(self.site), model.at(self.site.entry, enter), model.at(self.site, add):
            return model.forward(self.ids[which])[:, 1:].float().log_softmax(-1)

    def loss(self, vector: Tensor, words: Words, which: Tensor) -> Tensor:
        """What is minimised, over some of the sentences."""
        import torch

        told = self._predictions(vector, which)
        p = (told[..., words.ids].exp() * words.shares).sum(-1).clamp(1e-8, 1 - 1e-6)
        mention = -torch.expm1(torch.log1p(-p).sum(1))
        surprise = -(told.exp() * self.plain[which]).sum(-1).mean()
        return -mention.log().mean() + PRICE * (surprise - self.base)

    def shares(self, phrases: Sequence[Sequence[int]], vector: Tensor) -> Words:
        """How often the first token of a phrase is the beginning of the whole phrase: the mean chance, behind half
        sentences and with the vector added, that the rest follows it."""
        import torch

        half = LENGTH // 2
        heads = self.ids[:HEADS, :half]
        found: dict[int, float] = {}
        distinct: dict[tuple[int, ...], None] = dict.fromkeys(tuple(phrase) for phrase in phrases)
        for phrase in map(list, distinct):
            share = 1.0
            beginning, *rest = phrase
            if rest:
                ids = torch.cat([heads, heads.new_tensor(phrase).expand(len(heads), -1)], 1)
                keep = self.content[:1, :1].new_ones(1, ids.shape[1], 1)
                keep[:, 0] = self.content[0, 0]

                def add(value: Tensor, keep: Tensor = keep) -> Tensor:
                    return (value.float() + vector * keep).to(value.dtype)

                with torch.inference_mode(), self.model.at(self.site, add):
                    told = self.model.forward(ids)[:, half:-1].float().log_softmax(-1)
                share = float(told.gather(-1, ids[:, half + 1 :, None])[..., 0].sum(1).exp().mean())
            found[beginning] = min(1.0, found.get(beginning, 0.0) + share)
        ids = torch.tensor(list(found), device=self.ids.device)
        return Words(ids, torch.tensor(list(found.values()), device=self.ids.device))


@dataclass(frozen=True)
class Words:
    """What is to come up.

    Attributes:
        ids: [n] first tokens of words and phrases.
        shares: [n] how often such a token is the beginning of one of them.
    """

    ids: Tensor
    shares: Tensor


def fit(
    lab: Lab, sae: Sae, pool: Sequence[tuple[int, float]], phrases: Sequence[Sequence[int]], most: int = 10
) -> tuple[tuple[int, float], ...]:
    """Fits a blend of at most `most` features.

    Args:
        pool: (feature, weight) that it may be made of and begins with.
        phrases: token ids of the words and phrases that are to come up, as they stand inside a sentence.

    Returns:
        (feature, weight) pairs, the largest part first.
    """
    import torch

    contexts = Contexts(lab, sae)
    features = torch.tensor([index for index, _ in pool])
    rows = sae.rows(features.to(sae.device)).float().to(lab.model.device)
    lengths = rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit, norm = rows / lengths * lab.facts(sae).norm, lab.facts(sae).norm
    weights = torch.tensor([weight for _, weight in pool], device=unit.device) * lengths[:, 0]
    weights = (weights / (weights @ unit).norm() * norm * START).float()
    words = contexts.shares(phrases, weights @ unit)
    weights.requires_grad_()
    alive = torch.ones(len(weights), dtype=torch.bool, device=unit.device)
    adam, parts, step = torch.optim.Adam([weights], lr=RATE), contexts.parts(), 0
    for steps, share in STEPS:
        for _ in range(steps):
            with torch.enable_grad():
                loss = contexts.loss(weights @ unit, words, parts[step % len(parts)])
            (weights.grad,) = torch.autograd.grad(loss, weights)
            adam.step()
            step += 1
            with torch.no_grad():
                weights.clamp_(min=0).mul_(alive)
        stay = max(most, round(share * len(weights)))
        with torch.no_grad():
            alive[weights.argsort(descending=True)[stay:]] = False
            weights.mul_(alive)
    final = weights.detach()
    order = final.argsort(descending=True)[: int((final > 0).sum())]
    return tuple((int(features[i]), float(final[i] / lengths[i, 0] * norm)) for i in order.tolist())


def pool(lab: Lab, sae: Sae, like: Sequence[str]) -> list[tuple[int, float]]:
    """The features that differ most between examples and neutral text, with the difference of their mean activations:
    what a blend may be made of."""
    rows = [lab.model.tokenize(text, most=min(lab.model.context, background.TOKENS)) for text in like]
    own = background.statistics(lab.model, sae, rows)
    difference = baselines.difference_of_features(sae, own, background.of(lab.model, sae))
    strength = difference.clamp_min(0) * sae.decoder_norm.cpu()
    features = strength.topk(min(POOL, sae.d_sae)).indices
    return [(int(f), float(difference[f])) for f in features if strength[f] > 0]


def phrases(lab: Lab, keywords: Sequence[str]) -> list[list[int]]:
    """Token ids of keywords as they stand inside a sentence, with a small and a capital first letter."""
    forms = dict.fromkeys(form for word in keywords for form in (word, word[:1].upper() + word[1:]) if form)
    found = (lab.model.tokenizer(f" {form}", add_special_tokens=False)["input_ids"] for form in forms)
    return [list(ids) for ids in found if ids]
