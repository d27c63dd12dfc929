"""Sentences that are about what a feature is for, and others: bundled ones, or the user's.

Which concept a bundled feature is about is found on other sentences than those that it is then watched in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lancet import bench, neurons
from lancet.background import neutral_sentences
from lancet.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.lab import Lab
    from lancet.sae import Sae
    from lancet.tokens import Tokens

OWN = 10  # bundled sentences about the feature's concept
BESIDE = 2  # bundled sentences about each other concept
SEARCHED = 4  # sentences of each concept in which the feature's is looked for; none of them is watched
NEUTRAL = 300  # sentences in which other contexts are looked for
TOKENS = 256  # of one sentence, the start token counted
# A word that so large a share of the sentences have, and no larger one of others, is what they are about.
COMMON, RARE = 0.3, 0.03


@dataclass(frozen=True)
class Sentences:
    """What a feature is watched in.

    Attributes:
        about: a concept of the bench, or "the given sentences".
        own, others: sentences about it and not.
        neutral: bundled sentences that are not about it.
        words: by which those that are about it were known.
    """

    about: str
    own: tuple[str, ...]
    others: tuple[str, ...]
    neutral: tuple[str, ...]
    words: tuple[str, ...]


def bundled(lab: Lab, sae: Sae, feature: int, others: Sequence[str] | None, notes: list[str]) -> Sentences:
    """Held-out sentences of the concept that a feature separates best, and of the others.

    Raises:
        UsageError: the feature fires in none of the bundled sentences.
    """
    name = _concept(lab, sae, feature, notes)
    own = _own(name)
    beside = tuple(text for concept, text in bench.sentences("heldout", BESIDE, seed=2) if concept != name)
    words = bench.concepts()[name].keywords
    return Sentences(name, own, beside if others is None else _some(others), _without(words), words)


def _own(name: str) -> tuple[str, ...]:
    """OWN sentences of a concept, no template twice: held-out ones first, then some that no search looked at."""
    concept = bench.concepts()[name]
    held = [text for c, text in bench.sentences("heldout", len(concept.part("heldout")), seed=1) if c == name][:OWN]
    more = [text for c, text in bench.sentences("train", SEARCHED + OWN, seed=0) if c == name][SEARCHED:]
    return tuple((held + more)[:OWN])


def given(texts: Sequence[str], others: Sequence[str] | None) -> Sentences:
    """The user's sentences; what they are about are the words that they share and that others hardly have.

    Raises:
        UsageError: fewer than two sentences, or no others.
    """
    if isinstance(texts, str) or len(texts) < 2:
        raise UsageError(f"give at least two sentences in a list, got {1 if isinstance(texts, str) else len(texts)}")
    beside = [text for _, text in bench.sentences("heldout", BESIDE, seed=2)] if others is None else _some(others)
    words = _shared(texts, [*beside, *neutral_sentences(NEUTRAL)])
    if others is None:
        beside = [text for text in beside if not holds(text, words)]
    return Sentences("the given sentences", tuple(texts), tuple(beside), _without(words), words)


def _some(others: Sequence[str]) -> tuple[str, ...]:
    if isinstance(others, str) or not others:
        raise UsageError("there are no other sentences to tell these from; give a list of at least one")
    return tuple(others)


def _without(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(text for text in neutral_sentences(NEUTRAL) if not holds(text, words))


def _concept(lab: Lab, sae: Sae, feature: int, notes: list[str]) -> str:
    """The concept of the bench whose sentences a feature separates best from those of all others."""
    import numpy as np

    from lancet.scoring import auroc_of_ranks, ranks

    told = list(bench.sentences("train", SEARCHED, seed=0))
    rows = [row(lab, text, notes) for _, text in told]
    scores = np.zeros((len(rows), 1))
    for which, x, _, keep in neurons.passes(lab.model, sae.site, None, rows):
        scores[which, 0] = peak(activation(sae, x, feature)[..., None], keep)[:, 0].cpu().numpy()
    if not scores.any():
        raise UsageError(
            f"#{feature} fires in none of the {len(rows)} bundled sentences, so it is not known what it is about; give "
            f"sentences in which it should fire (--file FILE)"
        )
    labels, ranked = np.array([name for name, _ in told]), ranks(scores)
    by = {name: float(auroc_of_ranks(ranked, labels == name)[0]) for name in dict.fromkeys(labels.tolist())}
    best = max(by, key=lambda name: (by[name], float(scores[labels == name].mean())))
    if by[best] < 0.9:
        notes.append(
            f"no concept of the bundled sentences is what #{feature} is about (the best, {best}, has an AUROC of "
            f"{by[best]:.2f}); give your own sentences with --file"
        )
    return best


def row(lab: Lab, text: str, notes: list[str]) -> Tokens:
    """A sentence as tokens, cut where it is very long."""
    most = min(lab.model.context, TOKENS)
    cut = lab.model.tokenize(text, most=most)
    if len(cut) == most and cut.spans[-1][1] < len(text):
        notes.append(f"sentences longer than {most} tokens were cut there")
    return cut


def activation(sae: Sae, x: Tensor, feature: int) -> Tensor:
    """[batch, seq] one feature's activation, of AbsTopK's the size."""
    import torch

    with torch.no_grad():
        return sae.encode_at(x, torch.tensor([feature], device=x.device))[..., 0].abs()


def peak(values: Tensor, keep: Tensor) -> Tensor:
    """[batch, m] the largest of [batch, seq, m] over each text's tokens."""
    return values.masked_fill(~keep[..., None], -float("inf")).amax(1)


def _shared(own: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """The words that the sentences share and others hardly have."""

    def share(texts: Sequence[str]) -> dict[str, float]:
        counts: dict[str, int] = {}
        for text in texts:
            for word in set(re.findall(r"\w{3,}", text.lower())):
                counts[word] = counts.get(word, 0) + 1
        return {word: count / len(texts) for word, count in counts.items()}

    mine, theirs = share(own), share(others)
    return tuple(sorted(w for w, s in mine.items() if s >= COMMON and theirs.get(w, 0) <= RARE))


def holds(text: str, words: Sequence[str]) -> bool:
    """Whether a text has one of the words, as a whole one."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in words)
