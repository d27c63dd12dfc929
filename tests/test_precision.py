"""Device, dtype, bits and device maps: what is chosen, and what is refused with the way out."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lancet import precision
from lancet.errors import MissingError, UsageError
from lancet.loading import open_model
from lancet.model import Model
from lancet.site import KINDS, Site


def missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.skipif(not missing("torchao"), reason="torchao is installed")
def test_bits_on_the_cpu_need_torchao(bits: str) -> None:
    with pytest.raises(MissingError, match=r"needs torchao; install it with: pip install 'torchao>="):
        open_model("smollm2", "cpu", quantize=bits)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.skipif(not missing("bitsandbytes"), reason="bitsandbytes is installed")
def test_bits_on_cuda_need_bitsandbytes(bits: str) -> None:
    with pytest.raises(MissingError, match=r"needs bitsandbytes; install it with: pip install 'bitsandbytes>="):
        precision._quantization(bits, "cuda", torch.bfloat16)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_opened_in_fewer_bits(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    try:
        packed = open_model("smollm2", "cpu", quantize=bits)
    except MissingError as error:
        if bits == "8bit" or "packs 4bit weights for cards alone; on the CPU take 8bit" not in str(error):
            raise
        pytest.skip(str(error))
    plain = open_model("smollm2", "cpu", "bfloat16")
    assert precision.held_bytes(packed.hf) < 0.8 * precision.held_bytes(plain.hf)
    batch = plain.batch([plain.tokenize("The Golden Gate Bridge is in San Francisco.")])
    for kind in KINDS:
        one, other = (m.values(batch, [Site(12, kind)])[Site(12, kind)].float() for m in (plain, packed))
        assert torch.cosine_similarity(one, other, dim=-1).median() > 0.9, kind


def test_what_quantises_nowhere() -> None:
    with pytest.raises(UsageError, match="no library quantises on mps; use --device cpu or cuda"):
        precision._quantization("8bit", "mps", torch.float16)
    with pytest.raises(UsageError, match="unknown quantisation '3bit'; use 8bit or 4bit"):
        precision.choose("cpu", quantize="3bit")


def test_a_model_that_was_made_no_smaller(tiny_gpt2: Callable[..., Model]) -> None:
    """GPT-2's layers are no Linear ones, and a library that finds none quantises nothing without a word."""
    model = tiny_gpt2()
    how = precision.Precision("cpu", torch.float32, "", "8bit")
    size = sum(parameter.nbytes for parameter in model.hf.parameters())
    with pytest.raises(UsageError, match="was not made smaller by --quantize 8bit: its GPT2LMHeadModel has few layers"):
        how.settle(model.hf, size, "tiny")
    assert how.settle(model.hf, 2 * size, "tiny") is model.hf


def test_a_device_and_a_map() -> None:
    with pytest.raises(UsageError, match="both say where the model goes"):
        precision.choose("cpu", device_map="auto")


def test_a_device_map_changes_no_value(tiny_gpt2: Callable[..., Model]) -> None:
    plain = tiny_gpt2()
    spread = open_model(plain.name, dtype="float32", device_map="auto")
    assert "spread by the device map 'auto'" in spread.notes[0]
    batch = plain.batch([plain.tokenize("The cat sat on the mat.")])
    sites = [Site(i, kind) for i in (0, 3) for kind in KINDS]
    ours, theirs = spread.values(batch, sites), plain.values(batch, sites)
    for site in sites:
        assert torch.equal(ours[site].to(theirs[site].device), theirs[site]), site


OPEN = """
import re, sys, threading, time
from pathlib import Path
import interp_engine.arch, safetensors.torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
import lancet.reading, lancet.sae
from lancet.loading import open_model
def anonymous():
    return int(re.search(r"^RssAnon:\\s+(\\d+) kB$", Path("/proc/self/status").read_text(), re.M)[1]) * 1024
before, peak, done = anonymous(), [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = open_model(sys.argv[1], "cpu", sys.argv[2])
done.append(1)
thread.join()
print(peak[0] - before, sum(p.nbytes for p in model.hf.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux alone tells a process's peak")
def test_opening_peaks_at_the_weights_alone(tmp_path: Path) -> None:
    """A second copy of 115 MB would show. GPT-2 Small's exact shape is measured by `python -m benchmarks memory`.

    Anonymous memory: pages of the mapped file are the system's to drop.
    """
    from conftest import save_tiny_gpt2

    folder = save_tiny_gpt2(tmp_path / "m", n_layer=4, n_embd=768, n_head=12)
    for dtype in ("float32", "bfloat16"):
        done = subprocess.run([sys.executable, "-c", OPEN, folder, dtype], capture_output=True, text=True, check=True)
        peak, weights = map(int, done.stdout.split())
        assert peak < weights + 60e6, (dtype, peak, weights)
