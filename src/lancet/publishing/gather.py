"""The trained SAEs in a folder: found, checked, and named as the repository will have them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet import fingerprint, names
from lancet.addressed import CONFIG, FACTS, RECORD, WEIGHTS, check_repo
from lancet.errors import DamagedError, MismatchError, UsageError
from lancet.files import check_safetensors, read_json
from lancet.publishing.private import without_paths
from lancet.site import Site
from lancet.training.config import Spec, told_apart
from lancet.training.progress import CSV

if TYPE_CHECKING:
    from lancet.sae import Sae

NEEDED, TAKEN = (CONFIG, WEIGHTS, RECORD), (CONFIG, WEIGHTS, RECORD, CSV, FACTS)
PARTS = (("model", "name"), ("config", "arch"), ("corpus", "tokens"), ("saved", "l0"), ("saved", "explained"))


@dataclass(frozen=True)
class Trained:
    """An SAE that `lancet train` made.

    Attributes:
        source: its folder here.
        folder: its folder in the repository.
        spec: its site, width, k and seed.
        base: the hub's name of its model.
        config: its cfg.json, and record its training.json, without what must not leave.
        files: the names of its files that are taken.
        fingerprint: of its weights.
    """

    source: Path
    folder: str
    spec: Spec
    base: str
    config: dict[str, Any]
    record: dict[str, Any]
    files: tuple[str, ...]
    fingerprint: str

    @property
    def architecture(self) -> str:
        """As it was trained; as which it is saved stands in the config."""
        return str(self.record["config"]["arch"])

    def to_json(self) -> dict[str, Any]:
        """{"folder", "source", "site", "architecture", "features", "k", "seed", "tokens"}."""
        spec = self.spec
        told = {"site": str(spec.site), "architecture": self.architecture, "features": spec.features, "k": spec.k}
        told |= {"seed": spec.seed, "tokens": self.record["tokens"]}
        return {"folder": self.folder, "source": str(self.source)} | told


def gather(folder: Path, base_model: str | None = None, unfinished: bool = False) -> list[Trained]:
    """The SAEs of a folder: one that lies in it, or one in each of its folders.

    Args:
        base_model: the hub's name of their model, needed where it was opened from a folder.
        unfinished: take SAEs too whose training was stopped.

    Raises:
        UsageError: there is no trained SAE, a training has not ended, or nothing says what the model is on the hub.
        MismatchError: parts of an SAE do not fit each other, or its model is another one.
        DamagedError: a weight is damaged or not finite.
    """
    folders = _folders(folder)
    records = [_record(each, unfinished) for each in folders]
    specs = [_spec(record) for record in records]
    out = []
    for source, name, spec, record in zip(folders, _names(folders, specs, records), specs, records, strict=True):
        base = _base(source, record["model"]["name"], base_model)
        config = read_json(source / CONFIG)
        sae = _checked(source, spec, config)
        config["metadata"] = {**config["metadata"], "model_name": base}
        opened = record["model"]["name"]
        record["model"]["name"] = opened if opened in names.EMBEDDED else base
        files = tuple(file for file in TAKEN if (source / file).is_file())
        told = without_paths(config), without_paths(record)
        out.append(Trained(source, name, spec, base, *told, files, fingerprint.of_sae(sae)))
    return out


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}; give what `lancet train` wrote with --out")
    if (folder / CONFIG).is_file():
        return [folder]
    inside = [each for each in sorted(folder.iterdir()) if each.is_dir() and not each.name.startswith(".")]
    found = [each for each in inside if (each / CONFIG).is_file()]
    if not found:
        raise UsageError(f"{folder} holds no trained SAE ({', '.join(NEEDED)}), nor does a folder in it")
    return found


def _record(folder: Path, unfinished: bool) -> dict[str, Any]:
    if lacking := [name for name in NEEDED if not (folder / name).is_file()]:
        raise UsageError(f"{folder} lacks {', '.join(lacking)}; only what `lancet train` made can be published")
    record = read_json(folder / RECORD)
    try:
        is_finished, _ = record["finished"], _spec(record)
        for part, key in PARTS:
            _ = record[part][key]
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{folder / RECORD} is no record of a training (no {error}); train the SAE again") from error
    if not is_finished and not unfinished:
        raise UsageError(
            f"the training of {folder} was stopped after {record['tokens']:,} tokens; the same `lancet train` command "
            f"goes on with it, or publish it as it is with --unfinished"
        )
    return record


def _spec(record: dict[str, Any]) -> Spec:
    told = record["sae"]
    return Spec(Site.parse(told["site"]), int(told["features"]), float(told["k"]), int(told["seed"]))


def _names(folders: Sequence[Path], specs: Sequence[Spec], records: Sequence[dict[str, Any]]) -> list[str]:
    """By site and what else tells them apart; by architecture, or by their folders here, where that is not enough."""
    found = told_apart(specs, site=True)
    if len({record["config"]["arch"] for record in records}) > 1:
        found = [f"{name}-{record['config']['arch']}" for name, record in zip(found, records, strict=True)]
    if len(set(found)) < len(found):
        found = [f"{spec.site}-{folder.name}" for spec, folder in zip(specs, folders, strict=True)]
    return found


def _base(folder: Path, opened: str, given: str | None) -> str:
    is_local = opened not in names.EMBEDDED and (Path(opened).is_dir() or without_paths(opened) != opened)
    known = None if is_local else names.hub_id(opened)
    if given is None:
        if known is None:
            raise UsageError(
                f"{folder} was trained on a model in a folder ({Path(opened).name}), which says nothing on the hub; "
                f"name the model with --base-model OWNER/NAME"
            )
        return known
    wanted = check_repo(names.check(given))
    if known is not None and not names.same(known, wanted):
        raise MismatchError(f"{folder} was trained on {known}, and --base-model says {wanted}; leave --base-model out")
    return wanted


def _checked(folder: Path, spec: Spec, config: dict[str, Any]) -> Sae:
    """The SAE. Refuses what would not open, or not compute what it says."""
    from lancet.loading import sae_from_folder

    _check_shapes(folder, config)
    sae = sae_from_folder(folder)
    told = {"site": str(spec.site), "features": spec.features}
    got = {"site": str(sae.site), "features": sae.d_sae}
    for name, value in got.items():
        if value != told[name]:
            raise MismatchError(
                f"the SAE in {folder} has {name} {value}, its {RECORD} says {told[name]}; they are of two trainings"
            )
    for name, tensor in sae.tensors():
        if not bool(tensor.isfinite().all()):
            raise DamagedError(f"{name} of {folder} has numbers that are not finite; train the SAE again")
    for file in (WEIGHTS, FACTS):
        _check_header(folder / file)
    return sae


def _check_shapes(folder: Path, config: dict[str, Any]) -> None:
    d_in, d_sae = int(config.get("d_in", 0)), int(config.get("d_sae", 0))
    wanted = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    for name, entry in check_safetensors(folder / WEIGHTS).items():
        shape = wanted.get(name, [d_sae])
        if entry["shape"] != shape and math.prod(entry["shape"]) != 1:
            raise MismatchError(
                f"{name} in {folder / WEIGHTS} has shape {entry['shape']}, {CONFIG} says {shape} (d_in {d_in}, d_sae "
                f"{d_sae}); the files are of two SAEs"
            )


def _check_header(file: Path) -> None:
    """Refuses a safetensors file whose header names a path: it is sent as it is."""
    from safetensors import safe_open

    if not file.is_file():
        return
    with safe_open(file, "pt") as opened:
        held = opened.metadata() or {}
    if without_paths(held) != held:
        raise UsageError(f"the header of {file} names a path on this machine; save the file again without it")
