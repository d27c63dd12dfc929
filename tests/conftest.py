"""What all tests share: the embedded model on the CPU, and tiny random GPT-2s opened through the real loading path."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
if together := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # also for the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(together))))

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lancet.loading import open_model
from lancet.model import Model

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))  # 1 is much faster beside another busy process

START = "<|endoftext|>"
SMALL_TEXT = ["The cat sat on the mat and the dog sat on the cat.", "    return the value of the list", "你好，世界"]


@pytest.fixture(autouse=True)
def own_data(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a test gives are neither the user's nor another test's."""
    monkeypatch.setenv("LANCET_DATA", str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def smollm2_f32() -> Model:
    return open_model("smollm2", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def smollm2_bf16() -> Model:
    return open_model("smollm2", device="cpu", dtype="bfloat16")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """`tiny_gpt2(seed=0, chat_template=None, **config)`: a random GPT-2, saved and opened; its name is its folder."""

    def make(**settings: Any) -> Model:
        return open_model(str(save_tiny_gpt2(tmp_path_factory.mktemp("tiny"), **settings)), "cpu", "float32")

    return make


def save_tiny_gpt2(folder: Path, seed: int = 0, chat_template: str | None = None, **config: Any) -> Path:
    """Writes a random GPT-2 as safetensors with a byte-level tokenizer, in transformers' layout."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = small_tokenizer()
    assert tokenizer.token_to_id(START) == 0
    defaults = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 256, "vocab_size": tokenizer.get_vocab_size()}
    defaults |= {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1}
    torch.manual_seed(seed)
    hf = GPT2LMHeadModel(GPT2Config(**(defaults | config)))
    with torch.no_grad():  # a fresh GPT-2 has gains of 1 and biases of 0, which would hide mistakes about either
        for parameter in itertools.chain(hf.transformer.h.parameters(), hf.transformer.ln_f.parameters()):
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    hf.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START, pad_token=START)
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


def small_tokenizer() -> Any:
    """A byte-level BPE with the 256 bytes, `<|endoftext|>` as id 0, and a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[START], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(SMALL_TEXT, trainer)
    return tokenizer
