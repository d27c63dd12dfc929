"""Writes into the shipped facts and the model card what makes the model say a concept, and how much of it: the benchmarks' findings.

    python recipes/smollm2/doses.py

Of each concept of `benchmarks/meaning_dose.json` that has no blend yet the recommended one, with its dose and its
report; of `benchmarks/meaning_ablate.json` the features whose lowering stops refusals, as the blend `refusal`; and
`love`, found in `benchmarks/sentences/love.txt`. The model card gets a table of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lancet
from lancet.facts import Facts
from lancet.files import read_json, text_lines, whole_file
from lancet.loading import assets

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HEADING = "## Recommended doses"
PART = re.compile(r"(?:(-?[\d.]+(?:e[-+]?\d+)?) \* )?#(\d+)")


def dosed(entry: dict[str, Any]) -> dict[str, Any] | None:
    """Blend, dose and report of one concept, None where nothing was recommended or it is no amount in rn."""
    edit, _, amount = (entry["recommended"] or "").rpartition(" += ")
    row = next((row for row in entry["report"] if row["edit"] == entry["recommended"]), None)
    if row is None or not amount.endswith("rn"):
        return None
    figures = {name: row[name][0] for name in ("extra", "repeats")} | {"says": row["concept"]["keywords"][0]}
    blend = [[int(index), float(weight or 1)] for weight, index in PART.findall(edit)]
    return {"blend": blend, "dose_rn": float(amount[:-2]), "how": row["way"], "said": figures}


def table(measured: dict[str, Any]) -> str:
    """The model card's section: what is recommended, beside DiffMean at its own best dose."""
    lines = [
        HEADING,
        "",
        "Forty continuations of forty tokens on prompts and seeds that chose nothing (`python -m benchmarks.meaning_dose`): share that has one of "
        "the concept's keywords as whole words, extra nats a token under the plain model, score (harmonic mean of the share, fluency and "
        "freshness). Each blend has up to 24 features, fitted to first mentions.",
        "",
        "| concept | dose | says it | extra nats | score | DiffMean's score |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in measured["summary"]["each"].items():
        ours, theirs = entry["recommended"], entry["DiffMean"]
        lines.append(
            f"| {name} | {ours['amount']} | {ours['says']:.2f} | {ours['extra']:+.2f} | {ours['score']:.2f} | "
            f"{theirs.get('score', 0):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    lab = lancet.open("smollm2", device="cpu", dtype="float32")
    path = assets() / "smollm2" / str(lab.sae().site) / "facts.safetensors"
    facts = Facts.load(path)
    measured = read_json(BENCHMARKS / "meaning_dose.json")
    for name, entry in measured["concepts"].items():
        known = facts.concepts[name]
        if "report" not in known and (found := dosed(entry)):
            known.update(found)
    cut = read_json(BENCHMARKS / "meaning_ablate.json")["chosen"]
    blend = [[index, 1.0] for index in cut["features"]]
    facts.concepts["refusal"] = {
        "feature": blend[0][0],
        "blend": blend,
        "cut": f"refusal += {cut['to']:g} @ prompt",
        "how": "lowering them stops refusals; raising them causes none",
    }
    love = lab.find(text_lines(BENCHMARKS / "sentences" / "love.txt"))
    best = love.candidates[0]
    facts.concepts["love"] = {
        "feature": best.feature,
        "auroc": round(best.auroc, 4),
        "blend": [list(part) for part in love.parts],
        "how": "found in twelve sentences",
    }
    facts.save(path)
    card = path.with_name("README.md")
    text = card.read_text(encoding="utf-8").partition(HEADING)[0].rstrip()
    with whole_file(card) as temporary:
        temporary.write_text(f"{text}\n\n{table(measured)}", encoding="utf-8")
    print({name: facts.concepts[name] for name in ("refusal", "love")})


if __name__ == "__main__":
    main()
