"""Steered generation: one loop, many rows, each with its own edits.

The loop is transformers' greedy or sampling loop with the same inputs (so that an unedited row equals
`model.generate` bit for bit) and three differences: every forward pass is told which absolute positions it computes,
rows draw from shared uniform numbers, and tokens come out as they are made.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lancet.edit import BatchEdits, RowChange, hooks
from lancet.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.site import Site
    from lancet.tokens import Tokens


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen, by transformers' own processors.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: smallest set of tokens whose probabilities reach this; 1 keeps all.
        top_k: this many likeliest tokens; 0 keeps all.
        repetition_penalty: 1 changes nothing.
        seed: one uniform number for each (seed, step of the row), whatever the batch.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.1
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k, self.top_k >= 0, "0 (all) or more"),
            "repetition_penalty": (self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "above 0"),
        }
        for name, (got, fine, allowed) in checks.items():
            if not fine:
                raise UsageError(f"{name} must be {allowed}, got {got}")

    def processors(self) -> Any:
        """transformers' processors, in the order in which `generate` applies them."""
        from transformers.generation import logits_process as lp

        found = lp.LogitsProcessorList()
        if self.repetition_penalty != 1:
            found.append(lp.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            found.append(lp.TemperatureLogitsWarper(self.temperature))
        if self.temperature and self.top_k:
            found.append(lp.TopKLogitsWarper(self.top_k))
        if self.temperature and self.top_p < 1:
            found.append(lp.TopPLogitsWarper(self.top_p))
        return found


def draw(seed: int, step: int) -> float:
    """The uniform number in [0, 1) of one step under one seed, the same on every machine."""
    return random.Random(f"{seed}/{step}").random()


def choose(scores: Tensor, seeds: Sequence[int], step: int, greedy: bool) -> Tensor:
    """[rows] token ids from processed scores [rows, vocab]: the likeliest, or by inverse cumulative probability."""
    import torch

    if greedy:
        return scores.argmax(-1)
    cumulative = scores.double().softmax(-1).cumsum(-1)
    uniform = torch.tensor([draw(seed, step) for seed in seeds], dtype=torch.double, device=scores.device)
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return token.clamp_max(scores.shape[-1] - 1)


def rows(
    model: Model,
    prompts: Sequence[Tokens],
    changes: Sequence[dict[Site, RowChange]],
    tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    stop: bool = True,
) -> Iterator[list[int | None]]:
    """Generates all rows in one batch; yields one token a row a step, None for rows that have ended.

    Args:
        model: the model.
        prompts: one a row.
        changes: for each row its change at each site.
        tokens: the most new tokens.
        sampling: shared by all rows but for the seed.
        seeds: one a row.
        stop: end a row at the model's end-of-text tokens (the token itself is not yielded).

    Raises:
        UsageError: prompt and new tokens exceed the context.
    """
    import torch

    longest = max(map(len, prompts))
    if longest + tokens > model.context:
        raise UsageError(
            f"{longest} prompt tokens and {tokens} new ones exceed the context of {model.context}; ask for at most "
            f"{model.context - longest} tokens"
        )
    batch = model.batch(prompts, side="left")
    # Padding repeats the row's first token, so that the repetition penalty sees no token that the row does not have.
    ids = torch.where(batch.mask, batch.ids, batch.ids.gather(1, batch.mask.int().argmax(1, keepdim=True)))
    mask = batch.mask.long()
    first = [len(prompt) - longest for prompt in prompts]
    ends = model.ends if stop else set()
    processors, greedy = sampling.processors(), sampling.temperature == 0
    cache = model.new_cache(len(prompts))
    done = [False] * len(prompts)
    edits = {site: BatchEdits([change.get(site, RowChange([])) for change in changes]) for site in _sites(changes)}
    for step in range(tokens):
        # Hooks and mode are gone between tokens, where the caller may read or write another text with the same model.
        with torch.inference_mode(), ExitStack() as stack:
            new = ids if step == 0 else ids[:, -1:]
            begin = ids.shape[1] - new.shape[1]
            for edit in edits.values():
                edit.place([f + begin for f in first], new.shape[1])
            for site, function in hooks(edits):
                stack.enter_context(model.at(site, function))
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, begin:]
            out = model.forward(new, mask, positions, cache, last=True)
            scores = processors(ids, out[:, -1].float())
            if bool(scores.isnan().any()):
                raise UsageError(
                    f"the model's numbers ran over at new token {step + 1} (NaN): give the edits a smaller amount, or "
                    f"the model a dtype of wider range (bfloat16, float32)"
                )
            chosen = choose(scores, seeds, step, greedy)
            ids = torch.cat([ids, chosen[:, None]], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            made: list[int | None] = chosen.tolist()
        for i, token in enumerate(made):
            done[i] |= token in ends
        yield [None if over else token for token, over in zip(made, done, strict=True)]
        if all(done):
            return


def logits(model: Model, prompts: Sequence[Tokens], changes: Sequence[dict[Site, RowChange]]) -> Tensor:
    """[rows, seq, vocab] logits of whole texts in one uncached pass, right-padded, with each row's edits."""
    import torch

    batch = model.batch(prompts)
    edits = {site: BatchEdits([change.get(site, RowChange([])) for change in changes]) for site in _sites(changes)}
    with torch.inference_mode(), ExitStack() as stack:
        for edit in edits.values():
            edit.place([0] * len(prompts), batch.ids.shape[1])
        for site, function in hooks(edits):
            stack.enter_context(model.at(site, function))
        return model.forward(batch.ids, batch.mask.long())


def _sites(changes: Sequence[dict[Site, RowChange]]) -> list[Site]:
    return sorted({site for change in changes for site, row in change.items() if row})
