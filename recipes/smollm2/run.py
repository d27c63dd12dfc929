"""Trains the bundled SAE of smollm2, step by step; every step resumes after a kill.

python recipes/smollm2/run.py --work DIR --novels DIR --self-written FILE [--only harvest]
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import concepts
import harvest
import text
import train

from lancet.files import read_json, write_json
from lancet.loading import open_model, open_sae
from lancet.site import Site

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for texts, activations and checkpoints")
    parser.add_argument("--novels", type=Path, required=True, help="folder of plain text files")
    parser.add_argument("--self-written", type=Path, required=True, help="JSONL of the model's own texts")
    parser.add_argument("--only", choices=["text", "harvest", "train", "facts"], help="do this step and no more")
    arguments = parser.parse_args()
    recipe = tomllib.loads((HERE / "recipe.toml").read_text(encoding="utf-8"))
    site, work = Site.parse(recipe["site"]), arguments.work
    model = open_model("smollm2", dtype=recipe["dtype"])

    if not (work / "texts.json").exists():
        write_json(work / "texts.json", text.build(model, recipe, arguments.novels, arguments.self_written))
    texts = read_json(work / "texts.json")
    print({part: len(lines) for part, lines in texts.items()}, flush=True)
    if arguments.only in (None, "harvest"):
        for part, lines in sorted(texts.items()):
            harvest.harvest(model, lines, site, recipe["text"]["piece_tokens"], work / part, recipe["seed"])
    if arguments.only in (None, "train"):
        shards = sorted((work / "train").glob("*.safetensors"))
        facts = {"site": str(site), "model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
        train.train(recipe["sae"], shards, model.d_model, work / "sae", recipe["seed"], facts)
    if arguments.only in (None, "facts"):
        sae, _ = open_sae(model, str(work / "sae" / "sae"))
        concepts.build(model, sae, work / "sae", recipe["text"]["manual"])


if __name__ == "__main__":
    main()
