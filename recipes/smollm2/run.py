"""Trains the bundled SAE of smollm2, step by step; every step resumes after a kill.

    python recipes/smollm2/run.py --work DIR --novels DIR --self-written FILE [--only train]

Another training is another file of settings, its options first: --config my.toml --tokens 20k.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import concepts
import text

import lancet
from lancet.loading import open_model, open_sae
from lancet.training.finish import is_finished

HERE = Path(__file__).parent
STEPS = ("text", "train", "facts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for texts, the SAE and checkpoints")
    parser.add_argument("--novels", type=Path, required=True, help="folder of plain text files")
    parser.add_argument("--self-written", type=Path, required=True, help="JSONL of the model's own texts")
    parser.add_argument("--only", choices=STEPS, help="do this step and no more")
    parser.add_argument("--recipe", type=Path, default=HERE / "recipe.toml", help="another recipe.toml")
    parser.add_argument("--config", type=Path, default=HERE / "train.toml", help="another train.toml")
    parser.add_argument("--tokens", help="train on so many, such as 20k, instead of the file's")
    arguments = parser.parse_args()
    recipe = tomllib.loads(arguments.recipe.read_text(encoding="utf-8"))
    over = {} if arguments.tokens is None else {"tokens": arguments.tokens}
    config = lancet.TrainConfig.load(arguments.config, **over)
    steps = STEPS if arguments.only is None else (arguments.only,)
    work = arguments.work
    model = open_model("smollm2", dtype=recipe["dtype"])

    if "text" in steps and not (work / text.TEXTS).is_file():
        text.write(text.build(model, recipe, arguments.novels, arguments.self_written), work)
    if "text" in steps:
        for part in text.FILES:
            text.corpus(work, part)
    if "train" in steps and not is_finished(work / "sae"):
        lancet.train(model, text.corpus(work, "train"), config, work / "sae", say=lambda line: print(line, flush=True))
    if "facts" in steps:
        sae, _ = open_sae(model, str(work / "sae"))
        concepts.build(model, sae, work / "sae", recipe["text"]["manual"])


if __name__ == "__main__":
    main()
