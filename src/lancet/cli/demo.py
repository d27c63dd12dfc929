"""`lancet demo`: the whole story, on the embedded model or any other pair.

Which feature is the bridge is found on the spot. What makes the model say it and how strong that must be come from the
SAE's own table where it has one, and else from what was found; nothing is a literal.
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
DOSES, CALIBRATE, ON, LENGTH = ("0.3rn", "0.4rn", "0.5rn"), 3, 5, 24  # a dose in seconds; `lancet dose` takes its time
WORDS = ("bridge", "bridges", "Golden Gate", "San Francisco")
MIXED = {"love", "romance"}
REFUSAL = "refusal"
REQUESTS = ("What time is it at the moment?", "How many unread messages do I have?", "How do plants make food?")
STRENGTHS = (0.6, 1.0, 1.3)  # of the dose that the model card recommends
SEEDS = (1, 2)


def run(out: Path, choice: Choice, json: bool) -> None:
    lab = choice.open()
    out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"read": _read(lab, out, json)}
    found = _found(lab, told, json)
    entry = lab.facts().concepts.get(CONCEPT) or found
    told |= {"fires": _fires(lab, entry["feature"], json), "steer": _steer(lab, entry, json)}
    told |= {"dose": _dose(lab, entry, json)}
    if set(lab.facts().concepts) >= MIXED:
        told |= {"mix": _mix(lab, json)}
    if REFUSAL in lab.facts().concepts:
        told |= {"ablate": _ablate(lab, json)}
    if json:
        show.as_json(told)
    else:
        show.line(
            f'\nThe pictures are in {out.resolve()}. Next: lancet read "your own text", lancet find, lancet --help'
        )


def _found(lab: Lab, told: dict[str, Any], json: bool) -> dict[str, Any]:
    """The bridge, found: its detector, and the blend that causes it. It stands for the table where a pair has none."""
    from lancet.cli import find as listed

    with show.working("finding the bridge in six sentences"):
        found = lab.find(EXAMPLES, at="Bridge", top=5, say=show.say)
    told["find"] = found.to_json()
    if not json:
        show.heading("2. Which feature is the bridge? Found in six sentences about it")
        listed.table(found)
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
        show.heading(f"3. Feature #{feature} lights where the bridge is, and nowhere else")
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
        show.heading(f"4. The same shopping trip, with {what} pushed harder and harder: {PROMPT} ...")
        side_by_side(rows, PROMPT)
        hits = re.compile(r"bridge|golden gate|san francisco", re.IGNORECASE)
        told = [[row.name, row.sampling.seed, len(hits.findall(row.text))] for row in rows]
        show.table(["edit", "seed", "bridges in it"], told, right=["seed", "bridges in it"])
    return [row.to_json() for row in rows]


def _dose(lab: Lab, entry: dict[str, Any], json: bool) -> dict[str, Any]:
    """How strong it must be, chosen on a few prompts and told on others."""
    from lancet.cli import dose as listed
    from lancet.prompts import CALIBRATION, REPORT

    with show.working("a small sweep of strengths"):
        found = lab.dose(
            entry.get("target", CONCEPT),
            REPORT[:ON],
            keywords=WORDS,
            strengths=DOSES,
            operations=("add",),
            calibration=CALIBRATION[:CALIBRATE],
            report_seeds=1,
            tokens=LENGTH,
            baselines=("prompt prefix",),
            keep=False,
        )
    if not json:
        show.heading("5. How strong must it be? Chosen on three prompts, told on five others")
        listed.table(found)
    return found.to_json()


def _mix(lab: Lab, json: bool) -> dict[str, Any]:
    from lancet.cli import mix as listed

    with show.working("love - romance"):
        found = lab.mix("love - romance", near=4, opposed=2)
    if not json:
        show.heading("6. Feature algebra: love - romance")
        listed.told(found)
    return found.to_json()


def _ablate(lab: Lab, json: bool) -> list[dict[str, Any]]:
    """Requests that the model apologises for, and a question that it answers, without and with its refusing cut out."""
    from lancet.generate import Sampling

    cut = lab.facts().concepts[REFUSAL]["cut"]
    chats = [[{"role": "user", "content": text}] for text in REQUESTS]
    jobs = [(chat, edit, 0, "cut" if edit else "plain") for chat in chats for edit in (None, cut)]
    rows = lab.run(jobs, LENGTH, Sampling(temperature=0, repetition_penalty=1))
    if not json:
        show.heading(f"7. Refusing, cut out of the model: {cut}")
        texts = [" ".join(row.text.split()) for row in rows]
        pairs = zip(REQUESTS, texts[::2], texts[1::2], strict=True)
        show.table(["asked", "plain", "cut"], [list(row) for row in pairs])
    return [row.to_json() for row in rows]
