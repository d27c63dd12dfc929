"""What the tests of edits share: labs of random SAEs, facts with known numbers, SAE folders in sae-lens' layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lancet.generate
from lancet.edit import RowChange
from lancet.facts import Facts
from lancet.generate import Sampling, rows
from lancet.lab import Lab
from lancet.model import Model
from lancet.sae import Sae, random_sae
from lancet.site import Site
from lancet.tokens import Tokens

GREEDY = Sampling(temperature=0, repetition_penalty=1)


def random_lab(model: Model, architecture: str = "standard", d_sae: int = 1024, **kwargs: Any) -> Lab:
    """A model with one random SAE in its middle."""
    site = Site(12 if model.n_layers > 12 else model.n_layers // 2)
    return Lab(model, [random_sae(model.d_model, d_sae, architecture, site=site, **kwargs)])  # type: ignore[arg-type]


def with_facts(
    lab: Lab, path: Path, maximum: Sequence[float], norm: float, density: Sequence[float] = (), **more: Any
) -> Lab:
    """The same lab with facts of known numbers, shipped in a file; features that are not listed get 0."""

    def padded(values: Sequence[float]) -> Tensor:
        return torch.tensor([*values, *[0.0] * (lab.saes[0].d_sae - len(values))])

    Facts(padded(maximum), padded(density), norm, 1000, **more).save(path)
    return Lab(lab.model, lab.saes, {lab.saes[0].site: path})


def generated(
    model: Model,
    prompts: Sequence[Tokens],
    changes: Sequence[dict[Site, RowChange]],
    tokens: int,
    forced: Sequence[Sequence[int]] | None = None,
) -> tuple[list[list[int]], Tensor]:
    """The cached loop, greedily or with forced tokens: ids of each row, and the logits [rows, tokens, vocab]."""
    seen: list[Tensor] = []
    handle = model.arch.lm_head.register_forward_hook(lambda _module, _args, out: seen.append(out[:, -1].clone()))

    def choose(scores: Tensor, seeds: Sequence[int], step: int, greedy: bool) -> Tensor:
        return scores.argmax(-1) if forced is None else torch.tensor([row[step] for row in forced])

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lancet.generate, "choose", choose)
            made = list(rows(model, prompts, changes, tokens, GREEDY, [0] * len(prompts), stop=False))
    finally:
        handle.remove()
    return [list(row) for row in zip(*made, strict=True)], torch.stack(seen, 1)  # type: ignore[arg-type]


def longer(tokens: Tokens, ids: Sequence[int]) -> Tokens:
    """The same text with more tokens after it."""
    more = len(ids)
    end = len(tokens.text)
    return Tokens(
        tokens.text, (*tokens.ids, *ids), tokens.spans + ((end, end),) * more, tokens.roles + ("text",) * more
    )


def config_of(sae: Sae) -> dict[str, Any]:
    """sae-lens' cfg.json of an SAE."""
    said: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": sae.normalize,
        "reshape_activations": "none",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "metadata": {
            "hook_name": str(sae.site),
            "sae_lens_version": "6.54.12",
            "model_from_pretrained_kwargs": {"center_writing_weights": sae.centred},
        },
    }
    if sae.architecture in ("topk", "abstopk"):
        said |= {"k": sae.k, "rescale_acts_by_decoder_norm": sae.rescale_by_decoder_norm}
    if sae.kind.transcoder:
        said |= {"d_out": sae.d_out, "metadata": said["metadata"] | {"hook_name_out": str(sae.writes)}}
    if sae.architecture == "matching_pursuit":
        said |= vars(sae.pursuit)
    if sae.temporal is not None:
        width = len(sae.temporal.layers[0]["k_ctx.bias"])
        said |= {"n_heads": sae.temporal.heads, "bottleneck_factor": sae.d_sae // width, "tied_weights": sae.tied}
        said |= {"n_attn_layers": len(sae.temporal.layers), "activation_normalization_factor": sae.scalar}
        said |= {"sae_diff_type": "relu" if sae.temporal.k is None else "topk", "kval_topk": sae.temporal.k}
    return said


def reference(sae: Sae) -> Any:
    """sae-lens' SAE of the same weights."""
    from sae_lens import SAE

    theirs = SAE.from_dict(config_of(sae))
    tensors = dict(sae.tensors())
    theirs.load_state_dict({name: tensors[name].clone() for name in theirs.state_dict()})
    return theirs.requires_grad_(False)


def save_sae(folder: Path, sae: Sae, **config: Any) -> Path:
    """Writes an SAE in sae-lens' layout."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in sae.tensors() if name != "offset"}
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config_of(sae) | config))
    return folder
