"""Readings against plain computations: words against the bytes of the tokens that hold them, activations, shares and
what is explained against a dense pass by hand, lists against sorted ones, and JSON against its documentation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import random_lab, with_facts
from torch import Tensor

from lancet import facts, fingerprint
from lancet.errors import UsageError
from lancet.facts import Facts
from lancet.lab import Lab
from lancet.model import Model
from lancet.reading import Reading
from lancet.sae import ARCHITECTURES, NORMALISATIONS

TEXT = "The Golden Gate Bridge is located in San Francisco, and the Bridge is red.\n旧金山的金门大桥很美。🦙 naïve"
models = pytest.mark.parametrize("which", ["smollm2", "gpt2"])


@pytest.fixture(scope="module")
def labs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lab]:
    """A model with a random SAE, of whose features #0 to #9 fire on more than a tenth of all tokens."""
    made: dict[str, Lab] = {}

    def get(which: str) -> Lab:
        if which not in made:
            model = (
                request.getfixturevalue("smollm2_f32") if which == "smollm2" else request.getfixturevalue("tiny_gpt2")()
            )
            path = tmp_path_factory.mktemp("facts") / "facts.safetensors"
            pieces = [model.decode([i]) for i in range(min(1000, len(model.tokenizer)))]
            words = [i for i, piece in enumerate(pieces) if piece.startswith(" ") and piece[2:].isalpha()][:8]
            ids = torch.tensor(words).expand(256, -1)
            values = torch.linspace(2, 1, len(words)).expand(256, -1).clone()
            values[11] = -1
            density = [0.5] * 9 + [0.101, 0.0999, 0.02]
            more = {"effect_ids": ids, "effect_values": values}
            made[which] = with_facts(random_lab(model, d_sae=256), path, [50.0] * 256, 100.0, density, **more)
        return made[which]

    return get


@pytest.fixture(scope="module")
def readings(labs: Callable[[str], Lab]) -> Callable[[str], Reading]:
    made: dict[str, Reading] = {}
    return lambda which: made.setdefault(which, labs(which).read(TEXT))


# ---- where -----------------------------------------------------------------------------------------------------------


def holders(reading: Reading, model: Model, text: str, occurrence: int = 0) -> list[int]:
    """The tokens that hold some byte of `text`, by the lengths of the byte-level tokens alone."""
    whole, part = reading.tokens.text.encode(), text.encode()
    begin = -1
    for _ in range(occurrence + 1):
        begin = whole.index(part, begin + 1)
    out, at = [], 0
    for position, token in enumerate(model.tokenizer.convert_ids_to_tokens(list(reading.tokens.ids))):
        size = len(token) if position else 0  # each character of a byte-level token is one byte; the start has none
        if at < begin + len(part) and at + size > begin:
            out.append(position)
        at += size
    assert at == len(whole)
    return out


@models
@pytest.mark.parametrize(
    "text", ["Bridge", "San Francisco", "ridge is loc", "The", "red.\n", "旧金山", "金", "门大桥", "🦙", "ï", " ", TEXT]
)
def test_at_finds_words_however_they_are_cut(which: str, text: str, labs: Callable[[str], Lab], readings: Any) -> None:
    reading = readings(which)
    spot = reading.at(text)
    expected = holders(reading, labs(which).model, text)
    assert list(spot.positions) == expected
    assert text in spot.text
    assert spot.text in TEXT
    spans = [reading.tokens.spans[p] for p in expected]
    assert spot.text == TEXT[spans[0][0] : spans[-1][1]]
    if which == "gpt2" and text == "Bridge":
        assert len(expected) > 3  # its tokenizer knows hardly a word


