"""What `dose` reaches on the concept bench: python -m benchmarks.meaning_dose [NAME...] [--again]

For each of 30 concepts (20 broad ones; 10 places and travel, the Golden Gate Bridge among them) the examples are the
bench's training lines and the keywords the bench's own, matched as whole words. What the examples suggest (the blend,
the fitted blend, the best feature) is swept beside DiffMean of the same examples over the same strengths on ten neutral
prompts, chosen there, and told on ten others with four seeds each: 40 continuations of 40 tokens. Everything is written
to meaning_dose.json after each concept; a concept that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

BROAD = (
    "dogs", "cats", "birds", "farm_animals", "rain_storm", "snow_winter", "music", "joy", "sadness", "fear", "anger",
    "school", "ocean_ship", "garden", "forest_mountains", "cooking",
    "football", "kings_history", "astronomy", "medicine",
)  # fmt: skip
PLACES = (
    "golden_gate_bridge", "eiffel_tower", "great_wall", "statue_of_liberty", "mount_fuji", "pyramids", "train_travel",
    "airplane", "camping", "old_ruins",
)  # fmt: skip
EXAMPLES = 40
STRENGTHS = ("0.4rn", "0.5rn", "0.6rn", "0.7rn")
HERE = Path(__file__).parent


def examples(name: str) -> list[str]:
    from lancet import bench

    templates = bench.concepts()[name].part("train")[:EXAMPLES]
    return [bench.expand(template, random.Random(f"{name} {i}")) for i, template in enumerate(templates)]


def verdict(kept: dict[str, Any]) -> dict[str, Any]:
    """The figures beside their bars."""
    said: dict[str, Any] = {"concepts": len(kept)}
    fine = {}
    for name, entry in kept.items():
        ours, theirs, plain = (told(entry, way) for way in ("recommended", "DiffMean", "plain"))
        bar = 0.8 if name in BROAD else 0.6
        within = bool(ours) and ours["extra"] <= 1.5 and ours["repeats"] < 0.1
        fine[name] = {
            "recommended": ours,
            "DiffMean": theirs,
            "plain_says": plain["says"],
            "passes": within and ours["says"] >= bar and plain["says"] <= 0.05,
            "against_diffmean": round((ours["score"] if ours else 0) - (theirs["score"] if theirs else 0), 3),
        }
    said["broad_at_0.8"] = sum(fine[n]["passes"] for n in BROAD if n in fine)
    said["places_at_0.6"] = sum(fine[n]["passes"] for n in PLACES if n in fine)
    said["bridge"] = fine.get("golden_gate_bridge", {}).get("passes")
    said["at_least_diffmean"] = sum(entry["against_diffmean"] >= 0 for entry in fine.values())
    said["ten_points_worse"] = [n for n, entry in fine.items() if entry["against_diffmean"] < -0.1]
    return said | {"each": fine}


def told(entry: dict[str, Any], way: str) -> dict[str, Any]:
    """One row of a report, in few figures; {} where it has none."""
    for row in entry["report"]:
        if row["edit"] == entry["recommended"] if way == "recommended" else row["way"] == way:
            figures = {name: row[name][0] for name in ("extra", "repeats", "distance")}
            return {"says": row["concept"]["keywords"][0], **figures, "score": row["score"], "amount": row["amount"]}
    return {}


def main() -> None:
    import lancet
    from lancet import bench

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*PLACES, *BROAD], help="concepts; the 30 where none is named")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "meaning_dose.json")
    asked = parser.parse_args()
    lab = lancet.open("smollm2", device=asked.device, dtype="float32")
    kept: dict[str, Any] = json.loads(asked.out.read_text(encoding="utf-8"))["concepts"] if asked.out.exists() else {}
    for name in asked.names:
        if name in kept and not asked.again:
            continue
        begun = time.perf_counter()
        found = lab.dose(
            like=examples(name),
            keywords=bench.concepts()[name].keywords,
            strengths=STRENGTHS,
            operations=("add",),
            baselines=("DiffMean",),
            keep=False,
        )
        entry = found.to_json(texts=False)
        entry["texts"] = [text.text for text in found.reported.texts[::8]] if found.reported else []
        kept[name] = entry
        figures = verdict(kept)
        text = json.dumps({"summary": figures, "concepts": kept}, ensure_ascii=False, indent=1)
        asked.out.write_text(text + "\n", encoding="utf-8")
        print(
            name,
            f"{time.perf_counter() - begun:.0f} s",
            found.chosen and found.chosen.way,
            figures["each"][name],
            flush=True,
        )
    print({k: v for k, v in verdict(kept).items() if k != "each"})


if __name__ == "__main__":
    main()
