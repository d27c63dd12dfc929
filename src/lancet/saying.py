"""Whether a finished text says a concept, read alone by the unedited model: what was injected is never its own proof.

Keywords are looked for as whole words. The other detectors score a text, and their threshold is the value that at most
one neutral sentence in fifty exceeds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lancet import background
from lancet.algebra import Direction
from lancet.units import Amount

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.find import Found
    from lancet.lab import Lab

# Which of some texts say the concept.
Detector = Callable[[Sequence[str]], Sequence[bool]]
NEUTRAL, RARE = 300, 0.02  # neutral sentences, and the share of them that may exceed the threshold
BATCH = 32


def keywords(words: Sequence[str]) -> Detector:
    """Texts that have one of some words or phrases as whole words, capitals or not.

    Chinese, Japanese and Korean have no spaces between words: there the characters need only occur.
    """

    def spaced(character: str) -> bool:
        return (character.isalnum() or character == "_") and ord(character) < 0x2E80

    def pattern(word: str) -> str:
        left, right = r"(?<!\w)" * spaced(word[0]), r"(?!\w)" * spaced(word[-1])
        return left + re.escape(word) + right

    asked = re.compile("|".join(pattern(word) for word in words if word), re.IGNORECASE)
    return lambda texts: [asked.search(text) is not None for text in texts]


def examples(found: Found) -> tuple[Detector, str]:
    """The detector that examples make (`Found.detect`), and that in words."""
    detector, threshold = above(found.detect)
    return detector, f"summed surprise of {len(found.together)} features above {threshold:.1f} nats"


def itself(lab: Lab, target: Any) -> tuple[Detector, str]:
    """A target itself, fired (a feature) or reached (a direction) by a token of the text; and that in words."""
    found, _ = lab.ready(target, Amount(0.0))
    if isinstance(found, Direction):
        unit = found.unit()
        detector, threshold = above(lambda texts: _peaks(lab, texts, unit))
        return detector, f"a token of the text reaches {threshold:.2f} along {found.recipe}"
    detector, threshold = above(lambda texts: _peaks(lab, texts, found))
    return detector, f"#{found[1]} fires above {threshold:.2f} in the text"


def above(score: Callable[[Sequence[str]], Tensor]) -> tuple[Detector, float]:
    """Texts that score above all but RARE of the neutral sentences and above 0; and that threshold."""
    neutral = score(background.neutral_sentences()[:NEUTRAL]).double()
    threshold = max(0.0, float(neutral.quantile(1 - RARE)))

    def detect(texts: Sequence[str]) -> list[bool]:
        out = [False] * len(texts)
        written = [i for i, text in enumerate(texts) if text.strip()]  # nothing written says nothing
        if written:
            for i, value in zip(written, score([texts[i] for i in written]).tolist(), strict=True):
                out[i] = value > threshold
        return out

    return detect, threshold


def _peaks(lab: Lab, texts: Sequence[str], target: Any) -> Tensor:
    """[n] the largest activation of a feature, or projection on a direction of length 1, over each text's tokens."""
    import torch

    site = target.site if isinstance(target, Direction) else target[0].site
    rows = [lab.model.tokenize(text, most=min(lab.model.context, background.TOKENS)) for text in texts]
    out = torch.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for first in range(0, len(order), BATCH):
        part = order[first : first + BATCH]
        batch = lab.model.batch([rows[i] for i in part])
        x = lab.model.values(batch, [site])[site].float()
        if isinstance(target, Direction):
            value = x @ target.vector.to(x.device)
        else:
            sae, index = target
            value = sae.encode_at(x, torch.tensor([index], device=x.device))[..., 0]
        out[part] = value.masked_fill(~batch.content, float("-inf")).amax(1).cpu()
    return out
