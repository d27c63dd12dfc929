"""Whole processes from the shell and back, with all files in the page cache and facts in place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import pairs
from benchmarks.measure import Figure, Settings, in_turns, process, ratio, remark

HELP_BAR, PLAIN_BAR, TUTORIAL_BAR = 0.25, 1.5, 0.4
PYTHON = sys.executable


def run(settings: Settings) -> Iterator[Figure]:
    lancet = Path(PYTHON).with_name("lancet")

    remark("lancet --help")
    sides = {"lancet --help": process([lancet, "--help"]), "import torch": process([PYTHON, "-c", "import torch"])}
    yield ratio(
        "lancet --help / import torch", in_turns(sides, settings.repeats), "lancet --help", "import torch", HELP_BAR
    )

    from lancet import embedded
    from lancet.precision import choose_dtype

    remark("lancet read on smollm2")
    folder = embedded.SMOLLM2.ensure()
    dtype = str(choose_dtype("auto", "cpu")[0]).removeprefix("torch.")
    if dtype == "bfloat16":
        folder = embedded.bfloat16_folder(folder)
    sae = pairs.smollm2_sae(settings)
    command = [lancet, "read", pairs.SENTENCE, "--device", "cpu", *(["--sae", sae] if sae else [])]
    layer = pairs.smollm2(settings, dtype).sae().site.layer
    plain = [PYTHON, "-m", "benchmarks.plain", str(folder), dtype, str(layer), pairs.START, pairs.SENTENCE]
    taken = in_turns({"lancet read": process(command), "plain script": process(plain)}, settings.repeats)
    name = f"lancet read, smollm2, {pairs.smollm2_named(settings)}, {dtype}"
    yield ratio(name, taken, "lancet read", "plain script", PLAIN_BAR)

    remark("lancet read on GPT-2's shape")
    pairs.gpt2(settings)  # so that its facts are in place
    model, sae = map(str, pairs.gpt2_folders(settings))
    options = ["--model", model, "--sae", sae, "--device", "cpu", "--dtype", "float32", "--anyway"]
    ours = process([lancet, "read", pairs.PROMPT, *options], LANCET_CACHE=str(pairs.cache(settings)))
    theirs = process([PYTHON, "-m", "benchmarks.tutorial", model, sae, pairs.PROMPT])
    taken = in_turns({"lancet read": ours, "tutorial": theirs}, settings.repeats)
    yield ratio("lancet read, GPT-2 shape, float32", taken, "lancet read", "tutorial", TUTORIAL_BAR)
