"""What a text of 1,000 tokens takes to read with an SAE of a million features in bfloat16, on a model of width 2,304.

`python -m benchmarks.million FOLDER` is the process that reads. Its anonymous memory (what it made for itself; the
mapped file is not in it) is watched while it opens the SAE and reads, and compared with what it was once the model was
open. The SAE is random but lights some eighty features a token, as a published one does; the file takes 9.2 GB.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Figure, Settings, process, remark
from benchmarks.memory import watched

WIDTH, FEATURES, TOKENS = 2304, 1_000_000, 1000
BAR = 2000.0  # MB of anonymous memory over what the process had after imports and model
SPARE = 4 << 30  # bytes of the disk that are left alone


def run(settings: Settings) -> Iterator[Figure]:
    if not Path("/proc/self/status").is_file():
        remark("this system does not tell; Linux does")
        return
    folder = settings.work / "million"
    needed = 4 * WIDTH * FEATURES
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "cfg.json").is_file() and shutil.disk_usage(folder).free < needed + SPARE:
        remark(f"the file takes {needed / 1e9:.1f} GB, and {folder} has too little room for it")
        return
    write(folder)
    told = json.loads(process([sys.executable, "-m", "benchmarks.million", str(folder)])())
    name = f"{TOKENS} tokens, {FEATURES:,} features, bfloat16"
    detail = f"{told['lit']:.0f} features lit a token"
    yield Figure(f"{name}: anonymous, over model", told["grown"], "MB", BAR, detail)
    yield Figure(f"{name}: opening and reading", told["seconds"], "s")


def write(folder: Path) -> None:
    """The random SAE in sae-lens' layout, made once and written piece by piece.

    Rows of the decoder repeat after 4,096 features, with another sign pattern each time, since a million random rows
    would take longer to make than to read.
    """
    import numpy as np
    import torch

    if (folder / "cfg.json").is_file():
        return
    remark(f"writing {4 * WIDTH * FEATURES / 1e9:.1f} GB to {folder}, once")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4096, WIDTH, generator=generator)
    rows = (rows / rows.norm(dim=1, keepdim=True)).bfloat16()
    parts: list[tuple[str, list[int], str, int]] = [
        ("W_dec", [FEATURES, WIDTH], "BF16", 2),
        ("W_enc", [WIDTH, FEATURES], "BF16", 2),
        ("b_enc", [FEATURES], "F32", 4),
        ("threshold", [FEATURES], "F32", 4),
        ("b_dec", [WIDTH], "F32", 4),
    ]
    header: dict[str, Any] = {}
    begin = 0
    for name, shape, dtype, size in parts:
        end = begin + size * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    temporary = folder / "sae_weights.partial"
    temporary.write_bytes(len(told).to_bytes(8, "little") + told)
    with temporary.open("r+b") as file:
        file.truncate(8 + len(told) + begin)
    W_dec, W_enc, _, threshold, _ = (
        np.memmap(temporary, dtype, "r+", 8 + len(told) + header[name]["data_offsets"][0], tuple(header[name]["shape"]))
        for name, dtype in zip(header, ("u2", "u2", "f4", "f4", "f4"), strict=True)
    )
    for first in range(0, FEATURES, len(rows)):
        piece = rows * (torch.randint(0, 2, (1, WIDTH), generator=generator) * 2 - 1)
        bits = piece.view(torch.int16).numpy().view("u2")[: FEATURES - first]
        W_dec[first : first + len(bits)] = bits
        W_enc[:, first : first + len(bits)] = bits.T
    threshold[:] = 3.8  # a standard normal number is larger once in 14,000 times
    for written in (W_dec, W_enc, threshold):
        written.flush()
    temporary.rename(folder / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "d_in": WIDTH, "d_sae": FEATURES, "dtype": "bfloat16"}
    config |= {"normalize_activations": "layer_norm", "apply_b_dec_to_input": True, "reshape_activations": "none"}
    config["metadata"] = {"hook_name": "blocks.1.hook_resid_pre", "model_from_pretrained_kwargs": {}}
    (folder / "cfg.json").write_text(json.dumps(config))


def child(folder: str) -> None:
    """Opens a random model and the SAE, reads, and prints the figures as JSON."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lancet.reading
    from lancet.facts import Facts
    from lancet.loading import sae_from_folder
    from lancet.model import Model
    from lancet.tokens import Tokens

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=8, vocab_size=1000
    )
    model = Model("random", LlamaForCausalLM(config), None, None)  # type: ignore[arg-type]
    ids = torch.randint(0, 1000, (TOKENS,)).tolist()
    text = Tokens("x" * TOKENS, tuple(ids), tuple((i, i + 1) for i in range(TOKENS)), ("text",) * TOKENS)
    with torch.inference_mode():
        model.hf(torch.tensor([ids]))  # what a first pass sets up is not the SAE's
    began = time.perf_counter()
    with watched() as peak:
        sae = sae_from_folder(Path(folder))
        zeros = torch.zeros(sae.d_sae)
        reading = lancet.reading.read(model, sae, Facts(zeros, zeros, 1.0, 1), text)
    figures = {"grown": peak.grown, "seconds": time.perf_counter() - began}
    print(json.dumps(figures | {"lit": len(reading.features.value) / TOKENS}))


if __name__ == "__main__":
    child(*sys.argv[1:])
