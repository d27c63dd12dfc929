"""What a fresh process takes that opens the embedded pair and reads one sentence, as Linux counts it.

`python -m benchmarks.memory DTYPE [SAE_FOLDER]` is that process. Anonymous memory is what the process made for itself;
the rest of the resident set is files mapped, weights above all, which the system can drop and share.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks import pairs
from benchmarks.measure import Figure, Settings, process, remark


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


def mapped() -> dict[str, float]:
    """Resident and anonymous memory of this process, and its peak, in MB (10^6 bytes).

    The peak is VmHWM: getrusage's ru_maxrss begins with the peak of the process that started this one.
    """
    text = Path("/proc/self/smaps_rollup").read_text() + Path("/proc/self/status").read_text()
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    names = {"resident": "Rss", "anonymous": "Anonymous", "peak resident": "VmHWM"}
    return {name: int(kilobytes[key]) * 1024 / 1e6 for name, key in names.items()}


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
    child(*sys.argv[1:])
