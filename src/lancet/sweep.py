"""Writes continuations under many edits in as few batches as memory allows, and measures each finished text.

Everything is measured on the text, read by the unedited model: what was injected is never its own proof. Rows with
different edits share a batch, all with the same random draws, and equal what each would be alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lancet.generate import Sampling

if TYPE_CHECKING:
    from lancet.lab import Edits, Lab, Prompt
    from lancet.model import Model
    from lancet.saying import Detector
    from lancet.tokens import Tokens

MOST_ROWS = 128
ROW_SHARE = 0.25  # of the free memory that a batch may take
SCORED_AT_ONCE = 1 << 29  # bytes of logits computed at once when texts are scored


@dataclass(frozen=True)
class Text:
    """One continuation and what was measured on it.

    Attributes:
        arm: the name of its edits.
        prompt, seed: which of the prompts it goes on from, and its draws.
        text, ids: what was written.
        nats: surprise, mean loss a token under the unedited model given the prompt; NaN where nothing was written.
        repeats: share of its 3-grams of tokens that occurred in it before.
        distance: token edit distance to the plain continuation of the same prompt and seed, over the longer one's
            length.
        says: detector -> whether the text says the concept.
    """

    arm: str
    prompt: int
    seed: int
    text: str
    ids: tuple[int, ...]
    nats: float = math.nan
    repeats: float = 0.0
    distance: float = 0.0
    says: dict[str, bool] = field(default_factory=dict)


def write(
    lab: Lab,
    arms: Mapping[str, Edits],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    tokens: int,
    detectors: Mapping[str, Detector],
    sampling: Sampling | None = None,
    say: Callable[[str], None] = lambda line: None,
    rows_at_once: int | None = None,
    prefixes: Mapping[str, str] | None = None,
) -> dict[str, list[Text]]:
    """Continues every prompt with every seed under every arm's edits, and measures.

    Args:
        arms: name -> edits; `None` for plain text. The arm "plain" is written in any case, and is what distances are
            taken from.
        prompts, seeds: each with each.
        tokens: new tokens a row.
        detectors: name -> which texts say the concept; each is called once on all texts.
        say: called with a line now and then.
        prefixes: arm -> text put before every prompt that is plain text; the surprise is that of the continuation
            given the prompt without it.
        rows_at_once: rows of a batch; what a quarter of the free memory holds where None.

    Returns:
        arm -> its texts, prompts outermost.
    """
    arms = {"plain": None, **arms}
    ready = [lab.tokenize(prompt) for prompt in prompts]
    fed = {
        (arm, p): _prefixed(lab, prompts[p], text) for arm, text in (prefixes or {}).items() for p in range(len(ready))
    }
    keys = [(arm, p, seed) for arm in arms for p in range(len(ready)) for seed in seeds]
    # Prompts of like length share a batch: the least padding, whatever was given.
    order = sorted(range(len(keys)), key=lambda i: len(ready[keys[i][1]]))
    longest = max(map(len, [*ready, *fed.values()])) + tokens
    rows_at_once = rows_at_once or batch_rows(lab.model, longest)
    found: dict[int, Text] = {}
    for first in range(0, len(order), rows_at_once):
        part = [keys[i] for i in order[first : first + rows_at_once]]
        jobs = [(fed.get((arm, p), ready[p]), arms[arm], seed, arm) for arm, p, seed in part]
        made = lab.run(jobs, tokens, sampling, rows_at_once=rows_at_once)
        if len(made) < len(part) or any(row.ended == "interrupted" for row in made):
            raise KeyboardInterrupt  # half a sweep would be a wrong table
        nats = surprises(lab.model, [(ready[p], row.ids) for (_, p, _), row in zip(part, made, strict=True)])
        for i, (arm, p, seed), row, loss in zip(order[first : first + rows_at_once], part, made, nats, strict=True):
            found[i] = Text(arm, p, seed, row.text, row.ids, loss, repeats(row.ids))
        say(f"{min(first + rows_at_once, len(order))} of {len(order)} continuations")
    texts = [found[i] for i in range(len(keys))]
    said = {name: list(detect([text.text for text in texts])) for name, detect in detectors.items()}
    plain = {(text.prompt, text.seed): text for text in texts if text.arm == "plain"}
    out: dict[str, list[Text]] = {arm: [] for arm in arms}
    for i, text in enumerate(texts):
        far = distance(text.ids, plain[text.prompt, text.seed].ids)
        out[text.arm].append(replace(text, distance=far, says={name: bool(row[i]) for name, row in said.items()}))
    return out


def _prefixed(lab: Lab, prompt: Prompt, text: str) -> Tokens:
    return lab.tokenize(text + prompt if isinstance(prompt, str) else prompt)


def batch_rows(model: Model, length: int) -> int:
    """How many rows of so many tokens a batch may have: keys, values and the sampler's copies of the logits."""
    config: Any = model.hf.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = 2 * model.n_layers * heads * width * length * model.dtype.itemsize
    sampled = 40 * model.d_vocab  # two float32 and four float64 of the last position
    return max(1, min(MOST_ROWS, int(ROW_SHARE * _free(model) / (2 * kept + sampled))))


def _free(model: Model) -> float:
    import torch

    if model.device.type == "cuda":
        return torch.cuda.mem_get_info(model.device)[0]
    import psutil

    return psutil.virtual_memory().available


# ---- what is measured on a text ------------------------------------------------------------------------------------


def surprises(model: Model, texts: Sequence[tuple[Tokens, Sequence[int]]]) -> list[float]:
    """Mean loss in nats a token of each continuation under the unedited model, given its prompt.

    Args:
        texts: (prompt, new token ids).

    Returns:
        one for each text; NaN for an empty continuation.
    """
    import torch

    out = [math.nan] * len(texts)
    order = sorted((i for i, (_, new) in enumerate(texts) if new), key=lambda i: len(texts[i][0]) + len(texts[i][1]))
    for part in _steps(order, lambda i: len(texts[i][0]) + len(texts[i][1]), model.d_vocab):
        ids = [[*texts[i][0].ids, *texts[i][1]] for i in part]
        batch = model.batch(ids)
        with torch.inference_mode():
            logits = model.forward(batch.ids, batch.mask.long())
            for row, i in enumerate(part):
                begin, end = len(texts[i][0]) - 1, len(ids[row]) - 1
                told = logits[row, begin:end].float().log_softmax(-1)
                new = torch.tensor(list(texts[i][1]), device=told.device)
                out[i] = float(-told.gather(1, new[:, None]).mean())
    return out


def _steps(order: Sequence[int], length: Callable[[int], int], vocab: int) -> list[list[int]]:
    """Texts in groups whose logits stay below SCORED_AT_ONCE; lengths ascend."""
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * length(i) * vocab * 4 <= SCORED_AT_ONCE:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def repeats(ids: Sequence[int]) -> float:
    """Share of the 3-grams of tokens that occurred in the text before; 0 where there is none."""
    grams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distance(a: Sequence[int], b: Sequence[int]) -> float:
    """Levenshtein distance of two token sequences over the longer one's length; 0 for two empty ones."""
    if a == b:
        return 0.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1] / max(len(a), len(b))
