"""Whether an SAE belongs to the open model, and in which basis it was trained, where its own files do not say."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import save_sae, with_facts

from lancet import pairing
from lancet.cli.read import spot_json
from lancet.errors import MismatchError, UsageError
from lancet.lab import Lab
from lancet.loading import modern_config, open_sae, sae_from_folder, site_of
from lancet.model import Model
from lancet.sae import Sae, random_sae
from lancet.site import Site

SITE = Site(2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    """A GPT-2 whose stream has a mean: every embedding is moved by 3."""
    model = tiny_gpt2(seed=5)
    with torch.no_grad():
        model.hf.transformer.wte.weight.add_(3.0)
    return model


def linear(encoder: torch.Tensor, decoder: torch.Tensor) -> Sae:
    d_in, d_sae = encoder.shape
    zero = torch.zeros
    return Sae("made", SITE, "standard", encoder, decoder, b_dec=zero(d_in), b_enc=zero(d_sae))


def centred_sae() -> Sae:
    """Rebuilds all of a vector but its mean."""
    off_mean = torch.eye(64) - 1 / 64
    return linear(torch.cat([off_mean, -off_mean], 1), torch.cat([off_mean, -off_mean]))


def plain_sae() -> Sae:
    """Rebuilds vectors whose entries are positive, as they are where the mean is left in."""
    return linear(torch.eye(64), torch.eye(64))


def save(folder: Path, sae: Sae, **metadata: Any) -> str:
    """A folder that states what is given and nothing else, least of all a basis."""
    save_sae(folder, sae, metadata={"hook_name": str(sae.site), **metadata})
    return str(folder)


# ---- basis -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "centred"), [(centred_sae, True), (plain_sae, False)])
def test_the_basis_that_explains_clearly_more_is_taken_and_kept(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Sae], centred: bool
) -> None:
    folder = save(tmp_path / "sae", make())
    assert open_sae(model, folder)[0].centred is centred
    monkeypatch.setattr(pairing, "_measured", lambda *_: pytest.fail("measured again"))
    assert open_sae(model, folder)[0].centred is centred
    assert len(list((tmp_path / "cache" / "basis").iterdir())) == 1


def test_the_basis_is_kept_for_its_model(
    model: Model, tiny_gpt2: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model of the same width is measured anew; the same weights in another folder are not."""
    folder = save(tmp_path / "sae", centred_sae())
    measured: list[str] = []
    measure = pairing._measured

    def counted(model: Model, *more: Any) -> Any:
        measured.append(model.name)
        return measure(model, *more)

    monkeypatch.setattr(pairing, "_measured", counted)
    open_sae(model, folder)
    open_sae(named(model, "elsewhere"), folder)
    assert measured == [model.name]
    other = tiny_gpt2(seed=6)
    with torch.no_grad():
        other.hf.transformer.wte.weight.add_(3.0)
    open_sae(other, folder)
    assert measured == [model.name, other.name]


def test_no_clear_winner_asks(model: Model, tmp_path: Path) -> None:
    folder = save(tmp_path / "sae", random_sae(64, 256, site=SITE))
    with pytest.raises(
        UsageError, match=r"nothing states in which basis sae was trained.*plain -?\d.*centred -?\d.*--basis centred"
    ):
        open_sae(model, folder)
    assert open_sae(model, folder, basis="centred")[0].centred
    assert not open_sae(model, folder, basis="plain")[0].centred
    with pytest.raises(UsageError, match="unknown basis 'middle'; use one of plain, centred"):
        open_sae(model, folder, basis="middle")


def test_an_sae_that_explains_nothing_wins_nothing(model: Model, tmp_path: Path) -> None:
    """One basis may be less bad than the other by far; worse than the mean it still proves nothing."""
    bad = centred_sae()
    bad.W_dec = bad.W_dec * -1
    with pytest.raises(UsageError, match="explained variance does not tell"):
        open_sae(model, save(tmp_path / "sae", bad))


def test_what_is_stated_is_not_measured(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "_measured", lambda *_: pytest.fail("measured"))
    for stated in (True, False):
        kwargs = {"center_writing_weights": stated}
        folder = save(tmp_path / str(stated), plain_sae(), model_from_pretrained_kwargs=kwargs)
        assert open_sae(model, folder)[0].centred is stated
    folder = save(tmp_path / "both", plain_sae(), model_from_pretrained_kwargs={"center_writing_weights": False})
    assert open_sae(model, folder, basis="centred")[0].centred  # the user goes before the file


def test_an_empty_statement_states_nothing(model: Model, tmp_path: Path) -> None:
    assert open_sae(model, save(tmp_path / "sae", centred_sae(), model_from_pretrained_kwargs={}))[0].centred


