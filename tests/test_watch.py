"""Watching a feature: AUROC against scikit-learn, everything else against plain loops over single texts, MLP neurons
against TransformerLens' hooks, and on the embedded model what it is for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_edits import random_lab, save_sae, with_facts
from fixtures_families import FAMILIES, family, hooked
from sklearn.metrics import roc_auc_score

import lancet
from lancet import about, bench, neurons
from lancet.cli import main, show
from lancet.errors import UsageError
from lancet.lab import Lab
from lancet.model import Model
from lancet.site import Site

OWN = ["The cat sat on the mat.", "A cat ran.", "My cat sleeps all day, every day.", "One cat purred."]
OTHERS = ["The dog barked.", "    return the value", "你好，世界", "It rains.", "We sang at noon.", "He left."]
NEUTRAL = ["A bird flew over the roof.", "Seven is odd.", "They paid in coins.", "A cat again.", "So be it, he said."]


@pytest.fixture(scope="module")
def lab(tiny_gpt2: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Lab:
    path = tmp_path_factory.mktemp("facts") / "facts.safetensors"
    return with_facts(random_lab(tiny_gpt2(), d_sae=64), path, [5.0] * 64, 20.0, [0.5] * 5)


@pytest.fixture(autouse=True)
def few_sentences(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "smollm2" not in request.node.name:
        monkeypatch.setattr(about, "neutral_sentences", lambda count=0: NEUTRAL)
        monkeypatch.setattr(about, "RARE", 0.1)  # one of the eleven others has the word


def values(lab: Lab, text: str, feature: int) -> dict[str, np.ndarray]:
    """One text alone: [tokens] the feature, [tokens, d] coordinates and neurons, the start token left out."""
    seen = []
    layer = lab.sae().site.layer
    mlp = lab.model.hf.transformer.h[layer - 1].mlp
    handle = mlp.act.register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
    try:
        ids = torch.tensor([lab.tokenize(text).ids])
        x = lab.model.hf(ids, output_hidden_states=True).hidden_states[layer].detach()
    finally:
        handle.remove()
    lit = lab.sae().encode(x)[0, 1:, feature].detach()
    return {"feature": lit.numpy()[:, None], "coordinate": x[0, 1:].numpy(), "neuron": seen[0][0, 1:].numpy()}


def firing(lab: Lab) -> int:
    """A feature that fires in some of the sentences."""
    peaks = np.stack([lab.read(text).features.dense().amax(0).numpy() for text in (*OWN, *OTHERS)])
    return int(((peaks > 0).sum(0) - len(peaks) / 2).__abs__()[5:].argmin()) + 5


@pytest.fixture(scope="module")
def watched(lab: Lab) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(about, "neutral_sentences", lambda count=0: NEUTRAL)
        patch.setattr(about, "RARE", 0.1)
        return lab.watch(firing(lab), OWN, OTHERS)


def test_scores_and_the_best_of_each_kind(lab: Lab, watched: Any) -> None:
    positive = [True] * len(OWN) + [False] * len(OTHERS)
    texts = [values(lab, text, watched.feature) for text in (*OWN, *OTHERS)]
    assert [unit.kind for unit in watched.units] == ["feature", "coordinate", "neuron"]
    for unit in watched.units:
        high = np.stack([text[unit.kind].max(0) for text in texts])
        low = np.stack([-text[unit.kind].min(0) for text in texts])
        sides = {1: high} if unit.kind == "feature" else {1: high, -1: low}
        areas = {sign: [roc_auc_score(positive, column) for column in side.T] for sign, side in sides.items()}
        assert unit.auroc == pytest.approx(max(map(max, areas.values())), abs=1e-9)
        index = 0 if unit.kind == "feature" else unit.index
        assert unit.auroc == pytest.approx(areas[unit.sign][index], abs=1e-9)
        scores = sides[unit.sign][:, index]
        assert np.allclose(unit.scores, scores, atol=1e-4)
        assert unit.level == pytest.approx(float(torch.tensor(scores[: len(OWN)]).median()), abs=1e-4)


def test_where_else_each_is_strong(lab: Lab, watched: Any) -> None:
    assert watched.words == ("cat",)
    texts = [text for text in NEUTRAL if "cat" not in text]
    for unit in watched.units:
        index = 0 if unit.kind == "feature" else unit.index
        every = [values(lab, text, watched.feature)[unit.kind][:, index] * unit.sign for text in texts]
        usual = float(torch.tensor(np.concatenate(every)).median())
        assert unit.usual == pytest.approx(usual, abs=1e-4)
        half = (usual + unit.level) / 2
        peaks = [text.max() for text in every]
        assert unit.reached == sum(peak >= half and (unit.kind != "feature" or peak > 0) for peak in peaks)
        assert unit.of == len(texts)
        ordered = sorted((p for p in peaks if unit.kind != "feature" or p > 0), reverse=True)
        assert np.allclose([context.value for context in unit.contexts], ordered, atol=1e-4)
        for context in unit.contexts:
            told = context.before + context.token + context.after
            text = next(text for text in texts if told in text)
            at = int(every[texts.index(text)].argmax()) + 1
            assert lab.tokenize(text).piece(at) == context.token


def test_the_feature_in_each_sentence(lab: Lab, watched: Any) -> None:
    assert [s.text for s in watched.sightings] == [*OWN, *OTHERS]
    assert [s.about for s in watched.sightings] == [True] * len(OWN) + [False] * len(OTHERS)
    assert any(s.value == 0 for s in watched.sightings)
    for sighting in watched.sightings:
        reading = lab.read(sighting.text, top=200)
        lit = reading.features.of_feature(watched.feature)
        assert sighting.value == pytest.approx(float(lit.max()), abs=1e-4)
        if sighting.value == 0:
            assert (sighting.token, sighting.rank) == ("", 0)
            continue
        at = int(lit.argmax())
        assert sighting.token == reading.tokens.piece(at)
        order = [x.feature for x in reading.spot([at]).top(200)]
        assert sighting.rank == (order.index(watched.feature) + 1 if sighting.about else 0)
    fired = [s.value > 0 for s in watched.sightings]
    assert watched.fired == (sum(fired[: len(OWN)]), len(OWN), sum(fired[len(OWN) :]), len(OTHERS))


def test_what_it_returns(watched: Any, tmp_path: Path) -> None:
    told = watched.to_json()
    assert json.loads(json.dumps(told)) == told
    assert told["units"][0]["label"] == f"#{watched.feature}"
    frame = watched.to_frame()
    assert len(frame) == len(OWN) + len(OTHERS)
    assert list(frame[watched.units[1].label]) == list(watched.units[1].scores)
    assert "AUROC" in str(watched)
    from matplotlib.image import imread

    image = imread(watched.plot(tmp_path / "watch.png"))
    assert image[..., :3].std() > 0.03
    with pytest.raises(UsageError, match="cannot draw"):
        watched.plot(tmp_path / "watch.xyz")


def test_bundled_sentences_are_others_than_those_that_the_concept_is_found_on(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(bench.concepts())[:4]
    kept = {name: bench.concepts()[name] for name in names}
    monkeypatch.setattr(bench, "concepts", lambda: kept)
    searched: list[str] = []
    row = about.row

    def noted(lab: Lab, text: str, notes: list[str]) -> Any:
        searched.append(text)
        return row(lab, text, notes)

    monkeypatch.setattr(about, "row", noted)
    feature = firing(lab)
    peaks = {
        name: [
            float(values(lab, text, feature)["feature"].max())
            for n, text in bench.sentences("train", 4, 0)
            if n == name
        ]
        for name in names
    }
    own = about.bundled(lab, lab.sae(), feature, None, [])
    areas = {
        name: roc_auc_score([n == name for n in names for _ in range(4)], [value for n in names for value in peaks[n]])
        for name in names
    }
    assert areas[own.about] == max(areas.values())
    assert len(searched) == 16
    assert len(own.own) == len(set(own.own)) == about.OWN
    assert not set(own.own) & set(searched)
    assert not set(own.own) & set(own.others)
    assert len(own.others) == 3 * about.BESIDE


def test_wrong_requests(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for texts, others, said in (
        (["one"], OTHERS, "at least two sentences in a list, got 1"),
        ([], OTHERS, "got 0"),
        ("a text", OTHERS, "at least two sentences in a list"),
        (OWN, [], "no other sentences"),
        ([*OWN, ""], OTHERS, "the text is empty"),
    ):
        with pytest.raises(UsageError, match=said):
            lab.watch(5, texts, others)
    with pytest.raises(UsageError, match="no feature #64"):
        lab.watch(64, OWN, OTHERS)
    monkeypatch.setattr(about, "activation", lambda sae, x, feature: torch.zeros(x.shape[:2]))
    monkeypatch.setattr(bench, "sentences", lambda *_, **__: iter([("cats", OWN[0]), ("dogs", OTHERS[0])]))
    with pytest.raises(UsageError, match="fires in none of the 2 bundled sentences"):
        lab.watch(5)


def test_long_sentences_are_cut_and_that_is_said(lab: Lab) -> None:
    found = lab.watch(5, ["The cat sat. " * 200, *OWN], OTHERS)
    assert any("longer than 256 tokens were cut" in note for note in found.notes)


# ---- neurons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_are_transformer_lens_hook_post(name: str) -> None:
    model = family(name)
    texts = ["The cat sat on the mat.", "A dog and a cat.", "Hi"]
    rows = [model.tokenize(text) for text in texts]
    lens = hooked(name)
    site, seen = Site(2, "resid_post"), 0
    layer = neurons.layer_before(site)
    for which, x, lit, keep in neurons.passes(model, site, neurons.place(model, layer), rows):
        assert lit is not None
        for i, row in enumerate(which):
            _, cache = lens.run_with_cache(torch.tensor([rows[row].ids]), prepend_bos=False)
            assert torch.allclose(lit[i][keep[i]], cache[f"blocks.{layer}.mlp.hook_post"][0, 1:], atol=1e-4)
            assert torch.allclose(x[i][keep[i]], cache[str(site)][0, 1:], atol=1e-3)
            seen += 1
    assert seen == 3


def test_neurons_of_a_model_that_transformer_lens_runs() -> None:
    from lancet import friends

    plain, lens = family("GPT-2"), hooked("GPT-2")
    lens.tokenizer = plain.tokenizer
    model = friends.model_of(lens)
    row = model.tokenize("The cat sat.")
    ((_, _, lit, keep),) = neurons.passes(model, Site(2), neurons.place(model, 1), [row])
    _, cache = lens.run_with_cache(torch.tensor([row.ids]), prepend_bos=False)
    assert lit is not None
    assert torch.allclose(lit[keep], cache["blocks.1.mlp.hook_post"][0, 1:], atol=1e-5)


def test_which_mlp_comes_before_a_site() -> None:
    assert [neurons.layer_before(Site(3, kind)) for kind in ("resid_pre", "z", "resid_mid", "mlp.hook_in")] == [2] * 4
    assert [neurons.layer_before(Site(3, kind)) for kind in ("mlp.hook_out", "mlp_out", "resid_post")] == [3] * 3
    assert neurons.layer_before(Site(0)) == -1


# ---- the command, and what it is for ---------------------------------------------------------------------------------


def test_the_command(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = save_sae(tmp_path / "sae", lab.sae())
    (folder / "facts.safetensors").write_bytes(Path(str(lab._shipped[lab.sae().site])).read_bytes())
    for name, lines in (("own", OWN), ("others", OTHERS)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")

    def run(*words: str) -> tuple[int, str, str]:
        where = ["--model", lab.model.name, "--sae", str(folder), "--device", "cpu", "--dtype", "float32", "--anyway"]
        monkeypatch.setattr(sys, "argv", ["lancet", "watch", *words, *where])
        show.console.cache_clear()
        show.notes.cache_clear()
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    feature = str(firing(lab))
    files = ["--file", str(tmp_path / "own.txt"), "--others", str(tmp_path / "others.txt")]
    told = json.loads(run(feature, *files, "--json")[1])
    expected = lab.watch(int(feature), OWN, OTHERS).to_json()
    assert {k: told[k] for k in ("feature", "about", "fired", "words")} == {
        k: expected[k] for k in ("feature", "about", "fired", "words")
    }
    assert [u["auroc"] for u in told["units"]] == [u["auroc"] for u in expected["units"]]
    code, out, err = run(feature, *files, "--plot", str(tmp_path / "w.png"))
    assert code == 0
    assert (tmp_path / "w.png").is_file()
    assert "drew" in err and "flatters them" in err
    assert f"#{feature}\t{expected['units'][0]['auroc']:.3f}" in out
    assert run(feature, "--file", str(tmp_path / "none.txt"))[0] == 2


def test_smollm2_has_a_feature_where_single_neurons_answer_to_other_things(smollm2_f32: Model) -> None:
    lab = lancet.open("smollm2", device="cpu", dtype="float32")
    found = lab.watch(lab.facts().concepts["golden_gate_bridge"]["feature"])
    feature, coordinate, neuron = found.units
    assert found.about == "golden_gate_bridge"
    assert found.fired[0] == 10
    assert found.fired[2] <= 3
    assert feature.auroc > 0.98
    assert feature.reached <= 2
    assert coordinate.reached > 10 or coordinate.auroc < 0.95
    assert neuron.of > 250
