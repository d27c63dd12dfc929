"""Every layout in which SAEs are published, from a hub on the loopback: what Lancet converts and opens equals what
sae-lens itself loads from the same files. The files are tiny, so sae-lens is told their sizes; names, formats and the
rest of the config are those of the release."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from fixtures_hub import point_at
from loopback import Hub, serving
from safetensors.torch import save_file
from torch import Tensor

from lancet import catalogue, convert, loading, published
from lancet.catalogue import Entry
from lancet.files import read_json
from lancet.pairing import About

D_IN, D_SAE, HEADS = 16, 64, 4


def normal(*shape: int, by: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * by).contiguous()


def standard() -> dict[str, Tensor]:
    """sae-lens' own names and orientation; the decoder is the encoder's transpose, so that features explain."""
    encoder = normal(D_IN, D_SAE, by=D_IN**-0.5)
    return {
        "W_enc": encoder,
        "W_dec": encoder.t().contiguous() + normal(D_SAE, D_IN, by=0.02),
        "b_enc": normal(D_SAE, by=0.1, seed=1),
        "b_dec": normal(D_IN, by=0.1, seed=2),
    }


def threshold() -> Tensor:
    return normal(D_SAE, seed=3).abs() * 0.5


# ---- a writer for each layout ----------------------------------------------------------------------------------------


def gemma_2(root: Path, entry: Entry) -> None:
    folder = root / entry.repo / entry.path
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in named_gemma_2().items()})


def named_gemma_2() -> dict[str, Tensor]:
    return {**standard(), "threshold": threshold()}


def gemma_3(root: Path, entry: Entry) -> None:
    folder = root / entry.repo / entry.path
    folder.mkdir(parents=True)
    weights = {name.lower(): value for name, value in standard().items()} | {"threshold": threshold()}
    layer = entry.layer
    told: dict[str, Any] = {"architecture": "jump_relu", "model_name": "gemma-v3-4b-pt", "l0": 10}
    if "transcoder" in entry.path:
        told |= {
            "hf_hook_point_in": f"model.layers.{layer}.pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"model.layers.{layer}.post_feedforward_layernorm.output",
            "affine_connection": "affine" in entry.path,
        }
    else:
        end = {"resid": "output", "attn_": "self_attn.o_proj.input", "mlp_o": "post_feedforward_layernorm.output"}
        told["hf_hook_point_in"] = f"model.layers.{layer}.{end[entry.path[:5]]}"
    if "affine" in entry.path:
        weights["affine_skip_connection"] = normal(D_IN, D_IN, by=0.2, seed=5)
    save_file(weights, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps(told))


def gemma_3_without_config(root: Path, entry: Entry) -> None:
    """Some of the folders have none; sae-lens then goes by their names."""
    gemma_3(root, entry)
    (root / entry.repo / entry.path / "config.json").unlink()


def llama_scope(root: Path, entry: Entry) -> None:
    folder = root / entry.repo / entry.path
    (folder / "checkpoints").mkdir(parents=True)
    told = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "jump_relu_threshold": 0.4,
        "dataset_average_activation_norm": {"in": 3.0, "out": 3.0},
        "hook_point_in": entry.site,
        "hook_point_out": entry.site,
    }
    (folder / "hyperparams.json").write_text(json.dumps(told))
    save_file(torch_linear(), folder / "checkpoints" / "final.safetensors")


def llama_scope_r1_distill(root: Path, entry: Entry) -> None:
    folder = root / entry.repo / entry.path
    folder.mkdir(parents=True)
    told = {"d_model": D_IN, "expansion_factor": 2, "hook_point_in": entry.site, "hook_point_out": entry.site}
    (folder / "config.json").write_text(json.dumps(told))
    weights = torch_linear() | {"log_jumprelu_threshold": threshold().clamp_min(0.01).log()}
    save_file(weights, folder / "sae_weights.safetensors")


def torch_linear(encoder: str = "encoder", decoder: str = "decoder") -> dict[str, Tensor]:
    """The names and orientation of torch's Linear."""
    own = standard()
    return {
        f"{encoder}.weight": own["W_enc"].t().contiguous(),
        f"{encoder}.bias": own["b_enc"],
        f"{decoder}.weight": own["W_dec"].t().contiguous(),
        f"{decoder}.bias": own["b_dec"],
    }


def dictionary_learning_1(root: Path, entry: Entry) -> None:
    folder = root / entry.repo / entry.path
    folder.mkdir(parents=True)
    trainer = {
        "dict_class": "AutoEncoderTopK",
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "layer": entry.layer,
        "lm_name": "google/gemma-2-2b",
        "k": 5,
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 1024}}))
    weights = torch_linear()
    weights["b_dec"] = weights.pop("decoder.bias")
    torch.save(weights | {"k": torch.tensor(5), "threshold": torch.tensor(0.3)}, folder / "ae.pt")


