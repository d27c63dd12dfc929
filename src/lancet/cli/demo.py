"""`lancet demo`: the whole story on the embedded model. Which feature is the bridge comes from the SAE's own table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.cli import show
from lancet.cli.read import recipe
from lancet.cli.steer import side_by_side

if TYPE_CHECKING:
    from lancet.lab import Lab

CONCEPT = "golden_gate_bridge"
READ = "The Golden Gate Bridge is located in San Francisco."
ABOUT = (
    "We drove across the Golden Gate Bridge before breakfast.",
    "The Golden Gate Bridge is painted a colour called International Orange.",
    "From the ferry the Golden Gate Bridge looked small.",
)
OTHERS = (
    "The recipe asks for two eggs and a cup of flour.",
    "The dentist told her to open her mouth a little wider.",
    "He lost the chess game in eleven moves.",
    "London has many parks, and most of them are free.",
)
PROMPT = "I went to the grocery store to buy"
STRENGTHS = (0.6, 1.0, 1.3)  # of the dose that the model card recommends
SEEDS = (1, 2)


def run(out: Path, device: str, dtype: str, json: bool) -> None:
    from lancet.errors import LancetError
    from lancet.lab import open_lab

    with show.working("opening smollm2"):
        lab = open_lab("smollm2", None, device, dtype, show.say)
    entry = lab.facts().concepts.get(CONCEPT)
    if entry is None:
        raise LancetError(f"the SAE's table has no concept {CONCEPT}; install the package again")
    out.mkdir(parents=True, exist_ok=True)
    told = {
        "read": _read(lab, out, json),
        "fires": _fires(lab, entry["feature"], json),
        "steer": _steer(lab, entry, json),
    }
    if json:
        show.as_json(told)
    else:
        show.line(
            f'\nThe pictures are in {out.resolve()}. Next: lancet read "your own text", lancet doctor, lancet --help'
        )


def _read(lab: Lab, out: Path, json: bool) -> dict[str, Any]:
    reading = lab.read(READ, top=6)
    spot = reading.at("Bridge")
    pictures = [reading.plot(out / "score.png"), reading.plot(out / "spectrum.png", at="Bridge")]
    if not json:
        show.heading(f'1. What {lab.model.name} has in mind at "Bridge" in: {READ}')
        recipe(spot, 6, dense=False)
    return {"text": READ, "top": [vars(lit) for lit in spot.top(6)], "pictures": [str(p) for p in pictures]}


def _fires(lab: Lab, feature: int, json: bool) -> list[dict[str, Any]]:
    rows = []
    for about, sentences in ((True, ABOUT), (False, OTHERS)):
        for sentence in sentences:
            values = lab.read(sentence).features.of_feature(feature)
            rows.append({"about": about, "text": sentence, "strongest": float(values.max())})
    if not json:
        show.heading(f"2. Feature #{feature} lights where the bridge is, and nowhere else")
        most = max(row["strongest"] for row in rows)
        listed = [[row["text"], f"{row['strongest']:.1f}", show.bar(row["strongest"], most)] for row in rows]
        show.table(["sentence", "strongest", ""], listed, right=["strongest"])
    return rows


def _steer(lab: Lab, entry: dict[str, Any], json: bool) -> list[dict[str, Any]]:
    dose = entry["dose_rn"]
    edits = [f"{CONCEPT} += {dose * strength:.2f}rn" for strength in STRENGTHS]
    jobs = [(PROMPT, edit, seed, edit or "plain") for edit in (None, *edits) for seed in SEEDS]
    rows = lab.run(jobs, tokens=28)
    if not json:
        parts = entry.get("blend")
        what = f"a blend of {len(parts)} features" if parts else f"feature #{entry['feature']}"
        show.heading(f"3. The same shopping trip, with {what} pushed harder and harder: {PROMPT} ...")
        side_by_side(rows, PROMPT)
        hits = re.compile(r"bridge|golden gate|san francisco", re.IGNORECASE)
        told = [[row.name, row.sampling.seed, len(hits.findall(row.text))] for row in rows]
        show.table(["edit", "seed", "bridges in it"], told, right=["seed", "bridges in it"])
    return [row.to_json() for row in rows]
