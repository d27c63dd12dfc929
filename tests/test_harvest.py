"""A whole harvest: its tables against dense activations, killed and resumed, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from killing import KillsAtStep, exit_code

from lancet import files, fingerprint
from lancet.atlas import finish, place, shards
from lancet.atlas import harvest as module
from lancet.atlas.harvest import harvest
from lancet.errors import LancetError, MismatchError, UsageError
from lancet.facts import Facts
from lancet.lab import Lab
from lancet.loading import open_model
from lancet.logit_lens import logit_lens
from lancet.model import Model
from lancet.sae import Sae, random_sae
from lancet.site import Site

SITES = ("blocks.1.hook_resid_pre", "blocks.2.hook_resid_post")
FEATURES, LENGTH, SHARD = 40, 24, 200
TABLES = ("manifest.json", "features.parquet", "examples.parquet", "passages.parquet", "facts.safetensors")


def texts(count: int = 25, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "dog",
        "你好",
        "😀",
        "list",
        "of",
        "value",
        "return",
        "for",
        "so",
    ]
    return [" ".join(draw.choice(words) for _ in range(draw.randint(3, 25))) for _ in range(count)]


def written(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def lab_of(model: Model, count: int = 1) -> Lab:
    saes = [random_sae(64, FEATURES, "standard", seed=i, site=Site.parse(SITES[i])) for i in range(count)]
    lab = Lab(model, saes)
    for sae in saes:
        lab._own_facts[sae.site] = Facts(torch.full((FEATURES,), 9.0), torch.full((FEATURES,), 0.1), 10.0, 1000)
    return lab


def tables(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: pq.read_table(folder / f"{name}.parquet") for name in ("features", "examples", "passages")
    }
    return found | {"manifest": json.loads((folder / "manifest.json").read_text())}


def raw(folder: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in folder.iterdir()) == sorted(TABLES)
    return {name: (folder / name).read_bytes() for name in TABLES}


@pytest.fixture(scope="module")
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2()


@pytest.fixture(autouse=True)
def many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", SHARD)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("corpus") / "c.jsonl", texts())


@pytest.fixture(scope="module")
def plain(model: Model, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas without lenses that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", SHARD)
        out = tmp_path_factory.mktemp("plain") / "atlas"
        harvest(lab_of(model), corpus, out, length=LENGTH, lenses=False)
    return out


def densely(model: Model, sae: Sae, rows: list[str]) -> tuple[list[np.ndarray], list[list[int]], list[str]]:
    """Each piece alone: dense activations [tokens, features], ids; and the documents."""
    values, ids = [], []
    for row in rows:
        whole = model.tokenizer(row, add_special_tokens=False)["input_ids"]
        for first in range(0, len(whole), LENGTH - 1):
            part = whole[first : first + LENGTH - 1]
            x = model.values(model.batch([[0, *part]]), [sae.site])[sae.site][0, 1:]
            values.append(sae.encode(x).numpy())
            ids.append(part)
    return values, ids, rows


def test_tables_equal_dense_activations(model: Model, plain: Path) -> None:
    lab = lab_of(model)
    sae = lab.sae()
    values, ids, rows = densely(model, sae, texts())
    every, tokens = np.concatenate(values), np.concatenate(ids)
    told = tables(plain)
    features = told["features"].to_pydict()
    manifest = told["manifest"]
    assert manifest["corpus"]["tokens"] == len(tokens) and manifest["corpus"]["pieces"] == len(ids)
    assert manifest["corpus"]["documents"] == len(rows)
    assert sum(manifest["positions"]) == len(tokens)
    assert manifest["scale"] == 64 and manifest["co_firing"] == {"tokens": len(tokens), "exact": True}
    assert features["feature"] == list(range(FEATURES))
    fired = (every > 0).sum(0)
    np.testing.assert_array_equal(features["fired"], fired)
    np.testing.assert_allclose(features["density"], fired / len(tokens))
    np.testing.assert_allclose(features["mean"], every.sum(0) / fired.clip(1), rtol=1e-5)
    np.testing.assert_allclose(features["maximum"], every.max(0), rtol=1e-5)
    lit = (every > 0).astype(np.int64)
    both = lit.T @ lit
    rows_ = sae.rows(slice(0, FEATURES))
    unit = rows_ / rows_.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.t()).numpy()
    np.fill_diagonal(cosine, -2)
    for f in range(FEATURES):
        assert sum(features["histogram"][f]) == sum(features["positions"][f]) == fired[f]
        np.testing.assert_allclose(features["near_cosines"][f], np.sort(cosine[f])[::-1][:10], atol=1e-5)
        np.testing.assert_allclose(cosine[f][features["near"][f]], features["near_cosines"][f], atol=1e-5)
        if not fired[f]:
            continue
        score = both[f] / np.sqrt(fired[f] * fired.clip(1))
        score[f] = 0
        got = features["together"][f]
        np.testing.assert_allclose(score[got], np.sort(score)[::-1][: len(got)])
        np.testing.assert_allclose(features["together_shares"][f], both[f][got] / fired[f], rtol=1e-6)
        assert features["together_fired"][f] == fired[f]
        mass = np.bincount(tokens, every[:, f], minlength=model.d_vocab)
        best = np.sort(mass)[::-1][: len(features["fires_shares"][f])]
        np.testing.assert_allclose(features["fires_shares"][f], best / mass.sum(), atol=1e-5)
        assert features["fires_tokens"][f][0] == model.decode([int(mass.argmax())])
        assert features["bounds"][f][0] == 0
        assert features["bounds"][f][5] == pytest.approx(every[:, f].max(), rel=1e-5)
    assert all(features["logit_up"][f] == features["effect_down_values"][f] == [] for f in range(FEATURES))


def test_examples_show_their_text(model: Model, plain: Path) -> None:
    told = tables(plain)
    values, ids, rows = densely(model, lab_of(model).sae(), texts())
    passages = {row["passage"]: row for row in told["passages"].to_pylist()}
    bounds = told["features"].column("bounds").to_pylist()
    strongest = np.array([value.max(0) for value in values])  # [pieces, features]
    previous = (-1, -1, -1)
    for row in told["examples"].to_pylist():
        f, passage = row["feature"], passages[row["passage"]]
        assert previous < (f, row["band"], row["rank"])
        previous = (f, row["band"], row["rank"])
        assert row["hash"] == passage["hash"]
        text, ends = passage["text"], passage["ends"]
        assert ends[-1] == len(text) and any(text in whole for whole in rows)
        close = np.flatnonzero(np.abs(strongest[:, f] - row["value"]) < 1e-5)
        whole = [i for i in close.tolist() if text in model.decode(ids[i]) or "\ufffd" in model.decode(ids[i])]
        stop = passage["start"] + row["first"] + len(row["strengths"])
        piece = next(i for i in whole if stop == min(passage["start"] + row["peak"] + 16, len(values[i])))
        at = passage["start"] + row["peak"]
        np.testing.assert_allclose(values[piece][at, f], row["value"], rtol=1e-5, atol=1e-5)
        first = passage["start"] + row["first"]
        window = values[piece][first : first + len(row["strengths"]), f]
        assert first == max(0, at - 16) and len(window) == min(at + 16, len(values[piece])) - first
        shown = np.frombuffer(row["strengths"], np.uint8)
        np.testing.assert_allclose(shown / 255, window / row["value"], atol=1 / 255)
        begin = ends[row["peak"] - 1] if row["peak"] else 0
        piece_text = model.decode([ids[piece][at]])
        assert text[begin : ends[row["peak"]]] == piece_text or "\ufffd" in piece_text
        if row["band"]:
            below, above = bounds[f][row["band"] - 1], bounds[f][row["band"]]
            assert below * (1 - 1e-6) <= row["value"] <= above * (1 + 1e-6)
    used = told["examples"].column("passage").to_pylist()
    assert set(used) == set(passages)
    best = told["examples"].to_pandas().query("band == 0 and rank == 0").set_index("feature").value
    np.testing.assert_allclose(best, strongest.max(0)[best.index], rtol=1e-5, atol=1e-5)


def test_facts_are_of_the_corpus(model: Model, plain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Reading and editing go by the harvest's maxima; on another model by those measured there."""
    every = np.concatenate(densely(model, lab_of(model).sae(), texts())[0])
    tokens = np.concatenate(densely(model, lab_of(model).sae(), texts())[1])
    facts = Facts.load(plain / "facts.safetensors")
    np.testing.assert_allclose(facts.maximum, every.max(0), rtol=1e-5)
    np.testing.assert_allclose(facts.density, (every > 0).mean(0), rtol=1e-6)
    assert facts.tokens == len(tokens) and facts.norm == 10.0
    lit = int((every > 0).sum(0).argmax())
    mass = np.bincount(tokens, every[:, lit], minlength=model.d_vocab)
    assert facts.fires_ids is not None and facts.fires_shares is not None
    assert int(facts.fires_ids[lit][0]) == int(mass.argmax())
    assert float(facts.fires_shares[lit][0]) == pytest.approx(mass.max() / mass.sum(), abs=1e-3)

    monkeypatch.setenv("LANCET_DATA", str(tmp_path / "data"))
    lab = lab_of(model)
    shutil.copytree(plain, place.default(lab.sae().name))
    assert torch.equal(lab.facts().maximum, facts.maximum)
    assert torch.equal(lab.facts(harvested=False).maximum, torch.full((FEATURES,), 9.0))
    renamed = lab_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(renamed.model, "name", "another")
        assert torch.equal(renamed.facts().maximum, facts.maximum)  # the very weights, under another name
    monkeypatch.setattr(fingerprint, "of_model", lambda model: "trained on since")  # other weights, under the same name
    other = lab_of(model)
    other._own_facts.clear()
    assert other.facts().tokens != facts.tokens