@models
def test_occurrences(which: str, labs: Callable[[str], Lab], readings: Any) -> None:
    reading = readings(which)
    first, second = reading.at("Bridge"), reading.at("Bridge", occurrence=1)
    assert list(second.positions) == holders(reading, labs(which).model, "Bridge", 1)
    assert max(first.positions) < min(second.positions)
    assert "Bridge" in second.text
    with pytest.raises(UsageError, match="'Bridge' does not occur 3 times in the text"):
        reading.at("Bridge", occurrence=2)


@models
@pytest.mark.parametrize(("text", "near"), [("Brigde", "Bridge"), ("bridge", "Bridge"), ("Francsico", "Francisco,")])
def test_text_that_does_not_occur(which: str, text: str, near: str, readings: Any) -> None:
    with pytest.raises(UsageError, match=f"'{text}' does not occur in the text 'The Golden .*; nearest: {near}"):
        readings(which).at(text)


def test_no_such_place(readings: Any) -> None:
    reading = readings("gpt2")
    with pytest.raises(UsageError, match="zzz"):
        reading.at("zzz")
    with pytest.raises(UsageError, match="nothing to look for"):
        reading.at("")
    for position in (-1, len(reading)):
        with pytest.raises(UsageError, match=rf"no token {position}; the text has 0 \(start\) to {len(reading) - 1}"):
            reading.spot([position])
    with pytest.raises(UsageError, match="name at least one token"):
        reading.spot([])


@models
def test_every_token_once_and_never_the_start(which: str, readings: Any) -> None:
    reading = readings(which)
    assert [spot.positions for spot in reading] == [(p,) for p in range(1, len(reading))]
    assert reading.spot([0]).lit == (0,)
    assert reading.spot([0]).explained == (0.0,)
    assert float(reading.norms[0]) == 0
    assert not bool((reading.features.token == 0).any())


def test_a_chat_reads_markers_and_not_the_start(labs: Callable[[str], Lab]) -> None:
    reading = labs("smollm2").read([{"role": "user", "content": "Where is the Bridge?"}])
    assert reading.at("Bridge").text.strip() == "Bridge"
    assert reading.read_positions() == list(range(1, len(reading)))
    assert reading.tokens.roles[0] == "start"
    assert reading.spot([0]).text == "<|im_start|>"


# ---- what ------------------------------------------------------------------------------------------------------------


def values(lab: Lab, reading: Reading) -> Tensor:
    """[tokens, d] transformers' own values at the SAE's site."""
    with torch.no_grad():
        hidden = lab.model.hf(input_ids=torch.tensor([reading.tokens.ids]), output_hidden_states=True).hidden_states
    return hidden[lab.saes[0].site.depth][0]


@models
def test_a_reading_is_a_plain_encoding(which: str, labs: Callable[[str], Lab], readings: Any) -> None:
    lab, reading = labs(which), readings(which)
    sae, x = lab.saes[0], values(labs(which), reading)
    dense = sae.encode(x)
    dense[0] = 0
    assert torch.allclose(reading.features.dense(), dense, rtol=1e-4, atol=1e-4)
    assert torch.allclose(reading.norms[1:], x[1:].norm(dim=1))
    rebuilt = dense @ sae.W_dec + sae.b_dec
    explained = 1 - (x - rebuilt).pow(2).sum(1) / (x - sae.b_dec).pow(2).sum(1)
    assert torch.allclose(reading.explained[1:], explained[1:], atol=1e-4)
    for position in (1, 4, len(reading) - 1):
        written = dense[position][:, None] * sae.W_dec  # [d_sae, d] the parts of the cocktail
        whole = written.sum(0)
        expected = written @ whole / (whole @ whole)
        found = torch.zeros(sae.d_sae)
        here = reading.features.token == position
        found[reading.features.feature[here]] = reading.shares[here]
        assert torch.allclose(found, expected, atol=1e-4)
        assert reading.spot([position]).lit == (int((dense[position] > 0).sum()),)


