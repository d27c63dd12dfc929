"""Writes the repository as a folder, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lancet.addressed import CONFIG, RECORD, check_repo
from lancet.errors import UsageError
from lancet.files import sha256, whole_folder, write_json
from lancet.publishing.card import card
from lancet.publishing.gather import TAKEN, Trained, gather
from lancet.publishing.private import refuse_paths
from lancet.publishing.scored import read

CARD = "README.md"
INSIDE = "hub"  # the folder that is made in the SAEs' own unless another is named


@dataclass(frozen=True)
class File:
    """A file of the repository: its path there, its size and its hash."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Prepared:
    """A repository as a folder.

    Attributes:
        folder: where it lies.
        saes: what is in it, and files its files, the card first.
    """

    folder: Path
    saes: list[Trained]
    files: list[File]

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(file.bytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """{"folder", "bytes", "saes", "files"}."""
        return {
            "folder": str(self.folder),
            "bytes": self.bytes,
            "saes": [sae.to_json() for sae in self.saes],
            "files": [vars(file) for file in self.files],
        }


def prepare(
    folder: Path,
    repo: str | None = None,
    scored: Sequence[Path] = (),
    base_model: str | None = None,
    license: str | None = None,
    title: str | None = None,
    out: Path | None = None,
    unfinished: bool = False,
) -> Prepared:
    """Checks trained SAEs and writes the repository that is to be sent; nothing is asked of the network.

    Args:
        folder: an SAE that `lancet train` made, or a folder of several.
        repo: owner/name, which the card tells how to open.
        scored: files that `lancet eval --json` wrote.
        base_model, unfinished: as for `gather`; license, title: as for `card`.
        out: where it is written; left out, `hub` in `folder`. What an earlier preparation left there is replaced.

    Raises:
        UsageError: there is no trained SAE, `out` holds other things, a name cannot be; LancetError: the disk is full,
        or a path would leave. See also `gather` and `scored.read`.
    """
    if repo is not None:
        check_repo(repo)
    saes = gather(folder, base_model, unfinished)
    place = folder / INSIDE if out is None else out
    _check_place(place, saes)
    text = card(saes, repo, license, title, read(scored, saes))
    needed = sum((sae.source / file).stat().st_size for sae in saes for file in sae.files)
    with whole_folder(place, needed) as temporary:
        (temporary / CARD).write_text(text, encoding="utf-8")
        for sae in saes:
            _copy(sae, temporary / sae.folder)
        texts = [file for file in temporary.rglob("*") if file.suffix in (".md", ".json", ".csv")]
        refuse_paths(texts, [sae.source for sae in saes])
        paths = [CARD, *(f"{sae.folder}/{file}" for sae in saes for file in sae.files)]
        files = [File(path, (temporary / path).stat().st_size, sha256(temporary / path)) for path in paths]
    return Prepared(place, saes, files)


def _copy(sae: Trained, to: Path) -> None:
    to.mkdir()
    for name in sae.files:
        if name in (CONFIG, RECORD):
            write_json(to / name, sae.config if name == CONFIG else sae.record)
        else:
            shutil.copyfile(sae.source / name, to / name)


def _check_place(place: Path, saes: Sequence[Trained]) -> None:
    """Refuses a folder that holds anything but an earlier preparation: it would be replaced as a whole."""
    whole = place.resolve()
    is_above = any(whole in (source, *source.parents) for source in (sae.source.resolve() for sae in saes))
    if is_above or (place.exists() and not _is_earlier(place)):
        raise UsageError(f"{place} holds other things than an earlier preparation; choose another --out")


def _is_earlier(place: Path) -> bool:
    if not place.is_dir():
        return False
    inside = list(place.iterdir())
    folders = [each for each in inside if each.name != CARD]
    return not inside or (
        len(folders) < len(inside)
        and all(each.is_dir() and all(file.name in TAKEN for file in each.iterdir()) for each in folders)
    )
