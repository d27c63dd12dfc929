"""Values in an SAE's basis against a HookedTransformer of the same weights with the same processing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fixtures_families import FAMILIES, PARALLEL, family, hooked
from test_sites import IDS, close, lens_values, sites

from lancet.basis import Basis, put_in_basis
from lancet.errors import UsageError
from lancet.model import Model
from lancet.sae import Sae, random_sae
from lancet.site import Site

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
FLAGS = ("center_writing_weights", "fold_value_biases", "fold_ln")
LAYER_NORMED = ("GPT-2", "Pythia", "Phi")


def at(site: Site, model: Model, architecture: str = "standard", **kwargs: Any) -> Sae:
    return random_sae(model.d_site(site), 16, architecture, site=site, **kwargs)  # type: ignore[arg-type]


def differs(name: str, basis: Basis, kwargs: dict[str, bool]) -> int:
    """Checks every site of a family in one basis; how many values the basis moved."""
    model, theirs = family(name), lens_values(hooked(name, **kwargs), name)
    moved = 0
    for site, value in model.values(model.batch([IDS]), sites(name)).items():
        sae = put_in_basis(at(site, model), model, basis)
        if sae.site != site:
            value = model.values(model.batch([IDS]), [sae.site])[sae.site]
        assert close(sae.in_basis(value), theirs[site], 1e-4), (site, kwargs)
        moved += not close(value, theirs[site], 1e-3)
    return moved


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=3)))
def test_gpt2_in_every_basis(flags: tuple[bool, bool, bool]) -> None:
    kwargs = dict(zip(FLAGS, flags, strict=True))
    moved = differs("GPT-2", Basis(**kwargs), kwargs)
    centred, folded, _ = flags
    assert moved == 3 * (6 * centred + folded)  # three layers, six kinds of site that are written to; and z


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "GPT-2"])
def test_fully_processed(name: str) -> None:
    kwargs = dict.fromkeys(FLAGS, True)
    moved = differs(name, Basis(**kwargs), kwargs)
    written = 5 if name in PARALLEL else 6
    assert moved == (3 * (written + 1) if name in LAYER_NORMED else 0)  # RMSNorm models are centred by nobody


def test_what_sae_lens_states() -> None:
    assert Basis.of({"center_writing_weights": True}) == Basis(center_writing_weights=True)
    assert Basis.of({"fold_ln": False, "dtype": "bfloat16"}) == Basis()
    for nothing in ({}, None):
        with pytest.raises(UsageError, match="nothing states how"):
            Basis.of(nothing)  # type: ignore[arg-type]


def test_what_cannot_be_undone() -> None:
    model = family("GPT-2")
    turned = Basis(refactor_factored_attn_matrices=True)
    with pytest.raises(UsageError, match="values were rotated"):
        put_in_basis(at(Site(1, "z"), model), model, turned)
    assert not put_in_basis(at(Site(1), model), model, turned).centred


def test_normed_embeddings_are_not_centred() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    hf = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4))
    model = Model("bloom", hf, family("GPT-2").tokenizer, 0, 0)
    with pytest.raises(UsageError, match="norms its embeddings"):
        put_in_basis(at(Site(1), model), model, Basis(center_writing_weights=True))


def test_a_transcoder_is_centred_where_it_writes() -> None:
    model = family("GPT-2")
    reads, writes = Site(1, "mlp.hook_in"), Site(1, "mlp_out")
    sae = at(reads, model, "transcoder", writes=writes)
    found = put_in_basis(sae, model, Basis(center_writing_weights=True))
    assert (found.centred, found.centred_out, found.site, found.writes) == (False, True, reads, writes)
    found = put_in_basis(sae, model, Basis(fold_ln=True))
    assert (found.site, found.writes) == (Site(1, "ln2.hook_normalized"), writes)
    assert sae.site == reads


def test_sinks_leave_no_constant_bias() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    settings: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    settings |= {
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "vocab_size": 300,
    }
    hf = GptOssForCausalLM(GptOssConfig(**settings, pad_token_id=0, attention_bias=True))
    model = Model("oss", hf, family("GPT-2").tokenizer, 0, 0)
    folded, site = Basis(fold_value_biases=True), Site(0, "z")
    assert put_in_basis(at(site, model), model, folded).offset is None
    with torch.no_grad():
        hf.model.layers[0].self_attn.v_proj.bias.add_(1)
    with pytest.raises(UsageError, match="puts no constant into"):
        put_in_basis(at(site, model), model, folded)
