"""What the tests of opening by name share: GPT-2 Small's exact shape and its layer-6 SAE as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants as hf
import pytest
import torch
from conftest import small_tokenizer
from safetensors.torch import save_file

GPT2 = "openai-community/gpt2"
SAES = "jbloom/GPT2-Small-SAEs-Reformatted"
RES_JB = "gpt2-small-res-jb/blocks.6.hook_resid_pre"


class Says(list[str]):
    """`say` that keeps what it was told, downloads too."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: dict[str, tuple[int, int | None]] = {}

    def __call__(self, line: str) -> None:
        self.append(line)

    def progress(self, file: str, done: int, of: int | None) -> None:
        self.fetched[file] = (done, of)


def repeated(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers of a shape, one block over and over."""
    count = torch.Size(shape).numel()
    block = torch.randn(min(count, 1_000_003), generator=torch.Generator().manual_seed(0)).mul(scale).to(dtype)
    return block.repeat(-(-count // len(block)))[:count].reshape(shape).contiguous()


def make_gpt2(folder: Path) -> None:
    """GPT-2 Small's exact shape in bfloat16, with a pickle and another runtime's file beside it."""
    from transformers import GPT2Config, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    config = GPT2Config().to_dict() | {"architectures": ["GPT2LMHeadModel"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    for i in range(12):
        shapes |= {f"h.{i}.{name}.{part}": (768,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")}
        for name, (d_in, d_out) in {
            "attn.c_attn": (768, 2304),
            "attn.c_proj": (768, 768),
            "mlp.c_fc": (768, 3072),
            "mlp.c_proj": (3072, 768),
        }.items():
            shapes |= {f"h.{i}.{name}.weight": (d_in, d_out), f"h.{i}.{name}.bias": (d_out,)}
    shapes |= {"ln_f.weight": (768,), "ln_f.bias": (768,)}
    state = {name: repeated(shape, 0.02, torch.bfloat16) for name, shape in shapes.items()}
    assert sum(tensor.numel() for tensor in state.values()) == 124_439_808
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    start = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(), bos_token=start, eos_token=start)
    tokenizer.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04 never to be opened")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"another one's")


def make_res_jb(folder: Path, d_in: int = 768, d_sae: int = 24576) -> None:
    """The real layout: a config of eight keys that names neither architecture nor basis."""
    folder.mkdir(parents=True)
    config = {
        "d_in": d_in,
        "d_sae": d_sae,
        "hook_point": "blocks.6.hook_resid_pre",
        "hook_point_layer": 6,
        "model_name": "gpt2-small",
        "dataset_path": "Skylion007/openwebtext",
        "context_size": 128,
        "dtype": "torch.float32",
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    weights = {
        "W_enc": repeated((d_in, d_sae), 0.05, torch.float32),
        "W_dec": repeated((d_sae, d_in), 0.04, torch.float32),
        "b_enc": repeated((d_sae,), 0.1, torch.float32),
        "b_dec": repeated((d_in,), 0.1, torch.float32),
    }
    save_file(weights, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.zeros(d_sae)}, folder / "sparsity.safetensors")


def point_at(patch: pytest.MonkeyPatch, url: str, home: Path) -> None:
    """huggingface_hub in this process and in those that it starts, at another address with another cache."""
    patch.setattr(hf, "ENDPOINT", url)
    patch.setattr(hf, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(hf, "HF_URL_HOSTS", frozenset({"127.0.0.1"}))
    patch.setattr(hf, "HF_HUB_OFFLINE", False)
    patch.setattr(hf, "HF_HUB_CACHE", str(home / "hf" / "hub"))
    for name, value in {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "0",
        "LANCET_CACHE": str(home / "lancet"),
    }.items():
        patch.setenv(name, value)
    patch.delenv("HF_TOKEN", raising=False)
