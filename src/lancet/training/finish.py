"""The files of a trained SAE: sae-lens' two, and a record of how it was made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet import fingerprint
from lancet.addressed import RECORD
from lancet.files import explained, read_json, whole_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.training.trainer import Learner

VERSION = 1


def is_finished(folder: Path) -> bool:
    """Whether a folder holds an SAE that was trained to the end."""
    return (folder / RECORD).is_file() and bool(read_json(folder / RECORD).get("finished"))


def write(
    learner: Learner,
    batches: Sequence[Tensor],
    facts: dict[str, Any],
    told: dict[str, Any],
    folder: Path,
    beside: Path,
) -> dict[str, float]:
    """Writes an SAE, which cannot be trained on after that; the record comes last.

    Args:
        batches: raw activations [batch, d_in] of its site, to calibrate and to measure on.
        facts: for the metadata of its config, beside the site.
        told: for the record, beside what the SAE itself has to tell.
        beside: a folder on the same disk, made and deleted.

    Returns:
        L0 and explained variance as it is saved, and over how many tokens.
    """
    from lancet.loading import sae_from_folder
    from lancet.training.trainer import measured

    site = str(learner.spec.site)
    with whole_folder(beside) as temporary:
        learner.finish(batches, facts | {"hook_name": site}, temporary)
        saved = measured(temporary, batches)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("sae_weights.safetensors", "cfg.json"):
            os.replace(beside / name, folder / name)
        beside.rmdir()
    own = {
        "lancet_training": VERSION,
        "fingerprint": fingerprint.of_sae(sae_from_folder(folder)),
        "sae": asdict(learner.spec) | {"site": site},
        "steps": learner.step_number,
        "tokens": learner.trainer.n_training_samples,
        "last_step": learner.figures,
        "saved": saved,
        "versions": _versions(),
    }
    write_json(folder / RECORD, told | own)
    return saved


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    from lancet import __version__

    names = ("torch", "sae-lens", "transformers", "numpy")
    return {"lancet": __version__, "python": platform.python_version()} | {name: version(name) for name in names}
