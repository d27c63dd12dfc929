"""Finding features: every figure against scikit-learn or a plain loop, every kind of SAE, input that is no good, and on
the embedded model the meaning of it all."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_edits import random_lab, save_sae, with_facts
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor

import lancet
from lancet import background, detect, effect, effects, examples, facts
from lancet.background import Background, statistics
from lancet.cli import main, show
from lancet.errors import UsageError
from lancet.lab import Lab
from lancet.logit_lens import logit_lens, toward
from lancet.model import Model
from lancet.sae import Sae, random_sae
from lancet.site import Site
from lancet.tokens import Tokens

# No two begin with the same token: the same beginning gives the same activations, and ties that rounding decides.
LIKE = ["the cat sat on the mat.", "a cat and a dog", "my cat is on the dog.", "The cat!"]
UNLIKE = ["dogs sat on the mat.", "return the value"]
NEUTRAL = [
    "lists of the values", "Our dog sat.", "one", "he is in the old house", "Mats and mats", "8 hills", "go on",
    "value of it", "Snow and ice on hills", "Pairs of men talk", "Is it on the list?", "5 dogs", "you see it",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2()


@pytest.fixture(autouse=True)
def small_background(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and few neutral sentences."""
    monkeypatch.setattr(background, "neutral_sentences", lambda: NEUTRAL)
    monkeypatch.setattr(examples, "COMMON", 0.1)  # a word in none of so few sentences may still be a common one
    monkeypatch.setattr(examples, "CHANCE", 0.05)
    monkeypatch.setattr(facts, "MEASURED_TEXTS", 8)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def lab(model: Model, own_cache: Path) -> Lab:
    return with_facts(random_lab(model, d_sae=96), own_cache / "facts.safetensors", [5.0] * 96, 20.0)


def plain_features(model: Model, sae: Sae, text: str) -> tuple[Tensor, Tensor]:
    """[tokens, d_in] and [tokens, d_sae] of one text alone, start token left out."""
    x = model.values(model.batch([model.tokenize(text)]), [sae.site])[sae.site][0]
    return x[1:], (sae.encode(x[None])[0] if sae.kind.contextual else sae.encode(x))[1:]


def test_no_two_texts_begin_alike(model: Model) -> None:
    texts = [*LIKE, *UNLIKE, *NEUTRAL]
    assert len({model.tokenize(text).ids[1] for text in texts}) == len(texts)


def tokenised(model: Model, texts: list[str]) -> list[Tokens]:
    return [model.tokenize(text) for text in texts]


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "abstopk", "temporal", "matching_pursuit"])
def test_statistics_equal_a_plain_loop(kind: Any, model: Model) -> None:
    sae = random_sae(64, 96, kind, site=Site(2), seed=1)
    found = statistics(model, sae, tokenised(model, NEUTRAL))
    every = torch.arange(96)
    for i, text in enumerate(NEUTRAL):
        x, f = plain_features(model, sae, text)
        assert int(found.lengths[i]) == len(x)
        torch.testing.assert_close(found.values[i], x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.dense(every)[i], f.abs().amax(0), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.dense(every, "mean")[i], f.abs().mean(0), rtol=1e-3, atol=1e-3)
        mine = found.token_text == i
        single = torch.zeros(len(x) + 1, 96)
        single[found.token_position[mine], found.token_feature[mine]] = found.token_value[mine]
        torch.testing.assert_close(single[1:], f, rtol=1e-3, atol=1e-3)
    keys = found.text * 96 + found.feature
    assert torch.equal(keys, keys.unique())
    assert torch.equal(found.dense(torch.tensor([7, 3])), found.dense(every)[:, [7, 3]])


