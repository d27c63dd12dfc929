"""What `find` reaches on the concept bench: python -m benchmarks.meaning_find [--causes] [--seeds N]

For each concept six sentences (training templates) and the bundled neutral text; scored on held-out templates, twelve
of each concept against those of all others. Beside it DiffMean and LDA from the same six. Writes meaning_find.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

SHOWN = 6
HERE = Path(__file__).parent


def main() -> None:
    import torch

    import lancet
    from lancet import background, bench
    from lancet.find import find
    from lancet.scoring import auroc

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--causes", action="store_true", help="rank by what candidates cause as well, as the command does"
    )
    parser.add_argument("--seeds", type=int, default=1, help="draws of the six sentences")
    parser.add_argument("--out", type=Path, help="meaning_find.json, or meaning_find_causes.json with --causes")
    asked = parser.parse_args()
    out = asked.out or HERE / ("meaning_find_causes.json" if asked.causes else "meaning_find.json")
    lab = lancet.open("smollm2", device="cpu", dtype="float32")
    sae = lab.sae()
    heldout = list(bench.sentences("heldout", 12, 11))
    labels = np.array([name for name, _ in heldout])
    held = background.statistics(lab.model, sae, [lab.tokenize(text) for _, text in heldout])
    base = background.of(lab.model, sae)
    centred = base.examples - base.examples.mean(0)
    covariance = centred.t() @ centred / len(centred)
    inverse = torch.linalg.inv(covariance + 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance)))
    rows: list[dict[str, Any]] = []
    for seed in range(asked.seeds):
        shown: dict[str, list[str]] = {}
        for name, text in bench.sentences("train", SHOWN, 100 + seed):
            shown.setdefault(name, []).append(text)
        for name, like in shown.items():
            begun = time.perf_counter()
            found = find(lab, like, causes=asked.causes)
            seconds = time.perf_counter() - begun
            first, few = found.candidates[0], torch.tensor(found.together)
            difference = found.diffmean.vector
            maxima = held.dense(few)
            together = base.maximum.surprise(few.repeat(held.count), maxima.flatten()).view(held.count, -1).sum(1)
            scores = {
                "one": held.dense(torch.tensor([first.feature]))[:, 0],
                "four": together,
                "DiffMean": held.values @ difference,
                "LDA": held.values @ (inverse @ difference),
            }
            measured = {
                key: round(float(auroc(value.numpy()[:, None], labels == name)[0]), 4) for key, value in scores.items()
            }
            rows.append({"concept": name, "seed": seed, "feature": first.feature, "fires": first.fires, **measured})
            rows[-1] |= {"detects": first.detects, "causes": first.causes, "seconds": round(seconds, 2)}
            print(rows[-1], flush=True)
    summary = {}
    for key in ("one", "four", "DiffMean", "LDA"):
        values = np.array([row[key] for row in rows])
        summary[key] = {
            "mean": round(float(values.mean()), 4),
            "at_least_0.9_of_60": round(float((values >= 0.9).mean() * 60), 1),
        }
    summary["below_0.9"] = [row for row in rows if row["one"] < 0.9]
    out.write_text(json.dumps({"causes": asked.causes, "summary": summary, "rows": rows}, indent=1) + "\n")
    print(json.dumps({key: value for key, value in summary.items() if key != "below_0.9"}))


if __name__ == "__main__":
    main()
