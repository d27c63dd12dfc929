"""What `lancet eval --json` said about SAEs, each figure with the SAE that it is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lancet import names
from lancet.addressed import RECORD
from lancet.errors import DamagedError, MismatchError, UsageError
from lancet.files import read_json
from lancet.publishing.gather import Trained
from lancet.publishing.private import without_paths


@dataclass(frozen=True)
class Scored:
    """An evaluation.

    Attributes:
        text: what was read; tokens: how many of it.
        of: an SAE's folder in the repository -> its figures, under the names of docs/json.md.
    """

    text: str
    tokens: int
    of: dict[str, dict[str, Any]]


def read(files: Sequence[Path], saes: Sequence[Trained]) -> list[Scored]:
    """The evaluations in files that `lancet eval --json` wrote.

    Raises:
        UsageError: a file cannot be read, or is about none of the SAEs.
        MismatchError: it was made with another model.
        DamagedError: it is not JSON.
    """
    return [_read(file, saes) for file in files]


def _read(file: Path, saes: Sequence[Trained]) -> Scored:
    if not file.is_file():
        raise UsageError(f"no file {file}; give what `lancet eval --json` printed")
    told = read_json(file)
    try:
        model, entries, out = told["model"], told["saes"], Scored(without_paths(told["text"]), int(told["tokens"]), {})
        by_weights = {entry["fingerprint"]: entry for entry in entries}
        for sae in saes:
            if (found := by_weights.get(sae.fingerprint)) is not None:
                _check_model(file, model, sae)
                out.of[sae.folder] = without_paths(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{file} is not what `lancet eval --json` prints (no {error}); evaluate again") from error
    if not out.of:
        there = ", ".join(f"{entry['name']} ({entry['d_sae']:,} features at {entry['site']})" for entry in entries)
        raise UsageError(
            f"{file} has figures of {there}, and of none of the SAEs that are published, by their weights; was one of "
            f"them trained again since? Evaluate it again, or leave the file out"
        )
    return out


def _check_model(file: Path, model: str, sae: Trained) -> None:
    trained = read_json(sae.source / RECORD)["model"]["name"]
    if Path(model).name != Path(trained).name and not names.same(model, sae.base):
        raise MismatchError(f"{file} was made with {Path(model).name}, {sae.source} was trained on {sae.base}")
