"""Checkpoints of all SAEs of a training at one step: folders of safetensors and JSON; the newest alone is kept."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.errors import DamagedError
from lancet.files import read_json, whole_folder, write_json
from lancet.site import Site

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.training.trainer import Learner

STATE, REST = "state.json", "rest.safetensors"


@dataclass
class Place:
    """Where in the text a training is.

    Attributes:
        block: the number of the block at hand, counted through all rounds.
        given: site -> batches of the block that were trained on.
        rest: site -> rows that the block before left over.
        massive: site -> tokens left out so far, the block at hand not counted.
        seconds: of training, all runs together.
    """

    block: int = 0
    given: dict[Site, int] = field(default_factory=dict)
    rest: dict[Site, Tensor] = field(default_factory=dict)
    massive: dict[Site, int] = field(default_factory=dict)
    seconds: float = 0.0


def save(work: Path, learners: Sequence[Learner], place: Place) -> Path:
    """Writes a checkpoint and then deletes the one before.

    Raises:
        LancetError: the disk is full (the one before stays), or an SAE has diverged.
    """
    from safetensors.torch import save_file

    states = [learner.state() for learner in learners]
    step = max(learner.step_number for learner in learners)
    path = work / f"checkpoint-{step:09}"
    if path == latest(work):  # made at this very step
        return path
    with whole_folder(path) as folder:
        for index, (tensors, _) in enumerate(states):
            save_file(tensors, folder / f"{index}.safetensors")
        save_file({str(site): rows.contiguous() for site, rows in place.rest.items()}, folder / REST)
        told = {
            "block": place.block,
            "given": {str(site): count for site, count in place.given.items()},
            "massive": {str(site): count for site, count in place.massive.items()},
            "seconds": place.seconds,
        }
        write_json(folder / STATE, {"place": told, "saes": [numbers for _, numbers in states]})
    for other in _all(work):
        if other != path:
            shutil.rmtree(other)
    return path


def latest(work: Path) -> Path | None:
    """The newest checkpoint, None where there is none."""
    return max(_all(work), default=None)


def _all(work: Path) -> list[Path]:
    return [path for path in work.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{9}", path.name)]


def step_of(path: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(path.name.removeprefix("checkpoint-"))


def load(path: Path, learners: Sequence[Learner], device: str) -> Place:
    """Sets SAEs to what a checkpoint holds, and returns where in the text it was.

    Raises:
        DamagedError: it is not what was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        told: dict[str, Any] = read_json(path / STATE)
        for index, learner in enumerate(learners):
            learner.load(load_file(path / f"{index}.safetensors", device=device), told["saes"][index])
        rest = load_file(path / REST, device=device)
        place = told["place"]
        return Place(
            place["block"],
            {Site.parse(site): count for site, count in place["given"].items()},
            {Site.parse(site): rows for site, rows in rest.items()},
            {Site.parse(site): count for site, count in place["massive"].items()},
            place["seconds"],
        )
    except (OSError, KeyError, IndexError, RuntimeError, SafetensorError) as error:
        raise DamagedError(f"the checkpoint {path} is damaged ({error}); delete it and begin again") from error
