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
from lancet.files import whole_folder
from lancet.loading import assets

HERE = Path(__file__).parent
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the recipe's texts")
    work = parser.parse_args().work
    recipe = tomllib.loads((HERE / "recipe.toml").read_text(encoding="utf-8"))
    folder = work / "atlas"
    lab = lancet.open("smollm2", dtype="float32", device="cpu")
    if not (folder / NAME).is_file():
        harvest(lab, corpus(work, "train"), folder, examples=recipe["atlas"]["examples"], say=print)
    packed(folder, assets() / "smollm2" / str(lab.sae().site) / INSIDE)


if __name__ == "__main__":
    main()
