"""Which precision this processor is faster in, found out once by trying.

The processor's own flags do not tell: one with AVX-512 BF16 multiplied a prompt's matrices 1.8 times as fast in
float32 as in bfloat16, and others are said to be the other way round. The answer is kept, so that a machine always
chooses the same.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lancet.errors import DamagedError
from lancet.files import cache_dir, read_json, write_json

if TYPE_CHECKING:
    import torch

SHAPE = (1536, 576)  # of one weight; the embedded model's
ROWS = (1, 256)  # a token of a continuation, and a prompt
WEIGHTS = 16
TRIES = 5
WORTH = 1.1  # bfloat16 must be this much faster in both to be chosen: it costs precision


def prefers_bfloat16() -> bool:
    """Whether bfloat16 is clearly faster than float32 on this processor."""
    return min(speedups().values()) >= WORTH


def speedups() -> dict[str, float]:
    """{rows: float32's time over bfloat16's}, measured when first asked for, then read from the cache."""
    path = cache_dir() / "processor.json"
    key = _processor()
    try:
        kept = read_json(path) if path.is_file() else {}
    except DamagedError:
        kept = {}  # it is only a measurement: take it again
    if key not in kept:
        kept[key] = measure()
        write_json(path, kept)
    return kept[key]


def measure() -> dict[str, float]:
    """The same products in both precisions, in turns; the best of a few tries each. Takes about 0.3 s."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(SHAPE, generator=generator) for _ in range(WEIGHTS)]
    lists = {dtype: [weight.to(dtype) for weight in weights] for dtype in (torch.float32, torch.bfloat16)}
    out = {}
    for rows in ROWS:
        x = torch.randn(rows, SHAPE[1], generator=generator)
        best: dict[torch.dtype, float] = {}
        for _ in range(TRIES):
            for dtype, each in lists.items():
                best[dtype] = min(best.get(dtype, float("inf")), _seconds(x.to(dtype), each))
        out[str(rows)] = round(best[torch.float32] / best[torch.bfloat16], 3)
    return out


def _seconds(x: torch.Tensor, weights: list[torch.Tensor]) -> float:
    import torch

    begun = time.perf_counter()
    with torch.no_grad():
        for weight in weights:
            torch.nn.functional.linear(x, weight)
    return time.perf_counter() - begun


def _processor() -> str:
    """The processor's name, torch's version and its threads: what the answer depends on."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
        # A virtual machine may hide part of a processor under the same name, so its flags count too.
        name = f"{told.get('model name', name)} {hash_of(told.get('flags', told.get('Features', '')))}"
    except OSError:
        pass
    return f"{name}; torch {torch.__version__}; {torch.get_num_threads()} threads"


def hash_of(text: str) -> str:
    """Eight characters that stand for a text."""
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:8]
