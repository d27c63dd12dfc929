"""What mixed directions do on the embedded model: python -m benchmarks.meaning_mix [--strengths 0.45] [--seeds 8]

Eighty sampled continuations of forty tokens (ten neutral beginnings, eight seeds, the same draws for every row) under
each direction; counted is the share that mentions a concept's keywords as whole words. `romance` and `friendship` are
the blends of the SAE's card, `love` and `sex` the mean differences of sentences/love.txt and desire.txt. Writes
meaning_mix.json.

What should come out: `romance - friendship` and its opposite move the two rates in opposite directions; `without(love,
romance)` goes on about love and drops weddings and kisses; `love - sex`, the manual's own example, is shown as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPTS = (
    "I went to the grocery store to buy",
    "My friend told me that",
    "When I woke up this morning, I",
    "The best thing about the",
    "Once upon a time there was a",
    "In the middle of the room there was",
    "Last weekend we decided to",
    "I would like to tell you about",
    "The old man looked at the",
    "There are many reasons why",
)
LOVE = ("love", "loves", "loved", "loving", "beloved", "cherish", "cherished", "affection")
DESIRE = ("sex", "sexual", "lust", "desire", "naked", "aroused", "kiss", "kissed", "kissing", "passion")
DESIRE += ("lips", "bed", "body", "bodies")


def main() -> None:
    import lancet
    from lancet import bench
    from lancet.generate import Sampling

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.45], help="in rn")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--out", type=Path, default=HERE / "meaning_mix.json")
    asked = parser.parse_args()
    lab = lancet.open("smollm2", device="cpu", dtype="float32")
    own = HERE / "sentences"
    love, desire = (f'mean_difference("{own / name}.txt")' for name in ("love", "desire"))
    rows = {
        "romance": "romance",
        "friendship": "friendship",
        "romance - friendship": "romance - friendship",
        "friendship - romance": "friendship - romance",
        "without(romance, friendship)": "without(romance, friendship)",
        "without(friendship, romance)": "without(friendship, romance)",
        "love": love,
        "without(love, romance)": f"without({love}, romance)",
        "without(love, family)": f"without({love}, family)",
        "unit(romance) - unit(friendship)": "unit(romance) - unit(friendship)",
        "unit(friendship) - unit(romance)": "unit(friendship) - unit(romance)",
        "love - sex": f"{love} - {desire}",
        "sex - love": f"{desire} - {love}",
    }
    counted = {name: bench.concepts()[name].keywords for name in ("romance", "friendship", "family")}
    counted |= {"love": LOVE, "desire": DESIRE}
    rates: dict[str, dict[str, Any]] = {}
    shown: dict[str, str] = {}
    for strength in [0.0, *asked.strengths]:
        for name, expression in {"plain": ""}.items() if strength == 0 else rows.items():
            begun = time.perf_counter()
            edit = f"({expression}) += {strength}rn" if expression else None
            jobs = [(prompt, edit, seed, name) for prompt in PROMPTS for seed in range(asked.seeds)]
            texts = [row.text for row in lab.run(jobs, asked.tokens, Sampling(), rows_at_once=40)]
            at = f"{name} {strength}rn" if expression else name
            rates[at] = {key: share(texts, words) for key, words in counted.items()} | {"repeats": repeats(texts)}
            shown[at] = PROMPTS[0] + texts[0]
            told = "  ".join(f"{key} {value:.3f}" for key, value in rates[at].items())
            print(f"{at:<36} {told}  {time.perf_counter() - begun:.0f} s", flush=True)
    parts = {
        name: {
            "norm_rn": round(lab.direction(text).norm / lab.facts().norm, 4),
            **{
                key: round(lab.direction(text).cosine(lab.direction(part)), 4)
                for key, part in (("romance", "romance"), ("friendship", "friendship"), ("love", love), ("sex", desire))
            },
        }
        for name, text in rows.items()
    }
    lens = {name: lab.effect(text, count=12)[0].to_json() | {"target": name} for name, text in rows.items()}
    told = {
        "settings": {"prompts": PROMPTS, "seeds": asked.seeds, "tokens": asked.tokens, "keywords": counted},
        "rates": rates,
        "cosines": parts,
        "first_continuation": shown,
        "effects": lens,
    }
    asked.out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def share(texts: list[str], words: tuple[str, ...]) -> float:
    """The share of texts that hold one of the words as a whole one."""
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in words), re.IGNORECASE)
    return round(sum(bool(pattern.search(text)) for text in texts) / len(texts), 4)


def repeats(texts: list[str]) -> float:
    """The share of three-word runs that stood before in the same text."""
    again = total = 0
    for text in texts:
        words = text.split()
        runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
        again, total = again + len(runs) - len(set(runs)), total + len(runs)
    return round(again / max(1, total), 4)


if __name__ == "__main__":
    main()