def test_a_background_is_the_statistics_of_its_sentences_whatever_the_pieces(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "AT_ONCE", 5)
    sae = random_sae(64, 96, "abstopk", site=Site(2), seed=1)
    base = background.measure(model, sae, NEUTRAL)
    base.save(tmp_path / "base.safetensors")
    back = Background.load(tmp_path / "base.safetensors")
    single = [plain_features(model, sae, text) for text in NEUTRAL]
    f = torch.cat([part for _, part in single])
    torch.testing.assert_close(back.activation, f.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(back.maximum.dense(torch.arange(96)), torch.stack([p.abs().amax(0) for _, p in single]),
                               rtol=1e-3, atol=1e-3)  # fmt: skip
    torch.testing.assert_close(back.mean.dense(torch.arange(96)), torch.stack([p.abs().mean(0) for _, p in single]),
                               rtol=1e-3, atol=1e-3)  # fmt: skip
    assert (back.token.population, back.maximum.population) == (len(f), len(NEUTRAL))
    assert len(back.token.value) == int((f != 0).sum())
    for feature in range(96):
        own = back.token.value[back.token.begin[feature] : back.token.begin[feature + 1]]
        expected = f[:, feature].abs()
        torch.testing.assert_close(own, expected[expected > 0].sort().values, rtol=1e-3, atol=1e-3)
    for i in range(model.d_vocab):
        assert int(back.seen[i]) == sum(i in row.ids for row in tokenised(model, NEUTRAL))


def test_a_background_is_measured_once_and_again_when_damaged(lab: Lab, own_cache: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        background.of(lab.model, lab.sae(), said.append)
    assert len(said) == 1
    (file,) = (own_cache / "cache" / "background").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    background.of(lab.model, lab.sae(), said.append)
    assert len(said) == 2


# ---- evidence --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(lab: Lab) -> tuple[Lab, Background, Tensor, Tensor]:
    """The lab, its background, and dense [texts, d_sae] maxima and means of the neutral sentences."""
    sae = lab.sae()
    parts = [plain_features(lab.model, sae, text)[1] for text in NEUTRAL]
    base = background.of(lab.model, sae)
    return lab, base, torch.stack([p.amax(0) for p in parts]), torch.stack([p.mean(0) for p in parts])


def surprise(value: float, population: Tensor) -> float:
    reach = len(population) if value <= 0 else int((population >= value).sum())
    return -math.log((reach + 1) / (len(population) + 1))


def own_features(lab: Lab, texts: list[str]) -> list[Tensor]:
    return [plain_features(lab.model, lab.sae(), text)[1] for text in texts]


def test_evidence_is_the_mean_capped_surprise(pair: tuple[Lab, Background, Tensor, Tensor]) -> None:
    lab, base, maxima, means = pair
    own = statistics(lab.model, lab.sae(), tokenised(lab.model, LIKE))
    found = detect.evidence(own, base)
    for feature in range(96):
        total = 0.0
        for f in own_features(lab, LIKE):
            high = surprise(float(f[:, feature].max()), maxima[:, feature])
            broad = surprise(float(f[:, feature].mean()), means[:, feature])
            total += min(high, detect.CAP) + min(broad, detect.CAP) + detect.BEYOND * (high + broad)
        assert float(found[feature]) == pytest.approx(total / len(LIKE), abs=1e-3), feature
    assert math.log(len(NEUTRAL) + 1) < detect.CAP  # no value of so few sentences reaches the cap: it is tried below


def test_the_cap_holds(pair: tuple[Lab, Background, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    lab, base, _, _ = pair
    own = statistics(lab.model, lab.sae(), tokenised(lab.model, LIKE))
    monkeypatch.setattr(detect, "CAP", 0.5)
    monkeypatch.setattr(detect, "BEYOND", 0.0)
    found = detect.evidence(own, base)
    assert float(found.max()) == pytest.approx(1.0, abs=1e-5)


def test_strongest_at_the_closing_mark(lab: Lab) -> None:
    rows = tokenised(lab.model, LIKE)
    found = detect.at_the_end(rows, statistics(lab.model, lab.sae(), rows), 96)
    features = own_features(lab, LIKE)
    closed = [text[-1] in ".!" for text in LIKE]
    assert closed == [True, False, True, True]
    for feature in range(96):
        share = sum(
            end and float(f[-1, feature]) > 0 and float(f[-1, feature]) == float(f[:, feature].max())
            for f, end in zip(features, closed, strict=True)
        )
        assert float(found[feature]) == pytest.approx(share / len(LIKE)), feature


def test_alike(pair: tuple[Lab, Background, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    _, base, maxima, means = pair
    monkeypatch.setattr(detect, "LEADERS", 3)
    monkeypatch.setattr(detect, "ALIKE", 4)
    score = torch.rand(96, generator=torch.Generator().manual_seed(0))
    leaders = score.argsort(descending=True)[:3].tolist()
    said = [sum(surprise(float(row[f]), maxima[:, f]) for f in leaders) for row in maxima]
    chosen = sorted(range(len(said)), key=lambda i: -said[i])[:4]
    found = detect.alike(score, base)
    for feature in range(96):
        total = sum(
            min(surprise(float(part[i, feature]), part[:, feature]), detect.CAP)
            for i in chosen
            for part in (maxima, means)
        )
        assert float(found[feature]) == pytest.approx(total / 4, abs=1e-3), feature


def test_evidence_at_tokens(pair: tuple[Lab, Background, Tensor, Tensor]) -> None:
    lab, base, _, _ = pair
    rows = tokenised(lab.model, LIKE)
    tokens = examples.places(rows, "cat")
    own = statistics(lab.model, lab.sae(), rows)
    found = detect.evidence_at(own, base, tokens)
    population = torch.cat(own_features(lab, NEUTRAL))
    features = own_features(lab, LIKE)
    for feature in range(96):
        total = 0.0
        for f, inside in zip(features, tokens, strict=True):
            mine = f[inside[1 : len(f) + 1], feature]
            total += max(min(surprise(float(v), population[:, feature]), detect.CAP) for v in mine)
        assert float(found[feature]) == pytest.approx(total / len(LIKE), abs=1e-3), feature


def test_the_score_is_made_of_these(pair: tuple[Lab, Background, Tensor, Tensor]) -> None:
    lab, base, _, _ = pair
    rows, others = tokenised(lab.model, LIKE), tokenised(lab.model, UNLIKE)
    own, against = (statistics(lab.model, lab.sae(), part) for part in (rows, others))
    tokens = examples.places(rows, "cat")
    first = detect.evidence(own, base) - detect.ENDING * detect.at_the_end(rows, own, 96)
    first = first - detect.evidence(against, base)
    expected = first + detect.ALIKE_WEIGHT * detect.alike(first, base) + detect.evidence_at(own, base, tokens)
    torch.testing.assert_close(detect.score(rows, own, [against], base, tokens), expected)
    # Of several groups the one that a feature fires on most speaks against it.
    both = torch.maximum(detect.evidence(own, base), detect.evidence(against, base))
    first = detect.evidence(own, base) - detect.ENDING * detect.at_the_end(rows, own, 96) - both
    found = detect.score(rows, own, [against, own], base, None)
    torch.testing.assert_close(found, first + detect.ALIKE_WEIGHT * detect.alike(first, base))
    assert float(first.max()) <= 0  # held against themselves, examples say nothing


# ---- figures ---------------------------------------------------------------------------------------------------------


def calibrated(positives: Tensor, negatives: Tensor) -> tuple[float, float]:
    """The best calibrated F1 over all thresholds, scikit-learn's with negatives weighed as the prior asks."""
    share = len(positives) / (len(positives) + len(negatives))
    weight = share * (1 - detect.PRIOR) / (detect.PRIOR * (1 - share))
    labels = np.array([1] * len(positives) + [0] * len(negatives))
    values = torch.cat([positives, negatives]).numpy()
    weights = np.where(labels == 1, 1.0, weight)
    best = (0.0, 0.0)
    for threshold in sorted({float(v) for v in positives if v > 0}):
        score = f1_score(labels, values >= threshold, sample_weight=weights)
        best = max(best, (float(score), threshold), key=lambda entry: entry[0])
    return best


@pytest.mark.parametrize("at", [None, "cat"])
def test_every_figure_is_scikit_learns(pair: tuple[Lab, Background, Tensor, Tensor], at: str | None) -> None:
    lab, _, maxima, _ = pair
    found = lab.find(LIKE, UNLIKE, at, top=20, causes=False)
    rows = tokenised(lab.model, LIKE)
    tokens = examples.places(rows, at)
    own, theirs = own_features(lab, LIKE), own_features(lab, UNLIKE)
    population = torch.cat(own_features(lab, NEUTRAL))
    assert len(found.candidates) > 5
    for c in found.candidates:
        mine = torch.stack([f[:, c.feature].max() for f in own])
        labels = [1] * len(mine) + [0] * len(maxima)
        assert c.auroc == pytest.approx(roc_auc_score(labels, torch.cat([mine, maxima[:, c.feature]])), abs=1e-4)
        others = torch.stack([f[:, c.feature].max() for f in theirs])
        expected = roc_auc_score([1] * len(mine) + [0] * len(others), torch.cat([mine, others]))
        assert c.unlike_auroc == pytest.approx(expected, abs=1e-4)
        assert (c.f1, c.threshold) == pytest.approx(calibrated(mine, maxima[:, c.feature]), rel=1e-3)
        assert c.elsewhere == pytest.approx(float((maxima[:, c.feature] >= c.threshold).float().mean()), abs=1e-4)
        single = torch.cat([f[inside[1 : len(f) + 1], c.feature] for f, inside in zip(own, tokens, strict=True)])
        labels = [1] * len(single) + [0] * len(population)
        both = torch.cat([single, population[:, c.feature]])
        assert c.token_auroc == pytest.approx(roc_auc_score(labels, both), abs=1e-4)
        assert c.token_f1 == pytest.approx(calibrated(single, population[:, c.feature])[0], rel=1e-3)
        fired = [(i, int(f[:, c.feature].argmax()) + 1) for i, f in enumerate(own) if float(f[:, c.feature].max()) > 0]
        assert [(e.example, e.token) for e in c.where] == [(i, rows[i].piece(p).strip()) for i, p in fired]
        assert [e.value for e in c.where] == pytest.approx(
            [float(own[i][p - 1, c.feature]) for i, p in fired], abs=2e-3
        )
    assert [c.evidence for c in found.candidates] == sorted((c.evidence for c in found.candidates), reverse=True)


def test_a_feature_that_never_fires_in_the_examples(pair: tuple[Lab, Background, Tensor, Tensor]) -> None:
    lab, base, maxima, _ = pair
    own = statistics(lab.model, lab.sae(), tokenised(lab.model, LIKE))
    nothing = torch.tensor([99])
    gone = type(own)(**{**vars(own), "feature": own.feature * 0 + 5, "token_feature": own.token_feature * 0 + 5})
    assert gone.dense(nothing).tolist() == [[0.0]] * len(LIKE)
    told = detect.figures(gone, [], base, examples.places(tokenised(lab.model, LIKE), None), 7)
    assert (told.f1, told.threshold, told.token_f1) == (0, 0, 0)
    assert told.auroc == pytest.approx(roc_auc_score([1] * 4 + [0] * 13, [0.0] * 4 + maxima[:, 7].tolist()), abs=1e-5)
    assert told.elsewhere == pytest.approx(float((maxima[:, 7] > 0).float().mean()))


def test_a_few_features_as_one(pair: tuple[Lab, Background, Tensor, Tensor]) -> None:
    lab, _, maxima, _ = pair
    found = lab.find(LIKE, causes=False, together=3)
    assert len(found.together) == len(found.adds) == 3
    own = own_features(lab, LIKE)

    def speaks(row: Tensor, features: tuple[int, ...]) -> float:
        return sum(surprise(float(row[f]), maxima[:, f]) for f in features)

    mine, other = [f.amax(0) for f in own], list(maxima)
    for n, told in enumerate(found.adds, 1):
        scores = [round(speaks(row, found.together[:n]), 5) for row in (*mine, *other)]
        assert told == pytest.approx(roc_auc_score([1] * len(mine) + [0] * len(other), scores), abs=1e-4)
    texts = [*LIKE[:2], "zebras on the mat", "Xmas"]  # neutral ones themselves would tie
    expected = [speaks(f.amax(0), found.together) for f in own_features(lab, texts)]
    assert found.detect(texts).tolist() == pytest.approx(expected, abs=1e-3)


def test_the_baselines(pair: tuple[Lab, Background, Tensor, Tensor]) -> None:
    lab, base, _, _ = pair
    own = torch.stack([plain_features(lab.model, lab.sae(), text)[0].mean(0) for text in LIKE])
    neutral = torch.stack([plain_features(lab.model, lab.sae(), text)[0].mean(0) for text in NEUTRAL])
    covariance = torch.tensor(np.cov(neutral.numpy().T), dtype=torch.float32)
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(64)
    areas: dict[str, list[float]] = {"DiffMean": [], "LDA": []}
    for i in range(len(own)):
        rest = torch.cat([own[:i], own[i + 1 :]]).mean(0) - neutral.mean(0)
        for name, way in (("DiffMean", rest), ("LDA", torch.linalg.inv(covariance) @ rest)):
            scores = torch.cat([own[i : i + 1], neutral]) @ way
            areas[name].append(roc_auc_score([1] + [0] * len(neutral), scores))
    found = detect.baselines(own, base.examples)
    for name, values in areas.items():
        assert found[f"{name} (left out in turn)"] == pytest.approx(sum(values) / len(values), abs=1e-3)
    labels = [1] * len(own) + [0] * len(neutral)
    each = [roc_auc_score(labels, torch.cat([own, neutral])[:, k]) for k in range(64)]
    assert found["best coordinate"] == pytest.approx(max(max(a, 1 - a) for a in each), abs=1e-4)
    assert list(detect.baselines(own[:1], base.examples)) == ["best coordinate"]


# ---- causes ----------------------------------------------------------------------------------------------------------


def test_first_mentions_equal_a_plain_uncached_loop(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "ROWS", 2)
    monkeypatch.setattr(effects, "TOKENS", 4)
    model, sae = lab.model, lab.sae()
    vectors = torch.cat([torch.zeros(1, 64), torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 3])
    words = [40, 41, 70]
    found = effects.first_mentions(lab, sae, vectors, words)
    for vector, told in zip(vectors, found.tolist(), strict=True):

        def add(value: Tensor, vector: Tensor = vector) -> Tensor:
            value = value.clone()
            value[:, 1:] += vector
            return value

        total = 0.0
        for text in effects.BEGINNINGS:
            ids, missed = list(model.tokenize(text).ids), 1.0
            for _ in range(4):
                with torch.inference_mode(), model.at(sae.site, add):
                    scores = model.hf(input_ids=torch.tensor([ids])).logits[0, -1].float()
                scores = scores.clone()
                missed *= 1 - float(scores.softmax(-1)[words].sum())
                scores[[*words, 0]] = -float("inf")  # 0 ends the text
                ids.append(int(scores.argmax()))
            total += 1 - missed
        assert told == pytest.approx(total / len(effects.BEGINNINGS), abs=1e-4)


def test_towards_the_words(lab: Lab) -> None:
    rows = effects.unit_rows(lab.sae(), [3, 8]) * 7
    torch.testing.assert_close(rows.norm(dim=1), torch.full((2,), 7.0))
    change = torch.cat(list(effect.changes(lab.model, lab.sae().site, rows)))
    expected = change[:, [40, 41]].mean(1) - change.mean(1)
    torch.testing.assert_close(effects.towards(lab, lab.sae(), rows, [40, 41]), expected)


@pytest.mark.parametrize("kind", ["standard", "topk", "abstopk", "transcoder", "temporal"])
def test_the_output_score_is_the_published_one(kind: Any, model: Model, own_cache: Path) -> None:
    lab = with_facts(random_lab(model, kind, d_sae=96, seed=2), own_cache / "facts.safetensors", [5.0] * 96, 20.0)
    sae = lab.sae()
    found, told = effects.output_scores(lab, sae, [3, 50], [1, -1])
    tokens = model.tokenize("From my experience,")
    values = model.values(model.batch([tokens]), [sae.site, sae.writes])
    f = sae.encode(values[sae.site])[0]
    for feature, sign, score in ((3, 1, found[0]), (50, -1, found[1])):
        changed = f.clone()
        changed[-1, feature] += sign * 10 * f[-1].abs().max()
        row = sign * sae.rows(torch.tensor([feature]))
        moved = sae.write(values[sae.site][0], changed - f, slice(0, 96))[-1]

        def put(value: Tensor, moved: Tensor = moved) -> Tensor:
            value = value.clone()
            value[0, -1] += moved
            return value

        with torch.inference_mode(), model.at(sae.writes, put):
            p = model.hf(input_ids=torch.tensor([tokens.ids])).logits[0, -1].softmax(-1)
        top = logit_lens(model, row)[0].topk(20).indices
        ranks = p.argsort(descending=True).argsort()[top]
        assert score == pytest.approx(float((1 - ranks.min() / len(p)) * p[top].max()), rel=1e-3)
    assert len(told) == 2


def test_the_logit_lens_of_a_layer_norm_model(model: Model) -> None:
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    gain, head = model.hf.transformer.ln_f.weight, model.hf.lm_head.weight
    plain = ((vectors - vectors.mean(1, keepdim=True)) * gain) @ head.t()
    plain = (plain - plain.mean(1, keepdim=True)).detach()
    torch.testing.assert_close(logit_lens(model, vectors), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(toward(model, vectors, [5, 9]), plain[:, [5, 9]], rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="64 wide, not 32"):
        logit_lens(model, torch.zeros(1, 32))


@pytest.mark.parametrize(("family", "plus"), [("Gemma", 1.0), ("Llama", 0.0)])
def test_the_logit_lens_of_rms_norms(family: str, plus: float, model: Model) -> None:
    """Gemma's gain is 1 + w."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=60,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = getattr(transformers, f"{family}ForCausalLM")(config)
    hf.model.norm.weight.data = torch.rand(32)
    other = Model("tiny", hf, model.tokenizer, 0)
    vectors = torch.randn(2, 32)
    plain = (vectors * (plus + hf.model.norm.weight)) @ hf.lm_head.weight.t()
    expected = (plain - plain.mean(1, keepdim=True)).detach()
    torch.testing.assert_close(logit_lens(other, vectors), expected, rtol=1e-4, atol=1e-4)


def test_the_blend(lab: Lab) -> None:
    found = lab.find(LIKE, blend=3)
    assert found.blend is not None
    assert 1 <= len(found.parts) <= 3
    own, neutral = (torch.cat(own_features(lab, texts)) for texts in (LIKE, NEUTRAL))
    difference = own.mean(0) - neutral.mean(0)
    vector = torch.zeros(64)
    for feature, weight in found.parts:
        assert weight == pytest.approx(float(difference[feature]), rel=1e-2)
        assert weight > 0
        vector += weight * lab.sae().W_dec[feature]
    torch.testing.assert_close(found.blend.vector, vector, rtol=1e-4, atol=1e-4)
    strength = (difference.clamp_min(0) * lab.sae().W_dec.norm(dim=1)).argsort(descending=True)[: effects.POOL]
    rows = lab.sae().W_dec[strength] / lab.sae().W_dec[strength].norm(dim=1, keepdim=True) * 20 * effect.STRENGTH
    change = torch.cat(list(effect.changes(lab.model, lab.sae().site, rows)))
    causing = strength[change[:, list(found.words)].mean(1) > change.mean(1)][:3]
    assert [f for f, _ in found.parts] == causing.tolist()
    lab.name("cats", found.blend)
    torch.testing.assert_close(lab.direction("cats").vector, vector, rtol=1e-4, atol=1e-4)


def test_what_candidates_cause_is_told(lab: Lab) -> None:
    found = lab.find(LIKE, top=5)
    assert found.words
    for c in found.candidates:
        assert c.lens is not None
        assert c.mention is not None
        assert c.plain is not None
        assert c.output is not None
        row = lab.sae().W_dec[c.feature] / lab.sae().W_dec[c.feature].norm() * 20
        lens = effects.towards(lab, lab.sae(), row[None] * effect.STRENGTH, found.words)
        assert c.lens == pytest.approx(float(lens[0]), abs=1e-3)
        mention = effects.first_mentions(lab, lab.sae(), row[None] * effects.STRENGTH, found.words)
        assert c.mention == pytest.approx(float(mention[0]), abs=1e-4)
        assert c.plain == found.candidates[0].plain
        assert c.causes == (c.mention - c.plain >= 0.1)


# ---- words -----------------------------------------------------------------------------------------------------------


def test_carriers() -> None:
    own, (others, *alone) = examples.carriers(" golden gate bridge ")
    assert own[0] == "They talked about golden gate bridge all evening."
    assert own[1] == "I had never thought much about Golden Gate Bridge before."
    assert [group[0].split()[3] for group in alone] == ["golden", "gate", "bridge"]
    assert "Golden" in alone[0][1]
    for i, group in enumerate((own, others, *alone)):
        assert len(set(group)) == len(examples.CARRIERS), i
        for carrier, text in zip(examples.CARRIERS, group, strict=True):
            head, tail = carrier.split("{}")
            assert text.startswith(head)
            assert text.endswith(tail)
    own, groups = examples.carriers("Paris")
    assert len(groups) == 1
    assert all("Paris" in text for text in own)
    assert examples.carriers("a {x} b")[0][0] == "They talked about a {x} b all evening."
    chinese, _ = examples.carriers("金门大桥")
    assert all("金门大桥" in text for text in chinese)
    assert not any("a" <= letter <= "z" for text in chinese for letter in text)


@pytest.mark.parametrize(
    "words", ["", "  ", "?!", "The bridge is red.", "one two three four five six seven eight nine"]
)
def test_no_words(words: str) -> None:
    with pytest.raises(UsageError, match=r"words|sentence"):
        examples.carriers(words)


def test_words_are_read_and_looked_up(model: Model, own_cache: Path) -> None:
    """The look-up's hits come with their evidence, and the strongest of all features is the first."""
    cat = model.tokenizer(" cat")["input_ids"]
    assert len(cat) == 1
    ids, values = torch.zeros(96, 4, dtype=torch.long), torch.zeros(96, 4)
    ids[77, 2], values[77, 2] = cat[0], 3.5
    ids[12, 0], values[12, 0] = cat[0], 1.25
    ids[13, 0], values[13, 0] = cat[0], -2.0
    known: dict[str, Any] = {"effect_ids": ids, "effect_values": values}
    lab = with_facts(random_lab(model, d_sae=96), own_cache / "facts.safetensors", [5.0] * 96, 20.0, **known)
    found = lab.find("cat", top=1)
    assert found.asked == "cat"
    assert cat[0] in found.words
    told = {c.feature: c.told for c in (*found.candidates, *found.sayers) if c.told}
    assert told == {77: 3.5, 12: 1.25}
    for c in found.sayers:
        assert c.mention is not None and c.lens is not None and c.unlike_auroc is not None
    assert [c.feature for c in found.sayers] == [f for f in (77, 12) if f != found.candidates[0].feature]
    assert found.like == tuple(examples.carriers("cat")[0])
    assert {"asked", "sayers", "unlike"} <= set(found.to_json())


def test_words_where_the_effects_of_all_features_are_not_known(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "SHORTLIST", 20)
    groups = [[40, 41], [70]]
    notes: list[str] = []
    found = effects.saying(lab, lab.sae(), groups, 4, notes)
    assert len(notes) == 1 and "logit lens" in notes[0]
    unit = lab.sae().W_dec / lab.sae().W_dec.norm(dim=1, keepdim=True)
    lens = logit_lens(lab.model, unit)
    proposed = ((lens[:, [40, 41]].amax(1) + lens[:, 70]) / 2).topk(20).indices
    change = torch.cat(list(effect.changes(lab.model, lab.sae().site, unit[proposed] * 20 * effect.STRENGTH)))
    nats = (change[:, [40, 41]].amax(1) + change[:, 70]) / 2
    best = nats.argsort(descending=True)[:4]
    assert list(found) == proposed[best].tolist()
    assert list(found.values()) == pytest.approx(nats[best].tolist(), abs=1e-3)


def test_words_that_set_apart(lab: Lab) -> None:
    model, base = lab.model, background.of(lab.model, lab.sae())
    rows, others = tokenised(model, LIKE), tokenised(model, ["my cat", "the cat sat", "cat and dog"])
    cat = model.tokenizer(" cat")["input_ids"][0]
    assert examples.apart(model, rows, [], base) == [cat]
    assert examples.apart(model, rows, others, base) == []  # as many of the counter-examples have it


# ---- input that is no good -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ([], "no example"),
        ([""], "like sentence 1 is empty"),
        (["a cat", " \n "], "like sentence 2 is empty"),
        (["<|endoftext|>"], "nothing but the start token"),
        (["a cat", 7], "sentence 2 is no text but int"),
        ("The cat sat.", "looks like a sentence"),
    ],
)
def test_examples_that_are_none(like: Any, said: str, lab: Lab) -> None:
    with pytest.raises(UsageError, match=said):
        lab.find(like, causes=False)


def test_other_bad_settings(lab: Lab) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"top": 0}, "top must be at least 1"),
        ({"together": 0}, "together must be at least 1"),
        ({"blend": -1}, "blend must be at least 1"),
        ({"at": "zebra"}, "'zebra' must be in every example, and in example 1"),
        ({"at": " "}, "--at is empty"),
        ({"unlike": ["x", ""]}, "unlike sentence 2 is empty"),
        ({"unlike": "text"}, "unlike must be a list"),
        ({"sae": "blocks.0.hook_resid_pre"}, "no SAE at blocks.0"),
    )
    for settings, said in cases:
        with pytest.raises(UsageError, match=said):
            lab.find(LIKE, **settings)
    with pytest.raises(UsageError, match="words bring their own"):
        lab.find("cat", at="cat")


def test_one_example_and_long_ones(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lab.find(["a cat"], causes=False)
    assert any("one example cannot tell" in note for note in found.notes)
    long = "a cat and a dog " * 200
    found = lab.find([*LIKE, long], causes=False)
    assert "like sentence 5 is longer than 128 tokens and was cut there" in found.notes
    with pytest.raises(UsageError, match="in example 1 it comes after the tokens that are read"):
        lab.find(["a dog " * 200 + "zebra"], at="zebra", causes=False)
    assert lab.find(LIKE, at="CAT", causes=False).candidates  # case is forgiven


def test_a_word_of_one_example_must_be_one_that_the_features_speak_at(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "CHANCE", 0.06)
    model, base = lab.model, background.of(lab.model, lab.sae())
    rows = tokenised(model, ["on the mat", "of the cat", "my hills"])
    cat = model.tokenizer(" cat")["input_ids"][0]
    told = torch.zeros(3, max(map(len, rows)))
    assert examples.apart(model, rows, [], base, told) == []
    told[1, rows[1].ids.index(cat)] = examples.SPOKEN
    assert examples.apart(model, rows, [], base, told) == [cat]
    assert examples.marked(rows, [cat]).nonzero().tolist() == [[1, rows[1].ids.index(cat)]]


def test_what_fires_nothing_is_said(model: Model, own_cache: Path) -> None:
    sae = random_sae(64, 32, "jumprelu", site=Site(2))
    sae.threshold = torch.full((32,), 1e9)
    lab = with_facts(Lab(model, [sae]), own_cache / "facts.safetensors", [0.0] * 32, 20.0)
    for like in (["zxqv"], "cat"):
        with pytest.raises(UsageError, match="no feature fires"):
            lab.find(like)


# ---- kinds of SAEs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["gated", "topk", "abstopk", "transcoder", "skip_transcoder", "temporal", "matching_pursuit"]
)
def test_every_kind_of_sae(kind: Any, model: Model, own_cache: Path) -> None:
    lab = with_facts(random_lab(model, kind, d_sae=96), own_cache / "facts.safetensors", [5.0] * 96, 20.0)
    found = lab.find(LIKE, UNLIKE, top=4)
    json.dumps(found.to_json(), allow_nan=False)
    assert len(found.to_frame()) == len(found.candidates)
    assert str(found)
    assert found.diffmean.site == lab.sae().site
    assert found.blend is None or found.blend.site == lab.sae().writes
    for c in found.candidates:
        mine = torch.stack([f[:, c.feature].abs().max() for f in own_features(lab, LIKE)])
        assert len(c.where) == int((mine > 1e-3).sum())
        assert c.mention is not None
        summed = sum(float(f[:, c.feature].sum()) for f in own_features(lab, LIKE))
        assert c.sign == (-1 if summed < 0 else 1)
        row = c.sign * lab.sae().rows(torch.tensor([c.feature]))[0]
        vector = row / row.norm() * 20 * effects.STRENGTH
        told = effects.first_mentions(lab, lab.sae(), vector[None], found.words)
        assert c.mention == pytest.approx(float(told[0]), abs=1e-4)
    if kind == "abstopk":
        signs = {c.sign for c in lab.find(LIKE, top=30, causes=False).candidates}
        assert signs == {1, -1}


def test_several_saes_and_other_sites(model: Model, own_cache: Path) -> None:
    sites = [Site(1), Site(3), Site(2, "mlp_out")]
    lab = Lab(model, [random_sae(64, 48, site=site, seed=i) for i, site in enumerate(sites)])
    for site, sae in zip(sites, lab.saes, strict=True):
        found = lab.find(LIKE, sae=site, causes=False)
        assert found.sae is sae
        first = found.candidates[0]
        alone = Lab(model, [sae]).find(LIKE, causes=False).candidates[0]
        assert first == alone
    assert lab.find(LIKE, causes=False).sae is lab.saes[0]


def test_the_json_is_the_documented_one(lab: Lab) -> None:
    page = (Path(__file__).parents[1] / "docs" / "json.md").read_text(encoding="utf-8")
    section = page.split("## `lancet find --json`")[1].split("\n## ")[0]
    told = lab.find(LIKE, UNLIKE).to_json()
    assert set(re.findall(r"^\| `([a-z]+)`", section, re.MULTILINE)) | set(
        re.findall(r"`([a-z]+)(?:\[\])?`", section)
    ) >= (set(told))
    inner = re.findall(r"`(?:candidates\[\])?\.([a-z_0-9]+)`", section)
    assert sorted(inner) == sorted([k for k in told["candidates"][0] if k != "where"])
    assert {"example", "token", "value"} == set(told["candidates"][0]["where"][0])


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(
    model: Model, own_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs `lancet find` on the tiny pair: exit code, standard output and standard error."""
    sae = random_sae(64, 96, site=Site(2))
    folder = str(save_sae(own_cache / "sae", sae))
    with_facts(Lab(model, [sae]), own_cache / "sae" / "facts.safetensors", [5.0] * 96, 20.0)

    def call(*words: str) -> tuple[int, str, str]:
        where = ["--model", model.name, "--sae", folder, "--device", "cpu", "--dtype", "float32", "--anyway"]
        monkeypatch.setattr("sys.argv", ["lancet", "find", *words, *where])
        show.console.cache_clear()
        show.notes.cache_clear()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_the_command(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    file = tmp_path / "like.txt"
    file.write_text("\n".join(["", *LIKE, ""]), encoding="utf-8")
    code, out, err = command("--like-file", str(file), "--unlike", UNLIKE[0], "--top", "3", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["like"] == LIKE
    assert told["unlike"] == UNLIKE[:1]
    assert len(told["candidates"]) == 3
    code, out, _ = command("--like-file", str(file), "--top", "3")
    lines = out.splitlines()
    head = lines[0].split("\t")
    assert head[:3] == ["feature", "does", "AUROC"]
    assert "unlike" not in head
    assert [len(line.split("\t")) for line in lines[1:4]] == [len(head)] * 3
    code, out, _ = command("cat", "--no-causes", "--json")
    assert (code, json.loads(out)["asked"]) == (0, "cat")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no example; give --like"),
        (("cat", "--like", "a cat"), "words bring their own sentences"),
        (("cat", "--at", "cat"), "words bring their own sentences"),
        (("--like", " "), "like sentence 1 is empty"),
        (("--like", "a cat", "--at", "dog"), "'dog' must be in every example"),
        (("--like-file", "nowhere.txt"), "cannot read nowhere.txt"),
        (("--like", "a cat", "--top", "0"), "top must be at least 1"),
        (("?",), "no words"),
    ],
)
def test_the_command_with_bad_input(
    words: tuple[str, ...], said: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


# ---- meaning ---------------------------------------------------------------------------------------------------------

# Written for this test; no training text holds them. Six to find the feature with, six to try it on.
CONCEPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "the sea": (
        (
            "Waves broke over the harbour wall all night long.",
            "The sailors saw a whale to the north of the island.",
            "An old lighthouse stands where the sea meets the river.",
            "Our ship rolled so much that nobody could eat.",
            "At low tide you can walk across the beach to the wreck.",
            "The captain steered between the rocks and the shore.",
        ),
        (
            "Fishing boats were waiting for the tide outside the port.",
            "The ocean was calm and the sails hung down.",
            "He had crossed the Atlantic in a boat of his own.",
            "Salt water ran over the deck of the ferry.",
            "From the cliff we watched the waves roll in.",
            "A storm had driven the ship onto the beach.",
        ),
    ),
    "music": (
        (
            "The choir sang the last hymn a little flat.",
            "She practised the same waltz on the piano for a week.",
            "He tuned his guitar behind the curtain.",
            "The drummer lost the beat in the second song.",
            "An orchestra of children played the overture.",
            "Nobody could get that melody out of their head.",
        ),
        (
            "The singer forgot the words of the chorus.",
            "A trumpet woke us every morning of the festival.",
            "They danced until the band had packed up.",
            "Her concert was recorded for the radio.",
            "The violins come in after the flute.",
            "He wrote the tune on the back of a ticket.",
        ),
    ),
    "dogs": (
        (
            "Our dog barks at the postman and at nobody else.",
            "The puppy had chewed both of my slippers.",
            "She whistled, and the old hound came back to her.",
            "He walks his terrier twice a day, whatever the weather.",
            "The sheepdog lay down in front of the gate.",
            "Somebody had tied a brown dog to the lamp post.",
        ),
        (
            "The dog dug up the bone that it had buried.",
            "A stray dog followed us to the hotel.",
            "Two puppies slept in the washing basket.",
            "My uncle breeds poodles and talks to them in French.",
            "The spaniel shook itself beside the guests.",
            "He threw the stick, but the dog only looked at him.",
        ),
    ),
    "weddings": (
        (
            "The bride tripped over her veil on the way to the altar.",
            "Two hundred guests came to their wedding in the old mill.",
            "He had forgotten the rings, so the best man ran home.",
            "Her uncle cried when the groom said his vows.",
            "They were married in March under a borrowed tent.",
            "The wedding photographs show everybody but the priest.",
        ),
        (
            "At our wedding the band played until the neighbours came.",
            "The groom wore his grandfather's suit.",
            "She threw the bouquet and her sister caught it.",
            "The bride and the groom left the church on bicycles.",
            "It was a small wedding with a very large cake.",
            "Their marriage was registered on a rainy Tuesday.",
        ),
    ),
    "snow and ice": (
        (
            "Snow had covered the tracks by the time we woke.",
            "The lake froze so hard that trucks drove over it.",
            "Icicles as long as my arm hung from the roof.",
            "He cleared the snow from the steps with a kitchen tray.",
            "A blizzard closed the pass for nine days.",
            "The children built a snowman with a carrot and a pan.",
        ),
        (
            "It snowed on the tents and on the sleeping horses.",
            "The ice on the pond cracked under the dog.",
            "Frost drew ferns on the windows of the bus.",
            "Her boots left deep holes in the fresh snow.",
            "The road was white and the wind bitterly cold.",
            "We skied down to the village before it got dark.",
        ),
    ),
}
OTHERS = (
    "The cashier gave me a coin that I had never seen.",
    "Her brother repairs violins in a cellar without windows.",
    "The committee voted twice and then went home.",
    "My neighbour grows beans along the fence.",
    "Somebody had parked a tractor in front of the bank.",
    "The professor forgot which lecture he was giving.",
    "A monkey stole the guide's glasses.",
    "The soup needs more pepper and less time.",
    "All the lifts in the tower were out of order.",
    "She types faster than she thinks.",
    "The judge asked the witness to speak up.",
    "He lost the tournament to a boy of eleven.",
    "They printed the newspaper on yellow paper.",
    "The museum keeps its best paintings in the basement.",
    "This bridge was built by prisoners.",
    "A nurse came by to change the bandage.",
    "The algorithm sorts the list in place.",
    "Her horse refused the last fence.",
    "The goalkeeper dived to the wrong side.",
    "I cannot find the receipt for the radio.",
    "Bees had moved into the letter box.",
    "The tailor measured him without a word.",
    "We missed the train by half a minute.",
    "The mayor opened the library with a golden key.",
    "Every wire in the attic had been chewed by mice.",
    "He explained the rules of chess to his parrot.",
    "The hotel gave us a room beside the kitchen.",
    "A telescope is a patient kind of window.",
    "The desert smelled of dust and diesel.",
    "She signed the contract with a green pencil.",
)


@pytest.fixture(scope="module")
def embedded() -> Lab:
    return lancet.open("smollm2", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def neutral() -> list[str]:
    return background.neutral_sentences()  # the bundled ones: module fixtures come before the patch above


DIFFUSE = {"weddings", "snow and ice"}  # the first feature alone is not it; the first four together are


@pytest.mark.parametrize("concept", CONCEPTS)
def test_the_first_feature_tells_the_concept_from_everything_else(
    concept: str, embedded: Lab, neutral: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "neutral_sentences", lambda: neutral)
    monkeypatch.setattr(examples, "COMMON", 0.02)
    shown, held = CONCEPTS[concept]
    found = embedded.find(shown, causes=False)
    rows = tokenised(embedded.model, [*held, *OTHERS])
    scores = statistics(embedded.model, embedded.sae(), rows).dense(torch.tensor([found.candidates[0].feature]))[:, 0]
    labels = [1] * len(held) + [0] * len(OTHERS)
    if concept not in DIFFUSE:
        assert roc_auc_score(labels, scores) >= 0.95, str(found)
    assert roc_auc_score(labels, found.detect([*held, *OTHERS])) >= 0.95, str(found)