def test_another_order_counts_the_same(model: Model, plain: Path, tmp_path: Path) -> None:
    rows = texts()
    random.Random(5).shuffle(rows)
    harvest(lab_of(model), written(tmp_path / "c.jsonl", [*rows, rows[3]]), tmp_path / "a", length=LENGTH, lenses=False)
    one, other = tables(plain), tables(tmp_path / "a")
    assert other["manifest"]["corpus"] == one["manifest"]["corpus"] | {"repeats": 1}
    for name in ("features", "examples", "passages"):
        assert one[name].num_rows == other[name].num_rows
        for column in one[name].column_names:
            a, b = one[name].column(column).to_pylist(), other[name].column(column).to_pylist()
            if column in ("mean", "maximum", "minimum", "value"):
                assert a == pytest.approx(b, rel=1e-5)
            elif column in ("bounds", "fires_shares"):
                assert np.concatenate(a).tolist() == pytest.approx(np.concatenate(b).tolist(), abs=1e-5)
            elif column == "strengths":
                assert all(abs(x - y) <= 1 for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
            else:
                assert a == b, column


def test_several_saes_share_the_passes(model: Model, corpus: Path, plain: Path, tmp_path: Path) -> None:
    """Each atlas of two is what the SAE alone gets, and the model is run once."""
    lab, passes = lab_of(model, 2), 0

    def values(batch: Any, sites: Any, original: Any = model.values) -> Any:
        nonlocal passes
        passes += 1
        return original(batch, sites)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "values", values, raising=False)
        found = harvest(lab, corpus, tmp_path / "two", length=LENGTH, lenses=False)
    both, passes = passes, 0
    assert [folder.name for folder in found.folders] == list(SITES)
    assert raw(found.folders[0]) == raw(plain)
    assert both <= 2 * len(json.dumps(texts())) // SHARD  # a few for each shard
    with pytest.raises(UsageError, match="finished atlas"):
        harvest(lab, corpus, tmp_path / "two", length=LENGTH)
    shutil.rmtree(found.folders[1])  # one atlas of another harvest must not pass for one of this
    with pytest.raises(UsageError, match=f"{SITES[0]} holds a finished atlas"):
        harvest(lab, corpus, tmp_path / "two", length=LENGTH + 1)


