"""The effect lens over all features of the embedded pair; 1,024 of them and scaling, or all with --full."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks import pairs
from benchmarks.measure import Figure, Settings, in_turns, remark

PART = 1024
BAR = 120.0  # seconds, two cores


def run(settings: Settings) -> Iterator[Figure]:
    import torch

    from lancet import effect

    torch.set_num_threads(settings.threads)
    lab = pairs.smollm2(settings, "auto")
    sae = lab.sae()
    length = effect.STRENGTH * lab.facts().norm
    rows = sae.W_dec / sae.decoder_norm[:, None] * length
    count = sae.d_sae if settings.full else min(PART, sae.d_sae)
    remark(f"{count:,} of {sae.d_sae:,} features, {lab.model.notes[0]}")
    sides = {"top": lambda: effect.top(lab.model, sae.site, rows[:count])}
    taken = in_turns(sides, 1 if settings.full else settings.repeats, warm_up=0 if settings.full else 1)["top"]
    seconds = median(taken)
    dtype = str(lab.model.dtype).removeprefix("torch.")
    name = f"smollm2, {pairs.smollm2_named(settings)}, {dtype}: {sae.d_sae:,} features"
    detail = "all measured, once" if settings.full else f"{count:,} took {seconds:.3g} s, scaled"
    detail += f"; {settings.threads} threads"
    yield Figure(name, seconds * sae.d_sae / count, "s", BAR, detail, {"top": taken})