@pytest.mark.parametrize("normalize", NORMALISATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("centred", [False, True])
def test_shares_sum_to_one(architecture: str, normalize: str, centred: bool, labs: Any, tmp_path: Path) -> None:
    if normalize == ("covariance_whitening" if architecture == "temporal" else "constant_scalar_rescale"):
        pytest.skip("sae-lens knows no such SAE")
    lab = random_lab(labs("gpt2").model, architecture, d_sae=64, normalize=normalize, centred=centred)
    reading = with_facts(lab, tmp_path / "f.safetensors", [1.0], 1.0).read("The cat sat on the mat.")
    sums = torch.zeros(len(reading)).index_add(0, reading.features.token, reading.shares)
    lit = reading.features.l0() > 0
    assert bool(lit.any())
    assert torch.allclose(sums[lit], torch.ones(int(lit.sum())), atol=1e-4)
    assert bool((reading.explained <= 1).all())


def test_what_a_perfect_sae_explains(labs: Any, tmp_path: Path) -> None:
    """Each axis has a feature for either sign: the reconstruction is the value, and all is explained."""
    lab = random_lab(labs("gpt2").model, d_sae=128)
    sae = lab.saes[0]
    sae.W_dec = torch.cat([torch.eye(64), -torch.eye(64)])
    sae.W_enc, sae.b_enc, sae.b_dec = sae.W_dec.T.contiguous(), torch.zeros(128), torch.zeros(64)
    reading = with_facts(lab, tmp_path / "f.safetensors", [1.0], 1.0).read("The cat sat.")
    assert torch.allclose(reading.explained[1:], torch.ones(len(reading) - 1), atol=1e-5)
    assert reading.spot([1]).lit == (64,)


# ---- lists -----------------------------------------------------------------------------------------------------------


def expected_top(reading: Reading, positions: Sequence[int], count: int, dense: bool) -> list[tuple[int, float]]:
    table = reading.features.dense()[list(positions)].max(0).values
    listed = [(f, v) for f, v in enumerate(table.tolist()) if v > 0 and (dense or f >= 10)]
    return sorted(listed, key=lambda entry: -entry[1])[:count]


@models
@pytest.mark.parametrize("dense", [False, True])
def test_top_is_sorted_and_dense_features_are_hidden(which: str, dense: bool, readings: Any) -> None:
    reading = readings(which)
    for spot, count in ((reading.at("San Francisco"), 7), (reading.spot([3]), 500), (reading.spot(range(1, 9)), 5)):
        lits = spot.top(count, dense)
        assert [(lit.feature, lit.value) for lit in lits] == expected_top(reading, spot.positions, count, dense)
        for lit in lits:
            assert lit.position in spot.positions
            assert float(reading.features.dense()[lit.position, lit.feature]) == lit.value == spot.value(lit.feature)
    fired = set(reading.features.feature.tolist())
    assert reading.hidden() == len(fired & set(range(10))) > 0
    assert reading.is_dense(9)
    assert not reading.is_dense(10)


def test_labels_are_what_features_make_the_model_say(labs: Any, readings: Any) -> None:
    lits = readings("gpt2").spot([5]).top(300, dense=True)
    said = {lit.feature: lit.says for lit in lits}
    assert set(said.values()) <= {"", labs("gpt2").says(3)}
    assert labs("gpt2").says(3).count(", ") == 2
    assert all((said[f] == "") == (f == 11) for f in said)  # of #11 the strongest effect is negative


# ---- JSON, frames, text ----------------------------------------------------------------------------------------------


def documented(heading: str) -> set[str]:
    """The names in the table under a heading of docs/json.md."""
    page = (Path(__file__).parents[1] / "docs" / "json.md").read_text(encoding="utf-8")
    section = page.split(f"## `{heading}`")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@models
def test_json_has_the_documented_shape(which: str, readings: Any) -> None:
    reading = readings(which)
    found = json.loads(json.dumps(reading.to_json()))
    names = documented("lancet read TEXT --json")
    assert set(found) == {n for n in names if "[" not in n and "." not in n}
    first = found["tokens"][0]
    assert set(first) == {"position", "text", "lit", "explained", "norm", "top"}
    assert {"tokens[].lit", "tokens[].explained", "tokens[].norm", "tokens[].position", "tokens[].top[]"} <= names
    assert set(first["top"][0]) == {"feature", "value", "share", "fires", "says", "name", "described"}
    assert found["text"] == TEXT
    assert found["hidden_dense"] == reading.hidden()
    assert [t["position"] for t in found["tokens"]] == list(range(1, len(reading)))
    assert all(len(t["top"]) == 5 for t in found["tokens"])


def test_dense_readings_hide_nothing(labs: Callable[[str], Lab]) -> None:
    reading = labs("gpt2").read("The cat", top=300, dense=True)
    found = reading.to_json()
    assert found["hidden_dense"] == 0
    assert all(len(token["top"]) == token["lit"] for token in found["tokens"])


@models
def test_frames(which: str, readings: Any) -> None:
    frame = readings(which).to_frame()
    assert list(frame.columns) == [
        "position",
        "token",
        "lit",
        "explained",
        "feature",
        "value",
        "share",
        "fires",
        "says",
        "name",
        "described",
    ]
    assert len(frame) == 5 * (len(readings(which)) - 1)
    assert frame.position.nunique() == len(readings(which)) - 1


def test_printed(readings: Any) -> None:
    reading = readings("smollm2")
    lines = str(reading).splitlines()
    assert len(lines) == len(reading)
    assert lines[0].startswith("random-standard reads ")
    assert repr(reading).startswith("Reading('random-standard', 'The Golden Gate Bridge")
    assert len(repr(reading.at("Bridge"))) < 300


@pytest.mark.parametrize("top", [0, -3])
def test_top_out_of_range(top: int, labs: Callable[[str], Lab]) -> None:
    with pytest.raises(UsageError, match=f"top must be at least 1, got {top}"):
        labs("gpt2").read("abc", top=top)


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_facts_are_plain_counts(labs: Callable[[str], Lab], tmp_path: Path) -> None:
    lab = labs("gpt2")
    texts = ["The cat sat on the mat.", "Rome", "你好，世界", "the list of the dog"]
    found = facts.measure(lab.model, lab.saes[0], texts)
    x = torch.cat([values(lab, lab.read(text))[1:] for text in texts])
    dense = lab.saes[0].encode(x)
    assert found.tokens == len(x)
    assert torch.allclose(found.maximum, dense.max(0).values, atol=1e-4)
    assert torch.allclose(found.density, (dense > 0).float().mean(0), atol=1.5 / len(x))
    assert found.norm == pytest.approx(float(x.norm(dim=1).median()), rel=1e-5)
    found.concepts = {"桥": {"feature": 3, "auroc": 0.9}}
    found.save(tmp_path / "facts.safetensors")
    again = Facts.load(tmp_path / "facts.safetensors")
    assert torch.equal(again.maximum, found.maximum)
    assert torch.equal(again.density, found.density)
    assert (again.norm, again.tokens, again.concepts) == (found.norm, found.tokens, found.concepts)


def test_facts_are_measured_once(labs: Callable[[str], Lab], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path))
    monkeypatch.setattr(facts, "neutral_texts", lambda count: ["The cat sat.", "Rome"])
    model = labs("gpt2").model
    first = random_lab(model, d_sae=32)
    assert first.facts().tokens > 0
    monkeypatch.setattr(facts, "measure", lambda *_: pytest.fail("measured twice"))
    assert torch.equal(random_lab(model, d_sae=32).facts().maximum, first.facts().maximum)
    monkeypatch.undo()
    other = random_lab(model, d_sae=32, seed=1)
    assert fingerprint.of_pair(model, other.saes[0]) != fingerprint.of_pair(model, first.saes[0])
