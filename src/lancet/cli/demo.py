"""`lancet demo`: the whole story, on the embedded model or any other pair.

Which feature is the bridge, what makes the model say it and how strong that must be come from the SAE's own table where
it has one, and are found on the spot where it has none; nothing is a literal.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.cli import show
from lancet.cli.read import recipe
from lancet.cli.steer import side_by_side

if TYPE_CHECKING:
    from lancet.cli.opening import Choice
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
EXAMPLES = (
    "The Golden Gate Bridge was hidden in fog when our ferry passed.",
    "We walked across the Golden Gate Bridge and took pictures of the bay.",
    "From the hill you can see both towers of the Golden Gate Bridge.",
    "Painters work on the red steel of the Golden Gate Bridge all year.",
    "Our bus crossed the Golden Gate Bridge on the way to Sausalito.",
    "At sunset the Golden Gate Bridge glowed above the water.",
)
UNKNOWN_DOSE = 0.5  # rn, where no dose was measured
STRENGTHS = (0.6, 1.0, 1.3)  # of the dose that the model card recommends
SEEDS = (1, 2)


def run(out: Path, choice: Choice, json: bool) -> None:
    lab = choice.open()
    out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"read": _read(lab, out, json)}
    entry = lab.facts().concepts.get(CONCEPT) or _found(lab, told, json)
    told |= {"fires": _fires(lab, entry["feature"], json), "steer": _steer(lab, entry, json)}
    if json:
        show.as_json(told)
    else:
        show.line(
            f'\nThe pictures are in {out.resolve()}. Next: lancet read "your own text", lancet find, lancet --help'
        )


def _found(lab: Lab, told: dict[str, Any], json: bool) -> dict[str, Any]:
    """The bridge's entry for a pair without a table: its detector, and the blend that causes it."""
    from lancet import naming
    from lancet.cli import find as listed

    with show.working("finding the bridge in six sentences"):
        found = lab.find(EXAMPLES, at="Bridge", top=5, say=show.say)
    told["find"] = found.to_json()
    if not json:
        show.heading("The bridge's features, found in six sentences about it")
        listed.table(found, naming.load(lab.sae()))
    best = found.candidates[0]
    target = " + ".join(f"{weight:.4g} * #{feature}" for feature, weight in found.parts) or f"#{best.feature}"
    return {"feature": best.feature, "blend": list(found.parts), "dose_rn": UNKNOWN_DOSE, "target": f"({target})"}


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
    edits = [f"{entry.get('target', CONCEPT)} += {dose * strength:.2f}rn" for strength in STRENGTHS]
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
