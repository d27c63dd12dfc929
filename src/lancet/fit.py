"""The blend that a concept's words ask for: weighted features that together cause it.

Features that fire on a concept differ in what they do, and their best mixture is not the one in which they fire. What
is fitted is first mentions: in neutral sentences, read with a vector added at every position, the chance that one of
the concept's words comes up somewhere is to be high, while the predictions stay such as the plain model would find
likely. What is minimised is

    mean over sentences of -log(1 - prod over positions (1 - p(word)))
    + PRICE * mean over positions of the surprise under the plain model that a token drawn there would have

over vectors, beginning with the difference of means. The vector is then taken apart into features by orthogonal
matching pursuit (over the decoder's directions, either sign: a feature that makes text stray can be turned down), and
the same loss is minimised over the weights of those. Weights of the features that fire on the concept, none below zero,
say it half as often at twice the surprise; raising the likelihood of lines that already name the thing steers nothing
(it makes the model better at going on about it, not at mentioning it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lancet import background

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.lab import Lab
    from lancet.sae import Sae

MOST = 24  # features of a blend
SHORTLIST = 16384  # features, nearest to the vector, that it is taken apart into
CONTEXTS, LENGTH, AT_ONCE = 24, 24, 8  # neutral sentences, tokens of each, sentences a step
STEPS, AGAIN = 48, 30  # of gradient: of the vector, of the weights
RATE, START = 0.03, 0.35  # Adam's, for the whole vector and for one weight, and the vector's first length: in rn
PRICE = 0.5
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
    lab: Lab, sae: Sae, start: Tensor, phrases: Sequence[Sequence[int]], most: int = MOST
) -> tuple[tuple[int, float], ...]:
    """Fits a blend of at most `most` features.

    Args:
        start: [d_out] the vector that the fit begins with; its length does not matter.
        phrases: token ids of the words and phrases that are to come up, as they stand inside a sentence.

    Returns:
        (feature, weight) pairs, the largest part first.
    """
    contexts, norm = Contexts(lab, sae), lab.facts(sae).norm
    vector = (start / start.norm() * START).to(lab.model.device)  # in rn
    words = contexts.shares(phrases, vector * norm)
    vector = _descend(contexts, words, vector, lambda v: v * norm, STEPS, RATE / vector.numel() ** 0.5)
    features, weights = pursue(sae, vector, most)
    rows = sae.rows(features).float().to(vector.device)
    lengths = rows.norm(dim=1)
    unit = rows / lengths[:, None] * norm
    words = contexts.shares(phrases, weights @ unit)
    weights = _descend(contexts, words, weights, lambda w: w @ unit, AGAIN, RATE)
    order = weights.abs().argsort(descending=True).tolist()
    return tuple((int(features[i]), float(weights[i] / lengths[i] * norm)) for i in order)


def _descend(
    contexts: Contexts, words: Words, start: Tensor, vector: Callable[[Tensor], Tensor], steps: int, rate: float
) -> Tensor:
    """Follows the loss's gradient from `start`, of which `vector` makes what is added."""
    import torch

    value = start.clone().requires_grad_()
    adam, parts = torch.optim.Adam([value], lr=rate), contexts.parts()
    for step in range(steps):
        with torch.enable_grad():
            loss = contexts.loss(vector(value), words, parts[step % len(parts)])
        (value.grad,) = torch.autograd.grad(loss, value)
        adam.step()
    return value.detach()


def pursue(sae: Sae, vector: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit of a vector in the SAE's decoder.

    Args:
        vector: [d_out]; most: features.

    Returns:
        [n] features and [n] weights of their directions at length 1, n <= most, such that the weighted sum is as near
        to the vector as those features bring it; features of no length are left out.
    """
    import torch

    near = torch.cat(
        [
            torch.nn.functional.normalize(sae.rows(slice(i, i + 4096)).float(), dim=1) @ vector.to(sae.device)
            for i in range(0, sae.d_sae, 4096)
        ]
    )
    pool = near.abs().topk(min(SHORTLIST, sae.d_sae)).indices
    unit = torch.nn.functional.normalize(sae.rows(pool).float(), dim=1).to(vector.device)
    chosen: list[int] = []
    weights, rest = vector.new_zeros(0), vector
    for _ in range(min(most, len(unit))):
        fit = (unit @ rest).abs()
        fit[chosen] = -1
        chosen.append(int(fit.argmax()))
        weights = torch.linalg.lstsq(unit[chosen].t(), vector[:, None]).solution[:, 0]
        rest = vector - weights @ unit[chosen]
    return pool[chosen], weights


def phrases(lab: Lab, keywords: Sequence[str]) -> list[list[int]]:
    """Token ids of keywords as they stand inside a sentence, with a small and a capital first letter."""
    forms = dict.fromkeys(form for word in keywords for form in (word, word[:1].upper() + word[1:]) if form)
    found = (lab.model.tokenizer(f" {form}", add_special_tokens=False)["input_ids"] for form in forms)
    return [list(ids) for ids in found if ids]