def qwen_scope(root: Path, entry: Entry) -> None:
    own = standard()
    flipped = {name: own[name].t().contiguous() for name in ("W_enc", "W_dec")}
    (root / entry.repo).mkdir(parents=True)
    torch.save(own | flipped, root / entry.repo / entry.path)


def connor_rob_hook_z(root: Path, entry: Entry) -> None:
    (root / entry.repo).mkdir(parents=True)
    told = {"act_size": D_IN, "dict_size": D_SAE, "act_name": entry.site}
    (root / entry.repo / (entry.path.removesuffix(".pt") + "_cfg.json")).write_text(json.dumps(told))
    torch.save(standard(), root / entry.repo / entry.path)


def deepseek_r1(root: Path, entry: Entry) -> None:
    (root / entry.repo).mkdir(parents=True)
    torch.save(torch_linear(), root / entry.repo / entry.path)


def goodfire(root: Path, entry: Entry) -> None:
    (root / entry.repo).mkdir(parents=True)
    torch.save(torch_linear("encoder_linear", "decoder_linear"), root / entry.repo / entry.path)


def gemma_2_transcoder(root: Path, entry: Entry) -> None:
    gemma_2(root, entry)


def mwhanna_transcoder(root: Path, entry: Entry) -> None:
    folder = root / entry.repo
    folder.mkdir(parents=True)
    sizes = {"d_model": D_IN, "d_feature": D_SAE, "batch_size": 4096}
    (folder / "wandb-config.yaml").write_text(yaml.safe_dump({name: {"value": v} for name, v in sizes.items()}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_name": "Qwen/Qwen3-4B"}))
    own = standard()
    save_file(own | {"W_enc": own["W_enc"].t().contiguous()}, folder / entry.path)


def temporal(root: Path, entry: Entry) -> None:
    folder = root / entry.repo / entry.path
    folder.mkdir(parents=True)
    told = {
        "llm": {"dimin": D_IN},
        "sae": {
            "exp_factor": D_SAE / D_IN,
            "n_heads": 2,
            "n_attn_layers": 1,
            "bottleneck_factor": 4,
            "sae_diff_type": "topk",
            "kval_topk": 6,
            "tied_weights": True,
            "scaling_factor": 0.7,
        },
        "data": {"dtype": "float32"},
    }
    (folder / "conf.yaml").write_text(yaml.safe_dump(told))
    own, narrow = standard(), D_SAE // 4
    layer = {"k_ctx": narrow, "q_target": narrow, "v_ctx": D_SAE, "c_proj": D_SAE}
    weights = {f"attn_layers.0.{name}.weight": normal(size, D_SAE, by=D_SAE**-0.5) for name, size in layer.items()}
    weights |= {f"attn_layers.0.{name}.bias": normal(size, by=0.01) for name, size in layer.items()}
    save_file(weights | {"D": own["W_dec"], "b": own["b_dec"]}, folder / "latest_ckpt.safetensors")


class Case(NamedTuple):
    """A published SAE.

    Attributes:
        name: as `--sae` takes it; write: makes its files; site, writes: where it reads and writes.
        pickle: whether a pickle is converted.
    """

    name: str
    write: Callable[[Path, Entry], None]
    architecture: str
    site: str
    writes: str = ""
    pickle: bool = False


SCOPE_2 = "gemma-scope-2-4b-pt"
CASES = [
    Case("gemma-scope-2b-pt-res/layer_5/width_16k/average_l0_68", gemma_2, "jumprelu", "blocks.5.hook_resid_post"),
    Case("gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_104", gemma_2, "jumprelu", "blocks.0.attn.hook_z"),
    Case(f"{SCOPE_2}-res-all/layer_3_width_16k_l0_big", gemma_3, "jumprelu", "blocks.3.hook_resid_post"),
    Case(f"{SCOPE_2}-att-all/layer_3_width_16k_l0_big", gemma_3, "jumprelu", "blocks.3.attn.hook_z"),
    Case(f"{SCOPE_2}-mlp-all/layer_3_width_16k_l0_big", gemma_3_without_config, "jumprelu", "blocks.3.hook_mlp_out"),
    Case(
        f"{SCOPE_2}-transcoders-all/layer_3_width_16k_l0_big",
        gemma_3,
        "jumprelu_transcoder",
        "blocks.3.mlp.hook_in",
        "blocks.3.hook_mlp_out",
    ),
    Case(
        f"{SCOPE_2}-transcoders-all/layer_3_width_16k_l0_big_affine",
        gemma_3_without_config,
        "jumprelu_skip_transcoder",
        "blocks.3.mlp.hook_in",
        "blocks.3.hook_mlp_out",
    ),
    Case("llama_scope_lxa_32x/l3a_32x", llama_scope, "jumprelu", "blocks.3.hook_attn_out"),
    Case("llama_scope_lxr_8x/l3r_8x", llama_scope, "jumprelu", "blocks.3.hook_resid_post"),
    Case("llama_scope_r1_distill/l0r_800m_slimpajama", llama_scope_r1_distill, "jumprelu", "blocks.0.hook_resid_post"),
    Case(
        "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109/blocks.12.hook_resid_post__trainer_0",
        dictionary_learning_1,
        "topk",
        "blocks.12.hook_resid_post",
        pickle=True,
    ),
    Case("qwen-scope-3-1.7b-base-w32k-l50/layer0", qwen_scope, "topk", "blocks.0.hook_resid_post", pickle=True),
    Case("gpt2-small-hook-z-kk/blocks.0.hook_z", connor_rob_hook_z, "standard", "blocks.0.attn.hook_z", pickle=True),
    Case(
        "deepseek-r1-distill-llama-8b-qresearch/blocks.19.hook_resid_post",
        deepseek_r1,
        "standard",
        "blocks.19.hook_resid_post",
        pickle=True,
    ),
    Case("goodfire-llama-3.1-8b-instruct/layer_19", goodfire, "standard", "blocks.19.hook_resid_post", pickle=True),
    Case(
        "gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76",
        gemma_2_transcoder,
        "jumprelu_transcoder",
        "blocks.0.ln2.hook_normalized",
        "blocks.0.hook_mlp_out",
    ),
    Case(
        "mwhanna-qwen3-4b-transcoders/layer_0",
        mwhanna_transcoder,
        "transcoder",
        "blocks.0.mlp.hook_in",
        "blocks.0.hook_mlp_out",
    ),
    Case("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post", temporal, "temporal", "blocks.12.hook_resid_post"),
]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    with serving(root) as hub:
        yield hub


@pytest.fixture
def sized(up: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, with sae-lens told the files' sizes and the converter in this process, where it can be told them too.

    What the converter changes in its process is put back.
    """
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes import sae as module

    point_at(monkeypatch, up.url, tmp_path)
    stated = module.get_config_overrides
    monkeypatch.setattr(
        module, "get_config_overrides", lambda *name: {**stated(*name), "d_in": D_IN, "d_sae": D_SAE, "d_out": D_IN}
    )
    for owner, name in (
        (torch, "load"),
        (np, "load"),
        (loaders, "hf_hub_download"),
        (loaders, "get_safetensors_tensor_shapes"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(
        published, "_run", lambda entry, out, say, progress: convert.convert(entry, out, lambda told: None)
    )
    return up


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.split("/")[0] + "/" + case.write.__name__)
def test_equals_what_sae_lens_loads(sized: Hub, case: Case) -> None:
    from sae_lens import SAE

    entry = catalogue.load().entry(case.name)
    if not (sized.root / entry.repo / entry.path).exists():
        case.write(sized.root, entry)
    theirs, _, _ = SAE.from_pretrained_with_cfg_and_sparsity(entry.release, entry.id, "cpu", dtype="float32")

    folder = published.ensure(entry)
    ours = loading.sae_from_folder(folder)
    assert (ours.architecture, str(ours.site)) == (case.architecture, case.site) and case.site == entry.site
    assert str(ours.writes) == (case.writes or case.site)
    assert (ours.d_in, ours.d_sae) == (D_IN, D_SAE)
    about = About.of(folder, read_json(folder / "cfg.json"))
    assert about.entry == entry and entry.model in about.models
    assert read_json(folder / "lancet.json")["pickle"] is case.pickle
    assert theirs.cfg.metadata.model_name in about.models

    x = normal(12, D_IN, by=1.5, seed=9)
    given = x[None] if case.architecture == "temporal" else x
    if theirs.cfg.reshape_activations == "hook_z":
        given = x.view(12, HEADS, D_IN // HEADS)
    with torch.no_grad():
        wanted = theirs.encode(given).reshape(12, D_SAE)
        rebuilt = theirs(given).reshape(12, D_IN)
    found = ours.features(x)
    assert 0 < len(found.value) < 12 * D_SAE  # or nothing would be shown
    torch.testing.assert_close(found.dense(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode_features(found, x), rebuilt, rtol=1e-5, atol=1e-5)


def test_every_layout_is_here() -> None:
    """Those of the list, but for sae-lens' own (test_hub.py) and what is no single SAE."""
    listed = {entry.loader for entry in catalogue.load().entries}
    elsewhere = {"sae_lens", "mntss_clt_layer_transcoder"}
    assert listed - elsewhere == {catalogue.load().entry(case.name).loader for case in CASES}
