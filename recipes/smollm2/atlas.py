"""Harvests the atlas that ships with the bundled SAE, and puts it into the package's assets.

    python recipes/smollm2/atlas.py --work WORK

Its text is the recipe's training text (WORK/texts.json). The size is a budget: model, SAE and atlas are to be at most
40 MB together, so the files are packed harder than those of a harvest at home.
"""

from __future__ import annotations

import argparse
import shutil
import tomllib
from pathlib import Path

import pyarrow.parquet as parquet
from text import corpus

import lancet
from lancet.atlas.finish import write_tables
from lancet.atlas.harvest import harvest
from lancet.atlas.manifest import FILES, NAME
from lancet.atlas.which import INSIDE
from lancet.files import read_json, whole_file, whole_folder
from lancet.loading import assets

HERE = Path(__file__).parent
HEADING, DOSES = "## The atlas", "## Recommended doses"
BUDGET = {"features.parquet": 4.0, "examples.parquet": 5.5, "passages.parquet": 6.0}  # MB


def packed(folder: Path, out: Path) -> None:
    """Copies an atlas, its tables compressed as hard as can be, in one row group each; facts ship beside the SAE."""
    with whole_folder(out) as temporary:
        for name in FILES:
            table = parquet.read_table(folder / name)
            write_tables(temporary / name, table.schema, [table], len(table), level=22)
            megabytes = (temporary / name).stat().st_size / 1e6
            print(f"{name}: {megabytes:.2f} MB of {BUDGET[name]} MB")
            if megabytes > BUDGET[name]:
                raise SystemExit(f"{name} is over its budget; lower [atlas] examples in recipe.toml")
        shutil.copyfile(folder / NAME, temporary / NAME)


def card(folder: Path, out: Path) -> None:
    """Puts a section about the atlas into the model card, before that of the doses."""
    told = read_json(folder / NAME)
    counted, megabytes = told["corpus"], sum(path.stat().st_size for path in out.iterdir()) / 1e6
    path = out.parent / "README.md"
    before, doses, after = path.read_text(encoding="utf-8").partition(DOSES)
    before = before.partition(HEADING)[0].rstrip()
    section = (
        f"{HEADING}\n\n`atlas/` is what {counted['tokens']:,} tokens of the training text ({counted['documents']:,} "
        f"documents) say about each feature, {megabytes:.1f} MB (`recipes/smollm2/atlas.py`): up to "
        f"{told['examples'][0]} of the strongest examples and {told['examples'][1]} of each fifth of the range. It is "
        f"text that the SAE was trained on, and many of the strongest examples are one template of the bench in "
        f"several forms. `lancet card 5743` shows it.\n\n"
    )
    with whole_file(path) as temporary:
        temporary.write_text(f"{before}\n\n{section}{doses}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the recipe's texts")
    work = parser.parse_args().work
    recipe = tomllib.loads((HERE / "recipe.toml").read_text(encoding="utf-8"))
    folder = work / "atlas"
    lab = lancet.open("smollm2", dtype="float32", device="cpu")
    if not (folder / NAME).is_file():
        harvest(lab, corpus(work, "train"), folder, examples=recipe["atlas"]["examples"], say=print)
    out = assets() / "smollm2" / str(lab.sae().site) / INSIDE
    packed(folder, out)
    card(folder, out)


if __name__ == "__main__":
    main()
