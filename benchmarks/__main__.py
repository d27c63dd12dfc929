"""python -m benchmarks [NAME...] [--repeats N] [--full]: prints every figure beside its bar and keeps them as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

SUBJECTS = {
    "generate": "steered generation against transformers' own, unsteered",
    "read": "reading a prompt against the tutorial's way",
    "cold": "whole processes, from the shell and back",
    "effect": "the effect lens over all features",
    "find": "finding a concept against reading its sentences",
    "atlas": "cards and searches at 131,072 features against 24,576",
    "harvest": "counting a corpus against its passes and dense encodes alone",
    "train": "training from text to folder against sae-lens' own runner",
    "dose": "a dose sweep in batches against one row after another",
    "memory": "what opening and reading takes",
    "million": "reading with a million features",
}
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SUBJECTS)}; all where none is named")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side (7); fewer than 5 are not kept")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (all cores)")
    parser.add_argument("--full", action="store_true", help="effect: all features, once, instead of 1,024 and scaling")
    parser.add_argument("--work", type=Path, default=HERE.parent / "work-benchmarks", help="keeps the generated pair")
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="where figures are kept")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(SUBJECTS):
        parser.error(f"no subject {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    if asked.repeats < 1 or asked.threads < 1:
        parser.error("--repeats and --threads must be at least 1")

    os.environ |= {
        "HF_HUB_OFFLINE": "1",  # before anything imports huggingface_hub; fresh processes inherit all of these
        "OMP_NUM_THREADS": str(asked.threads),
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    warnings.simplefilter("ignore")
    from benchmarks import measure

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > measure.BUSY:
        measure.remark(f"the machine is busy (load {load:.1f}); these figures are not to be trusted")
    settings = measure.Settings(asked.repeats, asked.threads, asked.work.resolve(), asked.full)
    facts = measure.machine(asked.threads)
    print("; ".join(f"{name} {fact}" for name, fact in facts.items()))
    missed = 0
    for name in asked.names or SUBJECTS:
        print(f"\n{name}: {SUBJECTS[name]}\n{measure.line(measure.HEADER)}", flush=True)
        figures = []
        for figure in import_module(f"benchmarks.{name}").run(settings):
            figures.append(figure)
            missed += figure.verdict == "miss"
            print(measure.line(measure.cells(figure)), flush=True)
        if asked.repeats >= measure.ENOUGH:
            measured = {"repeats": asked.repeats, "load": round(load, 2), "figures": [f.to_json() for f in figures]}
            keep(asked.out, name, {"machine": facts} | measured)
    if asked.repeats < measure.ENOUGH:
        measure.remark(f"fewer than {measure.ENOUGH} repeats: nothing was kept")
    sys.exit(1 if missed else 0)


def keep(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Writes one subject's figures, with the machine they come from; those of other subjects stay."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(kept | {name: entry}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


main()
