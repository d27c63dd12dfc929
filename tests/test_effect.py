"""The effect lens against one plain pass for each prompt: the vector added at the last position, the mean change of
log-probability."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import random_lab, with_facts
from torch import Tensor

from lancet import effect
from lancet.errors import UsageError
from lancet.lab import Lab
from lancet.model import Model
from lancet.sae import random_sae
from lancet.site import Site


def plainly(model: Model, site: Site, vector: Tensor) -> Tensor:
    """[vocab] the mean change, prompt by prompt, with transformers' whole forward pass and nothing kept."""
    changes = []
    for text in effect.PROMPTS:
        ids = torch.tensor([model.tokenize(text).ids])

        def add(value: Tensor) -> Tensor:
            value = value.clone()
            value[0, -1] += vector.to(value.dtype)
            return value

        with torch.inference_mode():
            plain = model.hf(input_ids=ids).logits[0, -1].float().log_softmax(-1)
            with model.at(site, add):
                changes.append(model.hf(input_ids=ids).logits[0, -1].float().log_softmax(-1) - plain)
    return torch.stack(changes).mean(0)


@pytest.mark.parametrize("site", [Site(0), Site(2), Site(2, "resid_post"), Site(3, "resid_post")], ids=str)
def test_changes_are_the_plain_ones(site: Site, tiny_gpt2: Callable[..., Model]) -> None:
    model = tiny_gpt2()
    vectors = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 3
    found = torch.cat(list(effect.changes(model, site, vectors, batch=2)))
    assert found.shape == (5, model.hf.config.vocab_size)
    for row, vector in zip(found, vectors, strict=True):
        assert torch.allclose(row, plainly(model, site, vector), atol=1e-4)


def test_changes_on_the_embedded_model(smollm2_f32: Model) -> None:
    site = Site(12)
    vector = random_sae(576, 4).W_dec[:1] * 50
    expected = plainly(smollm2_f32, site, vector[0])
    found = next(effect.changes(smollm2_f32, site, vector))[0]
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max()) + 1e-4
    assert float(expected.abs().max()) > 0.5
    ids, nats = effect.top(smollm2_f32, site, vector, 5)
    assert ids[0].tolist() == expected.topk(5).indices.tolist()
    assert torch.equal(nats[0], nats[0].sort(descending=True).values)


def test_ranked_against_the_average_feature(tiny_gpt2: Callable[..., Model]) -> None:
    model, site = tiny_gpt2(), Site(2)
    vectors = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * 3
    rows = torch.cat(list(effect.changes(model, site, vectors)))
    base = effect.baseline(model, site, vectors)
    torch.testing.assert_close(base.mean, rows.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(base.deviation, rows.std(0, correction=0), rtol=0, atol=1e-4)
    score = (rows - rows.mean(0)) / (rows.std(0, correction=0) + effect.FLOOR)
    for largest in (True, False):
        ids, nats = effect.strongest(rows, 4, base, largest)
        assert torch.equal(ids, score.topk(4, largest=largest).indices)
        assert torch.equal(nats, rows.gather(1, ids))
    assert not torch.equal(effect.strongest(rows, 4, base)[0], effect.strongest(rows, 4)[0])


@pytest.fixture
def lab(tiny_gpt2: Callable[..., Model], tmp_path: Path) -> Lab:
    return with_facts(random_lab(tiny_gpt2(), d_sae=64), tmp_path / "facts.safetensors", [5.0] * 64, 20.0)


def test_the_labs_effects(lab: Lab) -> None:
    """Numbers, expressions and Directions, each at the asked share of the typical norm, in the order asked for."""
    lab.name("love", 7)
    targets: list[Any] = [3, "love - #4", lab.direction("2 * #7"), "#7"]
    found = lab.effect(targets, strength=0.5, count=6)
    site, model = lab.saes[0].site, lab.model
    for target, got in zip(targets, found, strict=True):
        vector = lab.direction(f"#{target}" if isinstance(target, int) else target).unit().vector * 0.5 * 20
        change = plainly(model, site, vector)
        assert [nats for _, nats in got.promotes] == pytest.approx(change.topk(6).values.tolist(), abs=1e-4)
        assert [nats for _, nats in got.suppresses] == pytest.approx(
            change.topk(6, largest=False).values.tolist(), abs=1e-4
        )
        assert [token for token, _ in got.promotes] == [model.decode([i]) for i in change.topk(6).indices.tolist()]
    assert [token for token, _ in found[2].promotes] == [
        token for token, _ in found[3].promotes
    ]  # the length is the same
    assert [effect.target for effect in found][:2] == ["#3", "love - #4"]
    assert lab.effect("#3")[0].strength == effect.STRENGTH
    assert set(found[0].to_json()) == {"target", "strength_rn", "promotes", "suppresses"}
    assert list(found[0].to_frame().columns) == ["token", "nats"]
    assert len(found[0].to_frame()) == 12
    assert str(found[0]).startswith("#3 at 0.5rn\n  says:   ")


def test_effects_that_cannot_be(lab: Lab) -> None:
    with pytest.raises(UsageError, match="no feature #64"):
        lab.effect(64)
    with pytest.raises(UsageError, match="points nowhere"):
        lab.effect("#3 - #3")
    two = Lab(lab.model, [random_sae(64, 8, site=Site(1)), random_sae(64, 8, site=Site(2))])
    with pytest.raises(UsageError, match="never mix"):
        two.effect("resid_pre.1#0 - resid_pre.2#0")


def test_the_model_is_left_as_it_was(lab: Lab) -> None:
    plain = lab.logits("The cat")
    changes = effect.changes(lab.model, lab.saes[0].site, torch.ones(3, 64), batch=1)
    next(changes)
    assert torch.equal(lab.logits("The cat"), plain)
    list(changes)
    assert torch.equal(lab.logits("The cat"), plain)


def test_words() -> None:
    tokens = [" melody", " Melody", "ing", " x", " ", "\ufffd", " \n", " 3rd", " song", " 歌曲", " chorus"]
    assert effect.words(tokens) == "melody, song, 歌曲"
    assert effect.words([]) == ""
