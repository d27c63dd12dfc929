"""The converter: one published SAE, opened by sae-lens and written as safetensors. The only place that opens a pickle.

    python -m lancet.convert RELEASE ID FOLDER

It runs in a process of its own, which `published.py` starts: torch.load is held to `weights_only=True` and numpy.load
to `allow_pickle=False` there, so that a file can bring numbers and nothing that runs. What these do not open is
refused. Each line on standard output is a JSON object: {"say": text}, {"progress": [file, bytes, of]} or {"error":
[class, text]}.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from lancet import catalogue, hub
from lancet.catalogue import Entry
from lancet.errors import DamagedError, LancetError, UsageError
from lancet.files import PICKLE_SUFFIXES, check_safetensors, sha256, write_json

LAYOUT = 1  # of what is written; raise it when that changes
Tell = Callable[[dict[str, Any]], None]


def convert(entry: Entry, out: Path, tell: Tell) -> None:
    """Writes cfg.json, sae_weights.safetensors and lancet.json into `out`.

    Weights are kept in the narrowest dtype that holds every one of their values exactly.

    Raises:
        DamagedError: the source holds something else than numbers, or sae-lens cannot open it.
        UsageError: it is not one SAE.
        MissingError, UnknownName: it cannot be fetched.
    """
    check_single(entry)
    sources: list[Path] = []
    only_numbers()
    with hub.explained(entry.repo, known=[e.repo for e in catalogue.load().entries]):
        sae = _opened_by_sae_lens(entry, sources, tell)
    state = sae.state_dict()
    sae.process_state_dict_for_saving(state)
    config = sae.cfg.to_dict() | {"device": "cpu", "dtype": "float32"}
    from safetensors.torch import save_file

    save_file({name: narrowest(tensor).contiguous() for name, tensor in state.items()}, out / "sae_weights.safetensors")
    write_json(out / "cfg.json", json.loads(json.dumps(config, default=str)))
    write_json(
        out / "lancet.json",
        {
            "layout": LAYOUT,
            "release": entry.release,
            "id": entry.id,
            "model": entry.model,
            "repo": entry.repo,
            "commit": _commit(sources),
            "files": [
                {"file": _inside(path), "sha256": _sha256(path), "bytes": path.stat().st_size} for path in sources
            ],
            "weights_sha256": sha256(out / "sae_weights.safetensors"),
            "pickle": any(path.suffix in PICKLE_SUFFIXES for path in sources),
            "neuronpedia": entry.neuronpedia,
            "l0": entry.l0,
            "explained": entry.explained,
            "basis": entry.overrides.get("model_from_pretrained_kwargs"),
            "sae_lens": metadata.version("sae-lens"),
        },
    )


def check_single(entry: Entry) -> None:
    """Raises UsageError for what is listed among SAEs and is not one."""
    if entry.loader == "mntss_clt_layer_transcoder" or "clt" in entry.path.split("/")[0]:
        raise UsageError(
            f"{entry.name} is one layer of a cross-layer transcoder, which writes to every later layer; sae-lens adds "
            f"its decoders up, which reconstructs nothing, so it is no single SAE and is not opened"
        )


def only_numbers() -> None:
    """Holds this process' torch.load and numpy.load to numbers, whatever their caller asks for."""
    import numpy as np
    import torch

    if getattr(torch.load, "only_numbers", False):
        return
    torch_load, numpy_load = torch.load, np.load

    def load_weights(*args: Any, **kwargs: Any) -> Any:
        return torch_load(*args, **{**kwargs, "weights_only": True, "pickle_module": None})

    def load_arrays(file: Any, mmap_mode: Any = None, allow_pickle: bool = False, **kwargs: Any) -> Any:
        return numpy_load(file, mmap_mode=mmap_mode, allow_pickle=False, **kwargs)

    load_weights.only_numbers = True  # type: ignore[attr-defined]
    torch.load = load_weights
    np.load = load_arrays


def _opened_by_sae_lens(entry: Entry, sources: list[Path], tell: Tell) -> Any:
    import warnings
    import zipfile

    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    progress = _seldom(lambda *told: tell({"progress": told}))

    def bring(repo_id: str, filename: str, subfolder: str | None = None, revision: str | None = None, **_: Any) -> str:
        file = f"{subfolder}/{filename}" if subfolder else filename
        path = hub.bring(repo_id, file, revision or "main", progress)
        if path.suffix == ".safetensors":
            try:
                check_safetensors(path)
            except DamagedError as error:
                hub.remove(path)
                raise DamagedError(f"{repo_id}: {error}; it was removed, and is fetched again next time") from error
        if path.suffix in PICKLE_SUFFIXES:
            told = f"{file} is a pickle: it is converted to safetensors once, in a process that takes numbers only"
            tell({"say": told})
        sources.append(path)
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        # sae-lens reads the header over the network with another client; the file is needed anyway.
        return {name: told["shape"] for name, told in check_safetensors(Path(bring(repo_id, filename))).items()}

    loaders.hf_hub_download = bring
    loaders.get_safetensors_tensor_shapes = shapes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they are about is checked when the result is opened
            return SAE.from_pretrained_with_cfg_and_sparsity(entry.release, entry.id, "cpu", dtype="float32")[0]
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise DamagedError(_refused(entry, sources, error)) from error
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, EOFError, AssertionError) as error:
        if "allow_pickle" in str(error) or "weights_only" in str(error):
            raise DamagedError(_refused(entry, sources, error)) from error
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DamagedError(f"sae-lens cannot open {entry.name}: {why}") from error


def _refused(entry: Entry, sources: list[Path], error: Exception) -> str:
    file = _inside(sources[-1]) if sources else entry.path
    why = next(iter(str(error).splitlines()), "") or type(error).__name__
    return (
        f"{entry.name}: {file} holds more than numbers, or is damaged, and was refused; nothing in it was run "
        f"({why[:160]})"
    )


def narrowest(tensor: Any) -> Any:
    """The tensor in the narrowest of bfloat16, float16 and its own dtype that holds every value exactly."""
    import torch

    if tensor.dtype != torch.float32:
        return tensor
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.ndim else tensor.reshape(1, 1)
    step = max(1, (16 << 20) // max(1, rows.shape[1]))
    for dtype in (torch.bfloat16, torch.float16):
        pieces = (rows[first : first + step] for first in range(0, len(rows), step))
        if all(torch.equal(piece.to(dtype).float(), piece) for piece in pieces):
            return tensor.to(dtype)
    return tensor


def _seldom(progress: hub.Progress) -> hub.Progress:
    """The same, at most five times a second and at the end of a file."""
    last = 0.0

    def told(file: str, done: int, of: int | None) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2 or done == of:
            last = time.monotonic()
            progress(file, done, of)

    return told


def _commit(sources: list[Path]) -> str | None:
    parts = sources[-1].parts if sources else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _inside(path: Path) -> str:
    parts = path.parts
    return "/".join(parts[parts.index("snapshots") + 2 :]) if "snapshots" in parts else path.name


def _sha256(path: Path) -> str:
    blob = path.resolve().name  # hashed when it was fetched, where it is stored under its hash
    return blob if len(blob) == 64 and path.is_symlink() else sha256(path)


def main(arguments: list[str]) -> int:
    """Converts and reports; 0 where all went well."""
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no report

    def tell(told: dict[str, Any]) -> None:
        out.write(json.dumps(told) + "\n")
        out.flush()

    release, identifier, folder = arguments
    try:
        convert(catalogue.load().entry(f"{release}/{identifier}"), Path(folder), tell)
    except LancetError as error:
        tell({"error": [type(error).__name__, str(error)]})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
