"""The manifest of an atlas: whose it is, what was read for it, and whether it can be read here.

Its shape is in docs/atlas.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lancet.errors import DamagedError, MissingError
from lancet.files import read_json

VERSION = 1
NAME = "manifest.json"
FACTS = "facts.safetensors"  # of lancet.facts
FILES = ("features.parquet", "examples.parquet", "passages.parquet")


@dataclass(frozen=True)
class Manifest:
    """What an atlas says of itself.

    Attributes:
        model: the model's name.
        sae, site: the SAE's name and where it reads.
        d_sae: its number of features.
        key: what the SAE's names are kept under (`namefile.key`).
        tokens: how many tokens were read, start tokens left out.
        documents: how many documents they came from.
        scale: the largest activation of the histograms' bins, a power of two.
        positions: [10] tokens of each bin of positions.
        co_firing_tokens: tokens on which features that fire together were counted; co_firing_exact: all of them.
        lenses: the lenses that were run: "logit", "effect".
        told: the whole file.
    """

    model: str
    sae: str
    site: str
    d_sae: int
    key: str
    tokens: int
    documents: int
    scale: float
    positions: tuple[int, ...]
    co_firing_tokens: int
    co_firing_exact: bool
    lenses: frozenset[str]
    told: Mapping[str, Any]

    @property
    def where(self) -> str:
        """The SAE and its site in words, once where the one is called by the other."""
        return self.site if self.sae == self.site else f"{self.sae} at {self.site}"


def load(folder: Path) -> Manifest:
    """The manifest of an atlas' folder.

    Raises:
        MissingError: there is no such folder, or no atlas in it, or one that was not written to its end.
        DamagedError: it is of another version, or lacks what a manifest has, or files are missing beside it.
    """
    file = folder / NAME
    if not file.is_file():
        if any((folder / name).exists() for name in FILES):
            raise MissingError(
                f"the atlas in {folder} was not written to its end ({NAME} is missing); run `lancet harvest` again"
            )
        what = "holds no atlas" if folder.is_dir() else "is not here"
        raise MissingError(f"{folder} {what}; give an atlas' folder with --atlas, or make one with `lancet harvest`")
    told = read_json(file)
    version = told.get("lancet_atlas") if isinstance(told, dict) else None
    if version != VERSION:
        written = (told.get("versions") or {}).get("lancet", "?") if isinstance(told, dict) else "?"
        raise DamagedError(
            f"{file} is of version {version!r} (written by Lancet {written}), this Lancet reads version {VERSION}; "
            f"run `lancet harvest` again, or install the Lancet that wrote it"
        )
    if lacking := [name for name in FILES if not (folder / name).is_file()]:
        raise DamagedError(f"the atlas in {folder} lacks {', '.join(lacking)}; run `lancet harvest` again")
    try:
        return Manifest(
            model=str(told["model"]["name"]),
            sae=str(told["sae"]["name"]),
            site=str(told["sae"]["site"]),
            d_sae=int(told["sae"]["d_sae"]),
            key=str(told["sae"]["key"]),
            tokens=int(told["corpus"]["tokens"]),
            documents=int(told["corpus"]["documents"]),
            scale=float(told["scale"]),
            positions=tuple(int(count) for count in told["positions"]),
            co_firing_tokens=int(told["co_firing"]["tokens"]),
            co_firing_exact=bool(told["co_firing"]["exact"]),
            lenses=frozenset(name for name, run in told["lenses"].items() if run),
            told=told,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{file} is not an atlas' manifest ({error!r}); run `lancet harvest` again") from error
