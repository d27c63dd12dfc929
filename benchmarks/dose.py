"""A dose sweep of 16 strengths x 4 prompts x 20 tokens, in batches against one row after another.

The same function on both sides, measuring included; the one-by-one side writes and scores each continuation alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import pairs
from benchmarks.measure import Figure, Settings, check, in_turns, ratio

STRENGTHS, TOKENS, BAR = 16, 20, 0.25


def run(settings: Settings) -> Iterator[Figure]:
    import torch

    from lancet.prompts import CALIBRATION
    from lancet.sweep import Text, write

    torch.set_num_threads(settings.threads)
    lab = pairs.smollm2(settings, "float32")
    lab.model.hf.generation_config.eos_token_id = None  # type: ignore[union-attr] - every row is as long as any other
    arms = {f"{i}": f"#123 += {0.05 * (i + 1):.2f}rn" for i in range(STRENGTHS)}

    def sweep(rows_at_once: int | None) -> dict[str, list[Text]]:
        return write(lab, arms, CALIBRATION[:4], (0,), TOKENS, {}, rows_at_once=rows_at_once)

    together, alone = sweep(None), sweep(1)
    same = sum(a.ids == b.ids for arm in together for a, b in zip(together[arm], alone[arm], strict=True))
    check(same >= 0.9 * 4 * (STRENGTHS + 1), f"only {same} of {4 * (STRENGTHS + 1)} continuations are the same text")
    taken = in_turns({"sweep": lambda: sweep(None), "one by one": lambda: sweep(1)}, settings.repeats, warm_up=0)
    yield ratio("dose sweep, 16 strengths x 4 prompts x 20 tokens", taken, "sweep", "one by one", BAR)
