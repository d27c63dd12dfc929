"""Facts against a plain loop, and that the facts of one pair are never taken for another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lancet import facts, fingerprint, loading, precision, processor
from lancet.errors import MismatchError
from lancet.lab import Lab
from lancet.model import Model
from lancet.sae import Sae, random_sae
from lancet.site import Site

TEXTS = ["the cat sat on the mat", "a dog", "rain falls on the old house by the sea", "one"]


@pytest.fixture
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path / "cache"))


def sae_of(model: Model, site: Site, **changed: object) -> Sae:
    sae = random_sae(model.d_model, 48, "jumprelu", seed=3, site=site)
    for name, value in changed.items():
        setattr(sae, name, value)
    return sae


def test_measured_facts_equal_a_plain_loop(model: Model) -> None:
    sae = sae_of(model, Site(2))
    found = facts.measure(model, sae, TEXTS)
    values = [
        model.hf(torch.tensor([model.tokenize(text).ids]), output_hidden_states=True).hidden_states[2][0, 1:]
        for text in TEXTS
    ]
    x = torch.cat(values).detach()
    f = sae.encode(x)
    torch.testing.assert_close(found.maximum, f.max(0).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.density, (f > 0).float().mean(0), rtol=0, atol=1.01 / len(x))
    assert found.norm == pytest.approx(float(x.norm(dim=1).median()), rel=1e-4)
    assert found.tokens == len(x)


def test_what_features_fire_on_equals_a_plain_loop(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "FIRES_AT_ONCE", 100)  # so that sums are merged more than once
    sae = sae_of(model, Site(2))
    texts = TEXTS * 20
    found = facts.measure(model, sae, texts)
    assert found.fires_ids is not None
    assert found.fires_shares is not None
    mass: dict[tuple[int, int], float] = {}
    for text in TEXTS:
        ids = model.tokenize(text).ids
        x = model.values(model.batch([ids]), [sae.site])[sae.site][0, 1:]
        for token, row in zip(ids[1:], sae.encode(x).tolist(), strict=True):
            for feature, value in enumerate(row):
                if value:
                    mass[feature, token] = mass.get((feature, token), 0.0) + value
    for feature in range(sae.d_sae):
        own = sorted(((v, token) for (f, token), v in mass.items() if f == feature), reverse=True)
        whole = sum(v for v, _ in own)
        kept = own[: facts.FIRES]
        assert found.fires_ids[feature].tolist() == [t for _, t in kept] + [-1] * (facts.FIRES - len(kept))
        expected = [v / whole for v, _ in kept] + [0.0] * (facts.FIRES - len(kept))
        assert found.fires_shares[feature].tolist() == pytest.approx(expected, rel=1e-3)


def test_facts_come_back_from_their_file(model: Model, tmp_path: Path) -> None:
    found = facts.measure(model, sae_of(model, Site(2)), TEXTS)
    found.save(tmp_path / "facts.safetensors")
    back = facts.Facts.load(tmp_path / "facts.safetensors")
    assert back.fires_ids is not None
    assert torch.equal(back.fires_ids.long(), found.fires_ids)
    assert torch.equal(back.maximum, found.maximum)
    assert (back.norm, back.tokens, back.effect_ids) == (found.norm, found.tokens, None)


def test_texts_longer_than_the_context_are_cut(model: Model) -> None:
    found = facts.measure(model, sae_of(model, Site(1)), ["word " * 3 * model.context])
    assert found.tokens == model.context - 1


@pytest.mark.parametrize("part", ["threshold", "b_enc", "b_dec", "W_enc"])
def test_another_saes_facts_are_not_taken(model: Model, part: str) -> None:
    sae = sae_of(model, Site(2))
    other = sae_of(model, Site(2), **{part: getattr(sae, part) + 0.25})
    assert fingerprint.of_pair(model, sae) != fingerprint.of_pair(model, other)
    assert fingerprint.of_pair(model, sae) == fingerprint.of_pair(model, sae_of(model, Site(2)))


def test_another_models_facts_are_not_taken(model: Model) -> None:
    sae = sae_of(model, Site(2))
    before = fingerprint.of_pair(model, sae)
    with torch.no_grad():
        for parameter in model.arch.decoder_layers[1].parameters():
            parameter.add_(0.1)
    assert fingerprint.of_pair(model, sae) != before


def test_facts_of_another_width_are_refused(model: Model, tmp_path: Path) -> None:
    facts.measure(model, random_sae(model.d_model, 32, site=Site(1)), TEXTS).save(tmp_path / "facts.safetensors")
    with pytest.raises(MismatchError, match=r"32 features.*48"):
        facts.of(model, sae_of(model, Site(1)), tmp_path / "facts.safetensors")


def test_saes_of_one_name_at_two_sites_keep_their_own_facts(model: Model) -> None:
    saes = [sae_of(model, Site(1)), sae_of(model, Site(3))]
    assert saes[0].name == saes[1].name
    lab = Lab(model, saes)
    first, second = (lab.facts(sae) for sae in saes)
    assert not torch.equal(first.maximum, second.maximum)
    assert first.norm != second.norm


def test_a_path_is_no_name_of_a_bundled_model(tmp_path: Path) -> None:
    (tmp_path / "blocks.1.hook_resid_pre").mkdir()
    (tmp_path / "blocks.1.hook_resid_pre" / "cfg.json").write_text("{}")
    assert loading.bundled(str(tmp_path)) == {}
    assert "blocks.12.hook_resid_pre" in loading.bundled("smollm2")


# ---- the precision that is chosen --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [({"1": 1.4, "256": 2.0}, True), ({"1": 0.9, "256": 2.0}, False), ({"1": 1.05, "256": 1.05}, False)],
)
def test_bfloat16_only_where_it_is_clearly_faster(
    measured: dict[str, float], chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "measure", lambda: measured)
    assert processor.prefers_bfloat16() is chosen
    dtype, note = precision.choose_dtype("auto", "cpu")
    assert dtype == (torch.bfloat16 if chosen else torch.float32)
    assert str(dtype).removeprefix("torch.") in note


def test_the_choice_is_kept_and_a_damaged_note_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(processor, "measure", lambda: calls.append(1) or {"1": 2.0, "256": 2.0})
    assert processor.prefers_bfloat16()
    assert processor.prefers_bfloat16()
    assert len(calls) == 1
    (processor.cache_dir() / "processor.json").write_text("{ half")
    assert processor.prefers_bfloat16()
    assert len(calls) == 2


def test_the_real_measurement_gives_plausible_ratios() -> None:
    measured = processor.measure()
    assert list(measured) == [str(rows) for rows in processor.ROWS]
    assert all(0.01 < ratio < 100 for ratio in measured.values())
