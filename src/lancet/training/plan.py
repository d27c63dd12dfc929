"""What a training takes, before it begins: how large batch and buffer may be, how many steps, what would fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lancet.errors import LancetError, UsageError
from lancet.passes import TOGETHER

if TYPE_CHECKING:
    from lancet.model import Model
    from lancet.training.config import Spec, TrainConfig

BATCHES = (4096, 2048, 1024, 512, 256)
STEPS = 800  # at least, rather than large batches: see docs/training.md
BLOCK = 131_072  # tokens of the buffer where nothing else is said
LARGEST = 4 * BLOCK  # and where --memory has room for more
LEAST = 4  # batches that a buffer holds at least
STATE = 16  # bytes of a parameter: itself, its gradient and Adam's two moments in float32
DENSE = 10  # arrays [batch, features] in float32 that a step holds at once
SPARSE = 4  # and in the TopK families on a processor, where activations are never held dense
ONCE = 0.999  # of the corpus, where it is gone through once: tokens that are left out would begin a second round
WIDE = 30  # arrays [tokens, width] that a pass of the model holds at once, the MLP's wider ones counted as several


@dataclass(frozen=True)
class Memory:
    """Bytes by what takes them, and what was chosen.

    Attributes:
        limit: that all may take.
        batch: tokens of a step.
        block: tokens of the buffer.
        parts: name -> bytes.
    """

    limit: int
    batch: int
    block: int
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.parts.items())
        return f"memory: {gigabytes(self.total)} of {gigabytes(self.limit)} GB: {parts}"


def plan(model: Model, config: TrainConfig) -> Memory:
    """Batch and buffer for a configuration.

    Raises:
        UsageError: it does not fit; says what would.
    """
    from lancet.units import size

    asked = size(config.memory)
    widths = {spec.site: model.d_site(spec.site) for spec in config.saes()}
    own = sum(p.nbytes for p in model.hf.parameters())
    limit = asked if asked is not None else _free(model) // 2 + own
    ideal = min(BLOCK if asked is None else LARGEST, config.tokens or LARGEST)
    item = 2 if config.buffer == "disk" else model.dtype.itemsize
    row = sum(item * width + 32 for width in widths.values())  # and its norm, its place in the order

    is_sparse = config.arch in ("topk", "batchtopk", "matryoshka") and model.device.type == "cpu"
    dense = SPARSE if is_sparse else DENSE

    def needs(specs: Sequence[Spec], batch: int, block: int) -> Memory:
        counts = [2 * widths[spec.site] * spec.features + 2 * spec.features + widths[spec.site] for spec in specs]
        parts = {
            "model": own + 4 * WIDE * TOGETHER * model.d_model,
            f"{len(specs)} SAE{'s' * (len(specs) > 1)} with gradients and Adam's moments": STATE * sum(counts),
            f"a step of {batch:,} tokens": 4
            * batch
            * (dense * max(s.features for s in specs) + 8 * max(widths.values())),
            f"a buffer of {block:,} tokens": row * block,
        }
        return Memory(limit, batch, block, parts)

    specs = config.saes()
    most = BATCHES if config.tokens is None else [b for b in BATCHES if config.tokens >= STEPS * b] or BATCHES[-1:]
    for batch in most if config.batch is None else (config.batch,):
        least = min(LEAST * batch, ideal)
        room = limit - needs(specs, batch, 0).total
        if room >= least * row:
            return needs(specs, batch, min(ideal, room // row))
    batch = config.batch or BATCHES[-1]
    smallest = needs(specs, batch, min(LEAST * batch, ideal))
    raise UsageError(f"{_refused(smallest, specs)}; {_would(smallest, specs, needs)}")


def _refused(smallest: Memory, specs: Sequence[Spec]) -> str:
    widest = max(spec.features for spec in specs)
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in smallest.parts.items())
    return (
        f"{widest:,} features do not fit: {gigabytes(smallest.total)} GB needed ({parts}), "
        f"{gigabytes(smallest.limit)} allowed"
    )


def _would(smallest: Memory, specs: Sequence[Spec], needs: Callable[..., Memory]) -> str:
    """What would fit: fewer features, fewer SAEs at once, or more memory."""
    from dataclasses import replace

    options = []
    width = max(spec.features for spec in specs) // 2
    while width >= 64:
        fewer = [replace(spec, features=min(spec.features, width)) for spec in specs]
        if needs(fewer, smallest.batch, smallest.block).total <= smallest.limit:
            options.append(f"--features {width}")
            break
        width //= 2
    if len(specs) > 1 and needs(specs[:1], smallest.batch, smallest.block).total <= smallest.limit:
        options.append("one SAE at a time")
    return f"what would: {', '.join([*options, f'--memory {_up(smallest.total)}'])}"


def steps_of(config: TrainConfig, tokens: int, batch: int) -> int:
    """The steps of a training on a corpus of so many tokens.

    Raises:
        UsageError: there is not one.
    """
    steps = (config.tokens or int(ONCE * tokens)) // batch
    if tokens < batch or not steps:
        fewest = min(tokens, config.tokens or tokens)
        raise UsageError(
            f"{fewest:,} tokens are fewer than one batch of {batch:,}; give more text (and --tokens), or a smaller "
            f"--batch such as {max(1, fewest // 8)}"
        )
    return steps


def check_disk(width: int, tokens: int, folder: Path, work: Path) -> None:
    """Raises LancetError where the disk has no room for activations.

    Args:
        width: of all sites together; tokens: of the corpus.
        folder: of those that are kept already.
        work: where there must be room.
    """
    kept = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    needs, free = 2 * width * tokens - kept, shutil.disk_usage(work).free
    if free < needs:
        raise LancetError(
            f"not enough disk space in {work}: {needs / 1e9:.1f} GB needed for the activations of {tokens:,} tokens, "
            f"{free / 1e9:.1f} GB free; free some space, or take --buffer memory"
        )


def _up(size: int) -> str:
    """A size that holds so many bytes."""
    if size < 10**9:
        return f"{-(-size // 10**6)}MB"
    return f"{-(-size // 10**8) / 10:g}GB"


def _free(model: Model) -> int:
    import torch

    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def gigabytes(size: int) -> str:
    """A size in GB, short."""
    return f"{size / 1e9:.1f}" if size >= 10**8 else f"{size / 1e9:.3f}"
