"""Device, dtype, bits and device maps: what is chosen, and what is refused with the way out."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import with_facts

from lancet import fingerprint, precision
from lancet.errors import MissingError, UsageError
from lancet.lab import Lab
from lancet.loading import open_model
from lancet.model import Model
from lancet.sae import random_sae
from lancet.site import KINDS, Site


def missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.skipif(not missing("torchao"), reason="torchao is installed")
def test_bits_on_the_cpu_need_torchao(bits: str) -> None:
    with pytest.raises(MissingError, match=r"needs a card\) needs torchao; install it with: pip install 'torchao>="):
        open_model("smollm2", "cpu", quantize=bits)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.skipif(not missing("bitsandbytes"), reason="bitsandbytes is installed")
def test_bits_on_cuda_need_bitsandbytes(bits: str) -> None:
    with pytest.raises(MissingError, match=r"needs bitsandbytes; install it with: pip install 'bitsandbytes>="):
        precision._quantization(bits, "cuda", torch.bfloat16)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_opened_in_fewer_bits(bits: str) -> None:
    pytest.importorskip("torchao")
    packed = open_model("smollm2", "cpu", quantize=bits)
    plain = open_model("smollm2", "cpu", "bfloat16")
    assert precision.held_bytes(packed.hf) < 0.8 * precision.held_bytes(plain.hf)
    batch = plain.batch([plain.tokenize("The Golden Gate Bridge is in San Francisco.")])
    for kind in KINDS:
        one, other = (m.values(batch, [Site(12, kind)])[Site(12, kind)].float() for m in (plain, packed))
        assert torch.cosine_similarity(one, other, dim=-1).median() > 0.9, kind


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama, whose layers are Linear ones."""
    from conftest import START, small_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder, tokenizer = tmp_path_factory.mktemp("llama"), small_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), initializer_range=0.08, **sizes)  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("bits", "steps"), [("8bit", 254), ("4bit", 15)])
def test_weights_are_rounded_to_so_many_steps(llama: str, bits: str, steps: int) -> None:
    """Each weight, as the packed layer multiplies it, is at most half a step from the plain one."""
    pytest.importorskip("torchao")
    matmul = torch.get_float32_matmul_precision()
    plain, packed = open_model(llama, "cpu", "float32"), open_model(llama, "cpu", quantize=bits)
    assert torch.get_float32_matmul_precision() == matmul  # torchao would change it for the whole process
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        one, other = (m.hf.model.layers[1].get_submodule(name) for m in (plain, packed))
        rows = one.weight.detach()
        got = other(torch.eye(rows.shape[1], dtype=torch.bfloat16)).T.float()
        grouped = rows.reshape(len(rows), -1, rows.shape[1] if bits == "8bit" else precision.GROUP)
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        span = 2 * grouped.abs().amax(-1, keepdim=True) if bits == "8bit" else high - low
        rounding = 2**-7 * rows.abs().max()  # bfloat16's, of weight, scale and product
        error = (got - rows).abs().reshape(grouped.shape)
        assert bool((error <= 0.5 * span / steps + rounding).all()), name
        assert float(error.max()) > 0


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_read_and_steer_in_fewer_bits(llama: str, bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path))
    packed, site = open_model(llama, "cpu", quantize=bits), Site(2)
    sae = random_sae(128, 256, site=site)
    lab = with_facts(Lab(packed, [sae]), tmp_path / "facts.safetensors", [5.0] * 256, 10.0)
    tokens = packed.tokenize("The cat sat on the mat")
    seen: list[torch.Tensor] = []
    hook = packed.hf.model.layers[2].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        plain = packed.hf(torch.tensor([tokens.ids])).logits[0]
    hook.remove()
    reading = lab.read("The cat sat on the mat")
    expected = sae.encode(seen[0][0, 1:].float())  # the start token is not read
    assert torch.allclose(expected[expected > 0].sort().values, reading.features.value.sort().values, rtol=1e-4)

    def moved(_module: Any, args: Any) -> Any:
        x = args[0].clone()
        x[:, 1:] += (20 * sae.rows(torch.tensor([3]))[0]).to(x.dtype)
        return (x, *args[1:])

    hook = packed.hf.model.layers[2].register_forward_pre_hook(moved)
    with torch.no_grad():
        steered = packed.hf(torch.tensor([tokens.ids])).logits[0]
    hook.remove()
    ours = lab.logits(tokens, "#3 += 20").float()
    assert float((ours - steered.float()).abs().max()) < 0.02 * float(steered.abs().max())
    assert float((steered - plain).abs().max()) > 0.1 * float(plain.abs().max())
    assert len(lab.generate("The cat", "#3 += 20", tokens=4).ids) > 0


def test_bits_are_part_of_the_fingerprint(llama: str) -> None:
    pytest.importorskip("torchao")
    found = {fingerprint.of_model(open_model(llama, "cpu", "bfloat16", quantize=b)) for b in (None, "8bit", "4bit")}
    assert len(found) == 3


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
from lancet.lab import Lab
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
