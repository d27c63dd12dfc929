"""How a figure is taken and shown: two sides in turns, medians, a bar beside each figure.

Every ratio is taken within one run: after a warm-up the sides take turns (A B A B ...), so that whatever else the
machine does meets both alike.
"""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ENOUGH = 5  # repeats below which a median is a smoke test and is not kept
BUSY = 0.5  # load average above which figures are not to be trusted
ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens", "lancet-sae")


@dataclass(frozen=True)
class Settings:
    """How to run a subject.

    Attributes:
        repeats: timed runs of each side, after one that is not timed.
        threads: torch threads on both sides.
        work: folder that keeps the generated pair between runs.
        full: measure all features where a part is scaled otherwise.
    """

    repeats: int
    threads: int
    work: Path
    full: bool = False


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        name: what it is about.
        value: the figure, in `unit`.
        unit: "x" for a ratio, "s" or "MB".
        bar: the most it may be, None for a figure without a bar.
        detail: what it was made of.
        samples: side -> every timed run, in seconds or MB.
    """

    name: str
    value: float
    unit: str
    bar: float | None = None
    detail: str = ""
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return "" if self.bar is None else "pass" if self.value <= self.bar else "miss"

    def to_json(self) -> dict[str, Any]:
        samples = {side: [round(sample, 6) for sample in taken] for side, taken in self.samples.items()}
        return {**vars(self), "value": round(self.value, 4), "verdict": self.verdict, "samples": samples}


def in_turns(sides: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every timed run of each side, the sides taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + repeats):
        for name, side in sides.items():
            gc.collect()  # nobody pays for what another left behind
            begin = time.perf_counter()
            side()
            seconds = time.perf_counter() - begin
            if turn >= warm_up:
                taken[name].append(seconds)
    return taken


def ratio(name: str, taken: Mapping[str, Sequence[float]], ours: str, theirs: str, bar: float | None = None) -> Figure:
    """Median of one side over median of the other."""
    a, b = median(taken[ours]), median(taken[theirs])
    detail = f"{ours} {a:.3g} s, {theirs} {b:.3g} s"
    return Figure(name, a / b, "x", bar, detail, {ours: taken[ours], theirs: taken[theirs]})


def process(command: Sequence[str | Path], **environment: str) -> Callable[[], str]:
    """A function that runs a fresh process to its end and returns its output.

    Raises:
        SystemExit: the process failed; carries its last lines.
    """

    def run() -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
        return done.stdout

    return run


def check(equal: bool, what: str) -> None:
    """Stops a comparison of two sides that do not do the same work."""
    if not equal:
        raise SystemExit(f"the two sides differ: {what}")


def remark(text: str) -> None:
    """A line about what is going on, on standard error."""
    print(f"  {text}", file=sys.stderr, flush=True)


def machine(threads: int) -> dict[str, Any]:
    """The facts that figures depend on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    named = facts.get("model name", platform.processor())
    return named + (" with AVX-512 BF16" if "avx512_bf16" in facts.get("flags", "") else "")


HEADER = ("figure", "measured", "bar", "", "made of")
WIDTHS = (66, 10, 8, 5)


def line(cells: Sequence[str]) -> str:
    """One line of the table."""
    return "  ".join([*(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=False)), cells[-1]]).rstrip()


def cells(figure: Figure) -> tuple[str, str, str, str, str]:
    """A figure as the cells of a line."""
    digits = {"x": ".3f", "s": ".1f", "MB": ".0f", "": ".4f"}[figure.unit]
    bar = "-" if figure.bar is None else f"{figure.bar:g} {figure.unit}"
    return figure.name, f"{figure.value:{digits}} {figure.unit}".rstrip(), bar, figure.verdict, figure.detail
