"""Finding a concept in 200 sentences of 30 tokens: `find` whole against the forward passes to the site and the encodes
alone. What neutral text does is in the cache; what measuring that costs stands beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks import pairs
from benchmarks.measure import Figure, Settings, check, in_turns, ratio, remark

if TYPE_CHECKING:
    from lancet.lab import Lab

SENTENCES, TOKENS = 200, 30
CUT = 22  # characters of a neutral sentence
BATCH = 32
BAR = 1.3


def run(settings: Settings) -> Iterator[Figure]:
    import torch

    from lancet import background

    torch.set_num_threads(settings.threads)
    lab = pairs.gpt2(settings)
    texts = sentences(lab)
    check(len(texts) == SENTENCES, "sentences")
    remark("measuring the background")
    # A token of this pair is a byte: cut, a sentence has as many as one of words has tokens.
    neutral = [text[:CUT] for text in background.neutral_sentences()]
    begin = time.perf_counter()
    base = background.measure(lab.model, lab.sae(), neutral)
    seconds = time.perf_counter() - begin
    with pairs.own_cache(settings):
        base.save(background.place(lab.model, lab.sae()))
        sides = {
            "lab.find": lambda: lab.find(texts, causes=False),
            "passes and encodes": lambda: alone(lab, texts),
        }
        taken = in_turns(sides, settings.repeats)
    name = f"GPT-2 shape, float32: find in {SENTENCES} sentences of {TOKENS} tokens"
    yield ratio(name, taken, "lab.find", "passes and encodes", BAR)
    detail = f"{base.maximum.population:,} sentences, {base.token.population:,} tokens; once for a pair"
    yield Figure("GPT-2 shape, float32: the background of find", seconds, "s", None, detail)


def sentences(lab: Lab) -> list[str]:
    """Texts of exactly so many tokens, the start token counted: with this pair's tokenizer a token is a byte."""
    from lancet.bench import neutral_texts

    texts = [text[: TOKENS - 1] for text in neutral_texts(3 * SENTENCES, seed=9) if text[: TOKENS - 1].isascii()]
    found = [text for text in texts if len(lab.tokenize(text)) == TOKENS]
    return found[:SENTENCES]


def alone(lab: Lab, texts: list[str]) -> int:
    """What no finder can do without: every sentence to the site, and its features' activations."""
    import torch

    model, sae, lit = lab.model, lab.sae(), 0
    with torch.no_grad():
        for first in range(0, len(texts), BATCH):
            batch = model.batch([model.tokenize(text) for text in texts[first : first + BATCH]])
            x = model.values(batch, [sae.site])[sae.site][batch.content]
            lit += sae.encode(x).shape[0]
    return lit