def test_where_bases_are_one_nothing_is_asked(
    smollm2_f32: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerLens centres no model with RMSNorm."""
    monkeypatch.setattr(pairing, "_measured", lambda *_: pytest.fail("measured"))
    folder = save(tmp_path / "sae", random_sae(576, 64, site=SITE))
    assert not open_sae(smollm2_f32, folder)[0].centred


# ---- model -----------------------------------------------------------------------------------------------------------


def named(model: Model, name: str) -> Model:
    out = copy.copy(model)
    out.name = name
    return out


@pytest.mark.parametrize("recorded", ["gpt2-small", "gpt2", "openai-community/gpt2", "some-unknown-name", None])
def test_its_own_model(model: Model, tmp_path: Path, recorded: str | None) -> None:
    folder = save(tmp_path / "sae", plain_sae(), **({"model_name": recorded} if recorded else {}))
    open_sae(named(model, "gpt2-small"), folder, "plain")
    open_sae(named(model, str(tmp_path)), folder, "plain")


def test_another_model(model: Model, tmp_path: Path) -> None:
    folder = save(tmp_path / "sae", plain_sae(), model_name="gpt2-small")
    other = named(model, "pythia-70m-deduped")
    with pytest.raises(MismatchError, match=r"was trained on gpt2-small, and pythia-70m-deduped is open: .*--anyway"):
        open_sae(other, folder, "plain")
    open_sae(other, folder, "plain", anyway=True)


def test_another_width_is_refused_whatever_is_said(model: Model, tmp_path: Path) -> None:
    folder = save(tmp_path / "sae", random_sae(48, 64, site=SITE))
    with pytest.raises(MismatchError, match=r"width 48, .* has width 64"):
        open_sae(model, folder, "plain", anyway=True)


def test_features_have_the_address_of_their_public_page(model: Model, tmp_path: Path) -> None:
    folder = save(tmp_path / "sae", plain_sae(), neuronpedia_id="gpt2-small/6-res-jb")
    found, _ = open_sae(model, folder, "plain")
    with_page = with_facts(Lab(model, [found]), tmp_path / "facts.safetensors", [1.0], 10.0)
    assert with_page.feature(7).url == "https://www.neuronpedia.org/gpt2-small/6-res-jb/7"
    reading = with_page.read("The cat sat.")
    told = spot_json(reading.at("cat"), 3, True)["top"]
    assert told and all(lit["url"] == with_page.feature(lit["feature"]).url for lit in told)  # type: ignore[union-attr,index]
    assert reading.to_json()["tokens"][0]["top"][0]["url"].startswith(
        "https://www.neuronpedia.org/gpt2-small/6-res-jb/"
    )
    without, _ = open_sae(model, save(tmp_path / "bare", plain_sae()), "plain")
    lab = with_facts(Lab(model, [without]), tmp_path / "other.safetensors", [1.0], 10.0)
    assert lab.feature(7).url == "" and "url" not in lab.read("The cat sat.").to_json()["tokens"][0]["top"][0]


# ---- files of other kinds --------------------------------------------------------------------------------------------


def test_configs_of_old_sae_lens(tmp_path: Path) -> None:
    """As sae-lens itself brings them up to date."""
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    shapes = {"d_in": 8, "d_sae": 16, "dtype": "float32", "device": "cpu", "model_name": "gpt2-small"}
    old = [
        {"hook_point": "blocks.6.hook_resid_pre"},
        {"hook_name": "blocks.6.hook_resid_pre", "architecture": "gated", "normalize_activations": "layer_norm"},
        {"hook_name": "blocks.6.hook_resid_pre", "normalize_activations": True},
        {"hook_name": "blocks.6.hook_resid_pre", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
    ]
    for config in old:
        ours, theirs = modern_config(shapes | config), handle_config_defaulting(dict(shapes | config))
        for key in ("architecture", "normalize_activations", "k"):
            assert ours.get(key) == theirs.get(key), (key, config)
        assert ours["metadata"]["hook_name"] == theirs["metadata"]["hook_name"]


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening"])
def test_scaling_that_was_not_folded_in_is_refused(tmp_path: Path, normalize: str) -> None:
    folder = save_sae(tmp_path / "sae", plain_sae(), normalize_activations=normalize)
    with pytest.raises(UsageError, match="the scale has not been folded into its weights"):
        sae_from_folder(folder)


def test_a_folded_one_opens(tmp_path: Path) -> None:
    """What sae-lens writes when training ends: the scale is in the weights, and the config says none."""
    from sae_lens import SAE

    sae = plain_sae()
    save_sae(tmp_path / "before", sae, normalize_activations="expected_average_only_in")
    theirs = SAE.load_from_disk(tmp_path / "before")
    theirs.fold_activation_norm_scaling_factor(2.0)
    theirs.save_model(tmp_path / "after")
    assert json.loads((tmp_path / "after" / "cfg.json").read_text())["normalize_activations"] == "none"
    x = torch.rand(5, 64)
    torch.testing.assert_close(sae_from_folder(tmp_path / "after").encode(x), theirs.encode(x))


def test_the_name_in_transformers_decides_where_two_tools_disagree() -> None:
    told = {
        "hook_name": "blocks.9.hook_mlp_in",
        "hook_name_out": "blocks.9.hook_mlp_out",
        "hf_hook_name": "model.layers.9.pre_feedforward_layernorm.output",
    }
    assert str(site_of(told, "")) == "blocks.9.mlp.hook_in"
    assert str(site_of(told, "_out")) == "blocks.9.hook_mlp_out"
    with pytest.raises(UsageError, match="hook_mlp_in"):
        site_of({"hook_name": "blocks.9.hook_mlp_in"}, "")
