"""What Lancet keeps on disk: listed, and deleted by name.

Everything in Lancet's own cache can be made or fetched again. Of Hugging Face's cache only the repositories that
Lancet opened are listed; they may be other programs' too, and go by name alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lancet import hub, published
from lancet.errors import LancetError, UnknownName
from lancet.files import cache_dir


@dataclass(frozen=True)
class Kept:
    """One thing on disk.

    Attributes:
        name: what `lancet cache prune` calls it.
        what: what it is, in words.
        bytes: what it takes.
        paths: its folders and files.
        own: whether it is in Lancet's cache.
    """

    name: str
    what: str
    bytes: int
    paths: tuple[Path, ...]
    own: bool = True

    def to_json(self) -> dict[str, Any]:
        """{"name", "what", "bytes", "own", "paths"}."""
        return {
            "name": self.name,
            "what": self.what,
            "bytes": self.bytes,
            "own": self.own,
            "paths": [str(path) for path in self.paths],
        }


def everything() -> list[Kept]:
    """All that is kept, the largest first."""
    found = [*_models(), *_saes(), *_rest(), *_hub()]
    return sorted((item for item in found if item.paths), key=lambda item: -item.bytes)


def chosen(names: Sequence[str]) -> list[Kept]:
    """The things of these names; a release's name stands for all its SAEs.

    Raises:
        UnknownName: nothing here is called so.
    """
    here = everything()
    out: list[Kept] = []
    for name in names:
        found = [item for item in here if item.name == name or item.name.startswith(f"{name}/")]
        if not found:
            raise UnknownName("thing in the cache", name, [item.name for item in here], "`lancet cache` lists all")
        out += [item for item in found if item not in out]
    return out


def delete(item: Kept) -> None:
    """Deletes a thing.

    Raises:
        LancetError: the system refuses.
    """
    for path in item.paths:
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise LancetError(f"cannot delete {path}: {error.strerror}; close what uses it and try again") from error


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; a link counts nothing, its target is counted."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def _models() -> list[Kept]:
    folder = cache_dir() / "models"
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [Kept(path.name, "model, converted", size(path), (path,)) for path in found if not path.name.startswith(".")]


def _saes() -> list[Kept]:
    return [
        Kept(f"{told['release']}/{told['id']}", "SAE, converted", size(path), (path,))
        for path, told in published.all_here()
    ]


def _rest() -> list[Kept]:
    root = cache_dir()
    kinds = {
        "facts": "what was measured about SAEs",
        "background": "what SAEs do on neutral text",
        "search": "what atlases are searched by",
        "checks": "what self-tests found",
        "basis": "in which basis SAEs of unknown origin were found to be",
        "hashes": "hashes of files",
        "catalogue": "the lists of SAEs and models, read out of their packages",
    }
    out = [
        Kept(name, what, size(root / name), (root / name,)) for name, what in kinds.items() if (root / name).is_dir()
    ]
    # What a kill left behind: a temporary name begins with a dot.
    left = [path for path in root.rglob(".*") if path.exists()]
    left = [path for path in left if not any(other in path.parents for other in left)]
    return [
        *out,
        Kept("leftovers", "half-written, left by a process that was killed", sum(map(size, left)), tuple(left)),
    ]


def _hub() -> list[Kept]:
    used = dict.fromkeys(hub.used(), "model or SAEs, in Hugging Face's cache")
    for _, told in published.all_here():
        used.setdefault(told["repo"], "source of a converted SAE, in Hugging Face's cache; needed no more")
    out = []
    for repo, what in used.items():
        folder = hub.storage(repo)
        if folder.is_dir():
            out.append(Kept(repo, what, size(folder), (folder,), own=False))
    return out
