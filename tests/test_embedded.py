"""The embedded model against its own file: token ids fixed by hand, an independent forward pass over the GGUF's own
tensors, the start token measured, and everything that can be wrong with the file, the cache or the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lancet import wheels
from lancet.embedded import SMOLLM2, Embedded
from lancet.errors import DamagedError, LancetError, MissingError
from lancet.loading import open_model
from lancet.model import Model

# ---- the tokenizer ---------------------------------------------------------------------------------------------------

FIXED_IDS = {
    "\n\n1.": [1116, 33, 30],
    "42": [36, 34],
    " 42": [216, 36, 34],
    "In 1984": [788, 216, 33, 41, 40, 36],
    "The Golden Gate Bridge is located in San Francisco.": [504, 13578, 18447, 13480, 314, 3807, 281, 4653, 10463, 30],
    "你好，世界。": [18645, 250, 48392, 138, 12831, 7906, 240, 178, 239, 230, 19076],
    "def f(x):\n    return x\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 198],
}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is Rome?"}]
CHAT_TEXT = """<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Where is Rome?<|im_end|>
<|im_start|>assistant
"""


def the_gguf() -> Path:
    parts = SMOLLM2.parts()
    assert parts is not None
    return parts[0]


@pytest.mark.parametrize("text", FIXED_IDS)
def test_fixed_ids(smollm2_f32: Model, text: str) -> None:
    assert list(smollm2_f32.tokenize(text).ids) == [0, *FIXED_IDS[text]]


def test_digits_and_line_breaks_are_cut_as_in_training(smollm2_f32: Model) -> None:
    pieces = {t: smollm2_f32.tokenizer.convert_ids_to_tokens(list(smollm2_f32.tokenize(t).ids))[1:] for t in FIXED_IDS}
    assert pieces["\n\n1."] == ["ĊĊ", "1", "."]
    assert pieces[" 42"] == ["Ġ", "4", "2"]
    assert pieces["In 1984"] == ["In", "Ġ", "1", "9", "8", "4"]


def test_chat_template(smollm2_f32: Model) -> None:
    tokens = smollm2_f32.tokenize_chat(CHAT)
    assert tokens.text == CHAT_TEXT
    assert smollm2_f32.tokenizer.decode(list(tokens.ids)) == CHAT_TEXT
    assert tokens.ids.count(1) == 3  # markers are single tokens, not spelt out
    assert tokens.ids.count(2) == 2


def test_the_cached_tokenizer_is_the_one_that_this_code_writes(tmp_path: Path) -> None:
    gguf = the_gguf()
    SMOLLM2.tokenizer(gguf, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((SMOLLM2.ensure() / name).read_text()), name


# ---- the start token -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Hello there", "<|endoftext|>Hello there"])
def test_plain_text_has_exactly_one_start(smollm2_f32: Model, text: str) -> None:
    tokens = smollm2_f32.tokenize(text)
    assert tokens.ids == (0, *smollm2_f32.tokenize("Hello there").ids[1:])
    assert tokens.roles == ("start", "text", "text")


def test_a_chat_has_exactly_one_start(smollm2_f32: Model) -> None:
    tokens = smollm2_f32.tokenize_chat(CHAT)
    assert tokens.ids[:2] == (1, smollm2_f32.tokenize("system").ids[1])
    assert 0 not in tokens.ids
    assert tokens.roles.count("start") == 1
    assert tokens.roles[0] == "start"


SENTENCES = """The train to the coast leaves at nine every morning.
She poured the tea and waited for him to speak.
Water freezes at zero degrees and boils at one hundred.
The committee will publish its report next week.
My brother keeps three hens behind the old garage.
Paris is the capital of France.
He forgot his umbrella, so he ran home in the rain.
Add two eggs and a cup of flour, then stir well.
The museum is closed on Mondays.
Nobody had seen the lighthouse keeper since winter.
A good teacher listens before she answers.
Prices rose by three percent in the second quarter.
The dog barked twice and fell asleep again.
They built the bridge in less than four years.
Please send me the photographs from your holiday.
The river is wide here, and the current is slow.
Doctors recommend eight hours of sleep a night.
I have never liked the taste of licorice.
The moon was bright enough to read by.
Our team lost the final in the last minute.""".splitlines()


def test_the_start_token_that_the_model_expects(smollm2_f32: Model) -> None:
    """Loss over the same tokens (all but each sentence's first) after each start."""
    plain = [list(smollm2_f32.tokenize(sentence).ids[1:]) for sentence in SENTENCES]
    losses = {}
    for name, start in {"endoftext": [0], "im_start": [1], "none": []}.items():
        batch = smollm2_f32.batch([start + ids for ids in plain])
        with torch.no_grad():
            logits = smollm2_f32.hf(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch.ids[:, 1:], reduction="none")
        counted = batch.mask[:, 1:].clone()
        counted[:, : len(start)] = False
        assert int(counted.sum()) == sum(len(ids) - 1 for ids in plain)
        losses[name] = float(loss[counted].mean())
    assert losses["endoftext"] < losses["im_start"] - 0.1, losses
    assert losses["endoftext"] < losses["none"] - 0.1, losses


# ---- the weights -----------------------------------------------------------------------------------------------------


class _Gguf:
    """The file's own tensors, dequantised one at a time by the gguf library."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    def __call__(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = self.tensors[f"{name}.weight"]
        return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).double()


def _rotated(x: Tensor) -> Tensor:
    """[heads, seq, 64] turned by position as GGML does it: neighbours (0, 1), (2, 3), ... are the pairs."""
    angle = torch.arange(x.shape[1]).double()[:, None] * 100_000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
    return torch.stack(turned, dim=-1).flatten(-2)


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def _plain_forward(weight: _Gguf, ids: list[int]) -> Tensor:
    """[seq, vocabulary] logits of the Llama architecture, written out."""
    embedding, seq = weight("token_embd"), len(ids)
    hidden = embedding[ids]
    future = torch.full((seq, seq), -torch.inf).triu(1).double()
    for i in range(30):
        x = _norm(hidden, weight(f"blk.{i}.attn_norm"))
        q, k, v = ((x @ weight(f"blk.{i}.attn_{name}").T).view(seq, -1, 64).transpose(0, 1) for name in "qkv")
        q, k, v = _rotated(q), _rotated(k).repeat_interleave(3, 0), v.repeat_interleave(3, 0)
        pattern = (q @ k.transpose(1, 2) / 8 + future).softmax(-1)
        hidden = hidden + (pattern @ v).transpose(0, 1).reshape(seq, 576) @ weight(f"blk.{i}.attn_output").T
        x = _norm(hidden, weight(f"blk.{i}.ffn_norm"))
        gate, up = x @ weight(f"blk.{i}.ffn_gate").T, x @ weight(f"blk.{i}.ffn_up").T
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ weight(f"blk.{i}.ffn_down").T
    return _norm(hidden, weight("output_norm")) @ embedding.T


def test_logits_equal_a_forward_pass_over_the_files_own_tensors(smollm2_f32: Model) -> None:
    gguf = the_gguf()
    tokens = smollm2_f32.tokenize("The Golden Gate Bridge is located in San Francisco.")
    with torch.no_grad():
        ours = smollm2_f32.hf(input_ids=torch.tensor([tokens.ids])).logits[0]
    reference = _plain_forward(_Gguf(gguf), list(tokens.ids))
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()
    assert smollm2_f32.tokenizer.decode([int(reference[-3].argmax())]) == " Francisco"


MEASURE = """
import resource, sys, torch
from lancet.loading import open_model
import lancet.model, interp_engine.arch, interp_engine.hooks, tokenizers, safetensors.torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import transformers.models.llama.modeling_llama
torch.set_num_threads(1)

def anonymous():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1e3

before = anonymous()
model = open_model("smollm2", device="cpu", dtype=sys.argv[1])
print(anonymous() - before, sum(p.nbytes for p in model.hf.parameters()) / 1e6)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc/self/smaps_rollup")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_opening_maps_the_weights(smollm2_f32: Model, smollm2_bf16: Model, dtype: str) -> None:
    """The conversions are in the cache (the fixtures made them); opening again costs little memory of its own."""
    run = subprocess.run([sys.executable, "-c", MEASURE, dtype], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    grown, weights = map(float, run.stdout.split())
    assert weights > {"float32": 530, "bfloat16": 265}[dtype]
    assert grown < 100, f"opening took {grown:.0f} MB of anonymous memory for {weights:.0f} MB of weights"


# ---- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _nothing_left(cache: Path) -> bool:
    kept = {cache / "models", cache / "processor.json"}
    return not SMOLLM2.ready() and not [path for path in cache.rglob("*") if path not in kept]


def test_missing_altogether(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Embedded, "parts", lambda self: None)
    with pytest.raises(MissingError, match="`lancet get smollm2`"):
        open_model("smollm2")
    assert _nothing_left(empty_cache)


def test_gguf_of_another_hash(empty_cache: Path, tmp_path: Path) -> None:
    gguf = the_gguf()
    bad = Path(shutil.copy(gguf, tmp_path / gguf.name))
    with bad.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)
        file.seek(50_000_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DamagedError) as caught:
        SMOLLM2.convert(bad)
    assert f"sha256 {wheels.sha256(bad)[:16]}..., expected {SMOLLM2.gguf_sha256[:16]}..." in str(caught.value)
    assert _nothing_left(empty_cache)


def _copy_of_cache(source: Path, target: Path, weights_bytes: int) -> None:
    target.mkdir(parents=True)
    for file in source.glob("*.json"):
        shutil.copy(file, target)
    with (source / "model.safetensors").open("rb") as file:
        (target / "model.safetensors").write_bytes(file.read(weights_bytes))


def test_truncated_weights(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as real:
        real.delenv("LANCET_CACHE")
        source = SMOLLM2.ensure()
    _copy_of_cache(source, SMOLLM2.folder(), 1_000_000)
    with pytest.raises(DamagedError) as caught:
        open_model("smollm2", device="cpu", dtype="float32")
    assert f"delete {SMOLLM2.folder()} and run `lancet get smollm2`" in str(caught.value)


def test_truncated_bfloat16_copy(empty_cache: Path, smollm2_bf16: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as real:
        real.delenv("LANCET_CACHE")
        source = SMOLLM2.ensure()
    SMOLLM2.folder().parent.mkdir(parents=True)
    SMOLLM2.folder().symlink_to(source)
    copy = SMOLLM2.folder().with_name(SMOLLM2.folder().name + "-bfloat16")
    _copy_of_cache(source.with_name(source.name + "-bfloat16"), copy, 1_000_000)
    with pytest.raises(DamagedError) as caught:
        open_model("smollm2", device="cpu", dtype="bfloat16")
    assert f"delete {copy}" in str(caught.value)


def test_too_little_disk_is_seen_before_anything_is_written(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = the_gguf()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(LancetError, match="900 MB needed, 1 MB free") as caught:
        SMOLLM2.convert(gguf)
    assert "LANCET_CACHE" in str(caught.value)
    assert _nothing_left(empty_cache)


def _full_disk() -> list[Exception]:
    from safetensors import SafetensorError

    said = os.strerror(errno.ENOSPC)
    # safetensors writes in Rust and reports a full disk as an error of its own kind.
    return [
        OSError(errno.ENOSPC, said),
        SafetensorError(f"Error while serializing: I/O error: {said} (os error {errno.ENOSPC})"),
    ]


@pytest.mark.parametrize("error", _full_disk(), ids=lambda error: type(error).__name__)
def test_disk_that_fills_up_while_writing(
    empty_cache: Path, smollm2_f32: Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    import safetensors.torch
    import transformers

    def half_written(state: dict[str, Tensor], path: Path, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise error

    gguf = the_gguf()
    # Dequantising again would take 20 s; the model that it gives is at hand.
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: smollm2_f32.hf)
    monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    with pytest.raises(LancetError, match="the disk is full"):
        SMOLLM2.convert(gguf)
    assert _nothing_left(empty_cache)