def harvest_until_killed(folder: str, corpus: Path, out: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    shards.SHARD, module.EVERY, module.SHARE = SHARD, 0, 0
    lab = lab_of(open_model(folder, "cpu", "float32"))
    harvest(lab, corpus, out, length=LENGTH, lenses=False, say=KillsAtStep("harvesting:", 3))


def test_killed_and_resumed(model: Model, corpus: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    code = exit_code(harvest_until_killed, model.name, corpus, out, torch.get_num_threads())
    assert code == -signal.SIGKILL
    assert not (out / "manifest.json").exists() and list((out / ".work").glob("*.safetensors"))
    counted = 0

    def count(*given: Any, original: Any = module.active) -> Any:
        nonlocal counted
        counted += 1
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "active", count)
        harvest(lab_of(model), corpus, out, length=LENGTH, lenses=False)
    assert raw(out) == raw(plain)
    of = len(shards.prepare(model, texts(), tmp_path / "s", LENGTH, size=SHARD).shards)
    assert 0 < counted == of - 2 > 0  # two were in the last checkpoint


class Stopped(BaseException):
    """What no one catches."""


@pytest.mark.parametrize("where", ["preparing", "adding", "passages", "features", "manifest"])
def test_interrupted_anywhere(
    where: str, model: Model, corpus: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY", 0)
    monkeypatch.setattr(module, "SHARE", 0)
    calls = 0

    def stop(*given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (3 if where in ("preparing", "adding") else 1):
            raise KeyboardInterrupt if where == "adding" else Stopped
        return original(*given, **more)

    target = {
        "preparing": (shards.Shard, "save"),
        "adding": (module.Statistics, "_peaks"),
        "passages": (finish, "_write_passages"),
        "features": (finish, "_write_features"),
        "manifest": (finish, "write_json"),
    }[where]
    original = getattr(*target)
    with monkeypatch.context() as patch:
        patch.setattr(*target, lambda *given, **more: stop(*given, **more))
        with pytest.raises((Stopped, KeyboardInterrupt)):
            harvest(lab_of(model), corpus, tmp_path / "a", length=LENGTH, lenses=False)
    assert not (tmp_path / "a" / "manifest.json").exists()
    harvest(lab_of(model), corpus, tmp_path / "a", length=LENGTH, lenses=False)
    assert raw(tmp_path / "a") == raw(plain)


def test_a_full_disk(model: Model, corpus: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0)
    monkeypatch.setattr(module, "SHARE", 0)
    replace, left = os.replace, [9]

    def full(a: Any, b: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(LancetError, match="the disk is full"):
            harvest(lab_of(model), corpus, tmp_path / "a", length=LENGTH, lenses=False)
    harvest(lab_of(model), corpus, tmp_path / "a", length=LENGTH, lenses=False)
    assert raw(tmp_path / "a") == raw(plain)


def test_refusals(model: Model, corpus: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, out = lab_of(model), tmp_path / "a"
    with pytest.raises(UsageError, match="finished atlas; choose another --out"):
        harvest(lab, corpus, plain, length=LENGTH)
    with pytest.raises(UsageError, match="2 to 256 tokens"):
        harvest(lab, corpus, out, length=1)
    with pytest.raises(UsageError, match="at least 1"):
        harvest(lab, corpus, out, tokens=0)
    with pytest.raises(UsageError, match="local and ray"):
        harvest(lab, corpus, out, engine="spark")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_count", lambda *given: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            harvest(lab, corpus, out, length=LENGTH)
    with pytest.raises(MismatchError, match=r"another --length \(length 24, now 25\); go on with the same, delete"):
        harvest(lab, corpus, out, length=25)
    with pytest.raises(MismatchError, match="another --tokens"):
        harvest(lab, corpus, out, tokens=100, length=LENGTH)
    with pytest.raises(MismatchError, match="another corpus"):
        harvest(lab, written(tmp_path / "other.jsonl", texts(3)), out, length=LENGTH)
    changed = lab_of(model)
    changed.saes[0].b_enc[:] += 1
    with pytest.raises(MismatchError, match="other SAEs"):
        harvest(changed, corpus, out, length=LENGTH)
    from lancet.atlas.plan import alone

    with alone(out), pytest.raises(UsageError, match="another harvest is writing"):
        harvest(lab, corpus, out, length=LENGTH)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(UsageError, match="the corpus is empty"):
        harvest(lab, empty, tmp_path / "b")


def test_lenses_and_a_limit(model: Model, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lancet.atlas import lenses

    monkeypatch.setattr(lenses, "BLOCK", 16)
    lab = lab_of(model)
    said: list[str] = []
    found = harvest(lab, corpus, tmp_path / "a", tokens=150, length=LENGTH, say=said.append)
    assert found.corpus["tokens"] == 150
    features = tables(tmp_path / "a")["features"].to_pydict()
    logits = logit_lens(model, lab.sae().rows(slice(0, FEATURES)))
    lab._facts |= lab._own_facts
    for f in (0, 17, FEATURES - 1):
        order = logits[f].argsort(descending=True)
        assert features["logit_up"][f] == [model.decode([i]) for i in order[:10].tolist()]
        assert features["logit_down_values"][f] == pytest.approx(logits[f].sort().values[:10].tolist(), rel=1e-5)
        change = lab.effect(f"#{f}", strength=0.35)[0]
        assert len(features["effect_up"][f]) == len(features["effect_down_values"][f]) == 10
        nats = dict(change.promotes) | dict(change.suppresses)
        for token, value in zip(features["effect_up"][f], features["effect_up_values"][f], strict=True):
            if token in nats and "\ufffd" not in token:
                assert nats[token] == pytest.approx(value, abs=1e-4)
    assert tables(tmp_path / "a")["manifest"]["lenses"] == {"logit": True, "effect": True}
