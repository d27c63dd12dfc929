"""The two settings: a pair of GPT-2 Small's exact shape with random weights, and the embedded model with its SAE.

Random weights take as long as trained ones, and need no download. The random SAEs are calibrated on their model's own
values, so that about as many features fire on a token as in a trained SAE: reading's cost depends on that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Settings, remark

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.lab import Lab
    from lancet.model import Model

START = "<|endoftext|>"
VOCABULARY = 50_257
SITE = "blocks.6.hook_resid_pre"
WIDTH = 24_576
LIT = 64  # features that fire on a token
TEXTS = 100  # for calibrating random SAEs and for their facts, which mean nothing
PROMPT = "Golden Gate"  # a start token and eleven bytes: twelve tokens
SENTENCE = "The Golden Gate Bridge is located in San Francisco."
GROCERY = "I went to the grocery store to buy"


# ---- GPT-2 Small's shape -----------------------------------------------------------------------------------------


def gpt2_folders(settings: Settings) -> tuple[Path, Path]:
    """The model's and the SAE's folder, made once."""
    model, sae = settings.work / "gpt2-shape", settings.work / "gpt2-shape-sae"
    if not (sae / "cfg.json").is_file():
        remark(f"making a pair of GPT-2 Small's shape in {settings.work}, once (about 650 MB)")
        _save_gpt2(model)
        _save_gpt2_sae(model, sae)
    return model, sae


def gpt2(settings: Settings, folders: tuple[Path, Path] | None = None) -> Lab:
    """The pair opened, in float32 on the CPU, with its facts in place."""
    import lancet
    from lancet import facts

    model, sae = folders or gpt2_folders(settings)
    with own_cache(settings):
        lab = lancet.open(str(model), sae=str(sae), device="cpu", dtype="float32", anyway=True)  # random weights
        texts, facts.MEASURED_TEXTS = facts.MEASURED_TEXTS, TEXTS // 4
        try:
            lab.facts()  # measured the first time, and kept where fresh processes find them
        finally:
            facts.MEASURED_TEXTS = texts
    return lab


@contextmanager
def own_cache(settings: Settings) -> Iterator[None]:
    """Facts of the random pair stay out of the user's cache."""
    before = os.environ.get("LANCET_CACHE")
    os.environ["LANCET_CACHE"] = str(cache(settings))
    try:
        yield
    finally:
        del os.environ["LANCET_CACHE"]
        if before is not None:
            os.environ["LANCET_CACHE"] = before


def cache(settings: Settings) -> Path:
    """LANCET_CACHE of the random pair."""
    return settings.work / "cache"


def _save_gpt2(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY)).save_pretrained(folder)
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {START: VOCABULARY - 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    ends = {"bos_token": START, "eos_token": START, "unk_token": START, "pad_token": START}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=1024, **ends).save_pretrained(folder)


def _save_gpt2_sae(model: Path, folder: Path, texts: list[str] | None = None) -> None:
    from lancet.loading import open_model
    from lancet.sae import random_sae
    from lancet.site import Site

    opened = open_model(str(model), "cpu", "float32")
    rows = [opened.tokenize(text, most=512).ids for text in texts or ()]
    sae = random_sae(768, WIDTH, site=Site.parse(SITE), centred=True)
    save_sae(calibrate(opened, sae, rows), folder)


def gpt2_sae_for(settings: Settings, texts: list[str], name: str) -> tuple[Path, Path]:
    """The model's folder and that of an SAE of which LIT features fire on a token of these texts, made once: positions
    are random too, and on long texts the SAE of short ones fires seven times as often."""
    model, _ = gpt2_folders(settings)
    folder = settings.work / name
    if not (folder / "cfg.json").is_file():
        _save_gpt2_sae(model, folder, texts)
    return model, folder


# ---- the embedded model ------------------------------------------------------------------------------------------


def smollm2(settings: Settings, dtype: str) -> Lab:
    """The embedded model on the CPU, with its own SAE or a stand-in."""
    import lancet

    return lancet.open("smollm2", sae=smollm2_sae(settings), device="cpu", dtype=dtype)


def smollm2_sae(settings: Settings) -> str | None:
    """None for the SAE that ships, else the folder of a random one, made once."""
    from lancet.loading import bundled

    if bundled("smollm2"):
        return None
    folder = settings.work / "smollm2-random-sae"
    if not (folder / "cfg.json").is_file():
        import torch

        from lancet import facts
        from lancet.loading import open_model
        from lancet.sae import random_sae
        from lancet.site import Site

        model = open_model("smollm2", "cpu", "float32")
        sae = calibrate(model, random_sae(576, 8192, "jumprelu", site=Site(12)))
        # A bundled SAE brings its facts, effects included: looking their words up is part of reading.
        known = facts.measure(model, sae, facts.neutral_texts(TEXTS // 4))
        generator = torch.Generator().manual_seed(0)
        known.effect_ids = torch.randint(300, 49_000, (sae.d_sae, 20), generator=generator)
        known.effect_values = torch.rand(sae.d_sae, 20, generator=generator).sort(descending=True).values
        save_sae(sae, folder)
        known.save(folder / "facts.safetensors")
    return str(folder)


def smollm2_named(settings: Settings) -> str:
    """Which SAE the figures of the embedded model were taken with."""
    return "bundled SAE" if smollm2_sae(settings) is None else "random SAE"


# ---- SAEs --------------------------------------------------------------------------------------------------------


def calibrate(model: Model, sae: Any, rows: list[list[int]] | None = None) -> Any:
    """Shifts an SAE's biases so that on average LIT features fire on a token of some rows, or of short texts."""
    import torch

    from lancet import facts

    batch = model.batch(rows or [model.tokenize(text).ids[:12] for text in facts.neutral_texts(TEXTS)])
    x: Tensor = model.values(batch, [sae.site])[sae.site][batch.content].float()
    sae.b_dec = sae.in_basis(x).mean(0)
    sae.W_enc = sae.W_dec.t().clone()
    sae.b_enc = torch.zeros(sae.d_sae)
    if sae.threshold is not None:
        sae.threshold = torch.zeros(sae.d_sae)
    fires = sae.encode(x).flatten().topk(LIT * len(x)).values[-1]
    sae.b_enc -= fires
    return sae


def save_sae(sae: Any, folder: Path) -> None:
    """Writes an SAE in sae-lens' layout."""
    from safetensors.torch import save_file

    from lancet.files import write_json

    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    tensors = {name: value for name in names if (value := getattr(sae, name)) is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    write_json(
        folder / "cfg.json",
        {
            "architecture": sae.architecture,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "sae_lens_version": version("sae-lens"),  # without one, sae-lens takes this for its older layout
                "hook_name": str(sae.site),
                "model_from_pretrained_kwargs": {"center_writing_weights": sae.centred},
            },
        },
    )
