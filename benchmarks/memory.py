"""What a fresh process takes that opens the embedded pair and reads one sentence, as Linux counts it.

`python -m benchmarks.memory DTYPE [SAE_FOLDER]` is that process; with MODEL_FOLDER as a third argument it opens that
pair instead, watched while it does. Anonymous memory is what the process made for itself;
the rest of the resident set is files mapped, weights above all, which the system can drop and share.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import pairs
from benchmarks.measure import Figure, Settings, process, remark

BEYOND = 300  # MB that opening may take beside the weights


def run(settings: Settings) -> Iterator[Figure]:
    if not Path("/proc/self/smaps_rollup").is_file():
        remark("this system does not tell; Linux does")
        return
    sae = pairs.smollm2_sae(settings)
    for dtype in ("float32", "bfloat16"):
        remark(f"smollm2, {dtype}")
        child = process([sys.executable, "-m", "benchmarks.memory", dtype, *([sae] if sae else [])])
        told = [json.loads(child()) for _ in range(settings.repeats)]
        for what in told[0]:
            samples = [one[what] for one in told]
            name = f"smollm2, {pairs.smollm2_named(settings)}, {dtype}: {what}"
            yield Figure(name, median(samples), "MB", samples={what: samples})
    yield from opening(settings)


def opening(settings: Settings) -> Iterator[Figure]:
    """What opening GPT-2 Small's shape and its SAE takes beside the weights: no second copy of either."""
    model, sae = map(str, pairs.gpt2_folders(settings))
    for dtype in ("float32", "bfloat16"):
        remark(f"GPT-2 Small's shape, {dtype}")
        child = process([sys.executable, "-m", "benchmarks.memory", dtype, sae, model])
        told = [json.loads(child()) for _ in range(settings.repeats)]
        for what, bar in (("peak anonymous beyond the weights", BEYOND), ("peak resident, mapped files and all", None)):
            samples = [one[what] for one in told]
            name = f"opening GPT-2 Small's shape with its SAE, {dtype}: {what}"
            yield Figure(name, median(samples), "MB", bar, samples={what: samples})


def mapped() -> dict[str, float]:
    """Resident and anonymous memory of this process, and its peak, in MB (10^6 bytes).

    The peak is VmHWM: getrusage's ru_maxrss begins with the peak of the process that started this one.
    """
    text = Path("/proc/self/smaps_rollup").read_text() + Path("/proc/self/status").read_text()
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    names = {"resident": "Rss", "anonymous": "Anonymous", "peak resident": "VmHWM"}
    return {name: int(kilobytes[key]) * 1024 / 1e6 for name, key in names.items()}


def opener(dtype: str, sae: str, model: str) -> None:
    """Opens a pair, looking at its own memory a thousand times a second, and prints the figures as JSON."""
    import interp_engine.arch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

    import lancet.reading
    import lancet.sae
    from lancet.loading import open_model, open_sae

    with watched() as peak:
        opened = open_model(model, "cpu", dtype)
        held, _ = open_sae(opened, sae, basis="centred")
    weights = sum(parameter.nbytes for parameter in opened.hf.parameters()) / 1e6
    weights += sum(tensor.nbytes for _, tensor in held.tensors()) / 1e6
    after = mapped()
    beyond = {"peak anonymous beyond the weights": peak.grown - weights}
    print(json.dumps(beyond | {"peak resident, mapped files and all": after["peak resident"], "weights": weights}))


def anonymous() -> float:
    """Anonymous memory of this process now, in MB: one small file, read in microseconds."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


@dataclass
class Peak:
    """How anonymous memory went, in MB: at the beginning, and the most that was seen."""

    first: float
    most: float

    @property
    def grown(self) -> float:
        """By how much it rose at the most."""
        return self.most - self.first


@contextmanager
def watched(every: float = 0.001) -> Iterator[Peak]:
    """Looks at this process' anonymous memory every so many seconds, from another thread."""
    first = anonymous()
    peak, over = Peak(first, first), threading.Event()

    def watch() -> None:
        while not over.wait(every):
            peak.most = max(peak.most, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        peak.most = max(peak.most, anonymous())


def child(dtype: str, sae: str | None = None) -> None:
    """Opens, reads, and prints the figures as JSON."""
    # What opening and reading would import, so that the growth is weights and values, not code.
    import interp_engine.arch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    import lancet.reading
    import lancet.sae
    from lancet.lab import open_lab

    imported = mapped()
    lab = open_lab("smollm2", sae, "cpu", dtype)
    reading = lab.read(pairs.SENTENCE)
    text = str(reading)
    after = mapped()
    assert len(text) > len(pairs.SENTENCE)
    grown = {f"{name}, over imports": after[name] - imported[name] for name in ("resident", "anonymous")}
    print(json.dumps(after | grown))


if __name__ == "__main__":
    (opener if len(sys.argv) == 4 else child)(*sys.argv[1:])
