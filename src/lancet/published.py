"""Published SAEs, each fetched and converted once and kept in the cache as safetensors.

The work is done by `python -m lancet.convert` in a process of its own; here it is started, listened to, and its result
put in place when it is whole. From then on the SAE is a folder that opens by memory map, without sae-lens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lancet import errors
from lancet.catalogue import Entry
from lancet.convert import LAYOUT, check_single
from lancet.errors import DamagedError, LancetError
from lancet.files import cache_dir, check_safetensors, read_json, whole_folder
from lancet.hub import Progress, Say


def root() -> Path:
    """Where the converted SAEs lie."""
    return cache_dir() / "saes"


def folder(entry: Entry) -> Path:
    """Where a converted SAE lies, or will lie."""
    return root() / entry.release / entry.id


def here(entry: Entry) -> bool:
    """Whether it is in the cache."""
    return (folder(entry) / "lancet.json").is_file()


def told(path: Path) -> dict[str, Any] | None:
    """What the converter wrote about a folder, None where it did not make it (or an older one did)."""
    file = path / "lancet.json"
    if not file.is_file() or not (path / "cfg.json").is_file():
        return None
    found = read_json(file)
    return found if found.get("layout") == LAYOUT and "release" in found else None


def all_here() -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, what is known of it) of every converted SAE in the cache."""
    for file in sorted(root().rglob("lancet.json")):
        if not any(part.startswith(".") for part in file.relative_to(root()).parts) and (known := told(file.parent)):
            yield file.parent, known


def ensure(entry: Entry, say: Say = lambda line: None, progress: Progress | None = None) -> Path:
    """The folder of a published SAE, fetching and converting it when it is not here yet.

    Raises:
        MissingError, UnknownName, UsageError, DamagedError: see `lancet.convert`.
    """
    out = folder(entry)
    if told(out) is not None:
        try:
            check_safetensors(out / "sae_weights.safetensors")
            return out
        except LancetError:
            say(f"{out} is damaged and is made again")
    check_single(entry)
    size = f" (about {entry.bytes / 1e6:,.0f} MB)" if entry.bytes else ""
    say(f"fetching {entry.name}{size} from {entry.repo}, once")
    with whole_folder(out) as temporary:
        _run(entry, temporary, say, progress)
    return out


def _run(entry: Entry, out: Path, say: Say, progress: Progress | None) -> None:
    command = [sys.executable, "-P", "-m", "lancet.convert", entry.release, entry.id, str(out)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, encoding="utf-8")
        failed: list[str] | None = None
        try:
            assert child.stdout is not None
            for line in child.stdout:
                report = json.loads(line)
                if "say" in report:
                    say(report["say"])
                elif "progress" in report and progress:
                    progress(*report["progress"])
                elif "error" in report:
                    failed = report["error"]
            code = child.wait()
        finally:  # Ctrl-C here ends it there too
            if child.poll() is None:
                child.kill()
                child.wait()
        if failed:
            raise _error(*failed)
        if code != 0:
            said.seek(0)
            last = next((line for line in reversed(said.read().splitlines()) if line.strip()), "it said nothing")
            raise DamagedError(f"converting {entry.name} failed with code {code}: {last[:300]}")


def _error(kind: str, message: str) -> LancetError:
    """The error that the converter raised, of the same class."""
    found = getattr(errors, kind, LancetError)
    error = LancetError.__new__(found)
    Exception.__init__(error, message)
    return error
