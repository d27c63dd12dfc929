"""What every feature makes the model say, by both lenses and in both directions, block by block.

Each block is kept in the work folder as soon as it is measured: an interrupted harvest does not measure it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lancet import effect
from lancet.errors import DamagedError, UsageError
from lancet.files import check_safetensors, whole_file
from lancet.logit_lens import logit_lens
from lancet.telling import Say, counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lancet.lab import Lab
    from lancet.sae import Sae

    Measure = Callable[[Tensor], dict[str, Tensor]]

COUNT = 10  # tokens of each list
BLOCK = 1024  # features measured and kept together
LOGITS = 128  # features whose logits over the vocabulary are held at once


def logit(lab: Lab, sae: Sae, folder: Path, say: Say) -> dict[str, np.ndarray] | None:
    """The logit lens: {"up", "up_values", "down", "down_values"}, [d_sae, COUNT] each; None where it is not defined."""

    def measure(rows: Tensor) -> dict[str, Tensor]:
        parts = []
        for part in rows.split(LOGITS):
            logits = logit_lens(lab.model, part)
            up, down = logits.topk(COUNT, dim=-1), logits.topk(COUNT, dim=-1, largest=False)
            parts.append((up.indices, up.values, down.indices, down.values))
        return _named(parts)

    try:
        return _blocks(sae, folder / "logit", measure, "the logit lens", say)
    except UsageError as error:
        say(f"no logit lens in the atlas: {error}")
        return None


def effects(lab: Lab, sae: Sae, folder: Path, say: Say) -> dict[str, np.ndarray]:
    """The effect lens at `effect.STRENGTH`, in the order of its lists elsewhere; as `logit`, values in nats."""
    length = _length(lab, sae)
    held: list[effect.Baseline] = []

    def measure(rows: Tensor) -> dict[str, Tensor]:
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12) * length
        parts = []
        held.extend([] if held else [baseline(lab, sae)])
        for change in effect.changes(lab.model, sae.writes, rows):
            both = (effect.strongest(change, COUNT, held[0], largest) for largest in (True, False))
            parts.append(tuple(tensor for pair in both for tensor in pair))
        return _named(parts)

    return _blocks(sae, folder / "effect", measure, "the effect lens", say)


def baseline(lab: Lab, sae: Sae) -> effect.Baseline:
    """What the average feature does: as the SAE's facts have it, else of features spread over all of them."""
    facts = lab.facts(sae, harvested=False)
    if facts.effect_mean is not None and facts.effect_deviation is not None:
        return effect.Baseline(facts.effect_mean.float(), facts.effect_deviation.float())
    sample = np.unique(np.linspace(0, sae.d_sae - 1, min(effect.SAMPLE, sae.d_sae)).astype(np.int64))
    return effect.baseline(lab.model, sae.writes, _unit(sae, sample) * _length(lab, sae))


def _length(lab: Lab, sae: Sae) -> float:
    return lab.facts(sae, harvested=False).norm * effect.STRENGTH


def _unit(sae: Sae, features: np.ndarray) -> Tensor:
    import torch

    rows = sae.rows(torch.from_numpy(features).to(sae.device))
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _named(parts: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    import torch

    columns = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    names = ("up", "up_values", "down", "down_values")
    return {name: column.float() if "_" in name else column.int() for name, column in zip(names, columns, strict=True)}


def _blocks(sae: Sae, folder: Path, measure: Measure, what: str, say: Say) -> dict[str, np.ndarray]:
    import torch
    from safetensors.numpy import load_file
    from safetensors.torch import save_file

    found = []
    with counted(say, what, sae.d_sae) as told:
        for first in range(0, sae.d_sae, BLOCK):
            path, last = folder / f"{first:09}.safetensors", min(first + BLOCK, sae.d_sae)
            if not _is_whole(path):
                with torch.no_grad():
                    block = measure(sae.rows(slice(first, last)))
                with whole_file(path) as temporary:
                    save_file({name: tensor.contiguous() for name, tensor in block.items()}, temporary)
            found.append(load_file(path))
            told(last)
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


def _is_whole(path: Path) -> bool:
    try:
        return path.is_file() and bool(check_safetensors(path))
    except DamagedError:
        return False
