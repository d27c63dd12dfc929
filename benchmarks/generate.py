"""Steered generation: 64 new tokens, greedy, against transformers' own `generate` without any steering.

Same inputs and dtype, no early stop on either side. Lancet's side is `lab.generate` whole: the edit is parsed, its
target found, the text decoded and the recipe written within the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks import pairs
from benchmarks.measure import Figure, Settings, check, in_turns, ratio, remark

if TYPE_CHECKING:
    from lancet.lab import Lab

NEW = 64
ADD, SET = "#123 += 0.5rn", "#123 = 0.5rn"
FOUR = {"plain": None, "add": ADD, "another": "#456 += 0.5rn", "set": SET}
ADD_BAR, SET_BAR, ROWS_BAR = 1.05, 1.10, 1.6


def run(settings: Settings) -> Iterator[Figure]:
    import torch

    torch.set_num_threads(settings.threads)
    yield from compare(pairs.gpt2(settings), pairs.PROMPT, settings, "GPT-2 shape, float32")
    for dtype in ("float32", "bfloat16"):
        name = f"smollm2, {pairs.smollm2_named(settings)}, {dtype}"
        yield from compare(pairs.smollm2(settings, dtype), pairs.GROCERY, settings, name)


def compare(lab: Lab, prompt: str, settings: Settings, name: str) -> Iterator[Figure]:
    import torch

    from lancet import Sampling

    remark(name)
    hf: Any = lab.model.hf
    hf.generation_config.eos_token_id = None  # Lancet ends a text where transformers does: nowhere
    tokens = lab.tokenize(prompt)
    ids = torch.tensor([tokens.ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    greedy = Sampling(temperature=0, repetition_penalty=1)

    def theirs(rows: int = 1) -> Any:
        repeated = {name: value.repeat(rows, 1) for name, value in inputs.items()}
        return hf.generate(**repeated, pad_token_id=0, max_new_tokens=NEW, do_sample=False)

    def ours(edit: str | None) -> Any:
        return lab.generate(prompt, edit, NEW, greedy)

    def four() -> Any:
        return lab.compare(prompt, FOUR, NEW, greedy)

    check(ours(None).ids == tuple(theirs()[0, ids.shape[1] :].tolist()), f"unsteered text of {name}")
    check(all(len(row.ids) == NEW for row in four().values()), f"a row of {name} ended early")
    sides = {
        "transformers": theirs,
        "add": lambda: ours(ADD),
        "set": lambda: ours(SET),
        "four rows": four,
        "transformers' four": lambda: theirs(4),
    }
    taken = in_turns(sides, settings.repeats)
    yield ratio(f"{name}: #i += a", taken, "add", "transformers", ADD_BAR)
    yield ratio(f"{name}: #i = a", taken, "set", "transformers", SET_BAR)
    yield ratio(f"{name}: four rows / one", taken, "four rows", "add", ROWS_BAR)
    # How much a row more costs is the matrix library's affair: transformers' own four rows say how much.
    yield ratio(f"{name}: four rows / transformers' own four", taken, "four rows", "transformers' four")
