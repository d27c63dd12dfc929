"""Features as data: tokens and pooled texts against dense activations, the file, a kill, and what is refused."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from killing import KillsAtStep, exit_code
from test_harvest import texts, written

from lancet.atlas import encode as module
from lancet.atlas import rows
from lancet.atlas.encode import encode
from lancet.errors import DamagedError, MismatchError, UsageError
from lancet.lab import Lab
from lancet.loading import open_model
from lancet.model import Model
from lancet.sae import Sae, random_sae
from lancet.site import Site

FEATURES, LENGTH, CHUNK = 40, 12, 100
LONG = "the cat sat on a mat and the dog of value 你好 😀 " * 12  # of more tokens than a chunk


def documents() -> list[str]:
    """Some of which are repeated, longer than a chunk, or nothing but a start token."""
    some = texts(14)
    return [*some[:6], LONG, some[0], "<|endoftext|>", *some[6:], "<|endoftext|>a start of its own"]


def lab_of(model: Model, architecture: str = "standard") -> Lab:
    return Lab(model, [random_sae(64, FEATURES, architecture, site=Site.parse("blocks.1.hook_resid_pre"))])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2(n_layer=2)


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK", CHUNK)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("corpus") / "c.jsonl", documents())


def densely(model: Model, sae: Sae, text: str) -> tuple[np.ndarray, list[int], list[int]]:
    """One text alone: dense activations [tokens, features], positions, token ids."""
    ids = [i for i in model.tokenizer(text, add_special_tokens=False)["input_ids"] if i != 0]
    values, positions = [np.zeros((0, sae.d_sae), np.float32)], []
    for first in range(0, len(ids), LENGTH - 1):
        part = ids[first : first + LENGTH - 1]
        x = model.values(model.batch([[0, *part]]), [sae.site])[sae.site][0]
        values.append(sae.encode(x).numpy()[1:])  # a temporal SAE takes the start token into account
        positions += range(1, len(part) + 1)
    return np.concatenate(values), positions, ids


def pooled(values: np.ndarray, pool: str) -> np.ndarray:
    if len(values) == 0:
        return np.zeros(values.shape[1])
    if pool == "max":
        return np.take_along_axis(values, np.abs(values).argmax(0)[None], 0)[0]
    return values.mean(0) if pool == "mean" else (values != 0).sum(0)


def table(path: Path) -> tuple[Any, np.ndarray]:
    """The table and its rows as a dense matrix."""
    found = pq.read_table(path)
    dense = np.zeros((len(found), FEATURES), np.float32)
    for i, (features, values) in enumerate(
        zip(found["features"].to_pylist(), found["values"].to_pylist(), strict=True)
    ):
        assert features == sorted(set(features))
        dense[i, features] = values
    return found, dense


# TopK has one number of features a token; AbsTopK falls below zero; a temporal SAE reads text by text.
@pytest.mark.parametrize("architecture", ["standard", "abstopk", "temporal"])
def test_tokens_equal_a_plain_loop(architecture: str, model: Model) -> None:
    lab, given = lab_of(model, architecture), documents()
    found = lab.features(given, length=LENGTH)
    alone = [densely(model, lab.sae(), text) for text in given]
    every = np.concatenate([values for values, _, _ in alone])
    assert found.matrix.shape == every.shape and found.matrix.has_canonical_format
    np.testing.assert_allclose(found.matrix.toarray(), every, atol=1e-5, rtol=1e-5)
    assert found.document.tolist() == [i for i, (values, _, _) in enumerate(alone) for _ in values]
    assert found.position is not None and found.token is not None
    assert found.position.tolist() == [p for _, positions, _ in alone for p in positions]
    for i, text in enumerate(given):
        mine = [found.token[row] for row in np.flatnonzero(found.document == i)]
        assert "".join(mine) == text.removeprefix("<|endoftext|>")
    plain = [(t, model.decode([i])) for t, i in zip(found.token, [i for *_, ids in alone for i in ids], strict=True)]
    assert all(token == text for token, text in plain if "\ufffd" not in text)
    for pool in rows.POOLS:
        one = lab.features(given, pool=pool, length=LENGTH)
        wanted = np.array([pooled(values, pool) for values, _, _ in alone])
        np.testing.assert_allclose(one.matrix.toarray(), wanted, atol=1e-5, rtol=1e-5)
        assert one.document.tolist() == list(range(len(given)))
        assert one.position is None and one.token is None


@pytest.mark.parametrize("pool", [None, *rows.POOLS])
def test_the_file_holds_the_same(
    pool: str | None, model: Model, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", 7)
    lab, out = lab_of(model), tmp_path / "new" / "features.parquet"
    done = encode(lab, corpus, out, pool, length=LENGTH)
    found, dense = table(out)
    given = lab.features(documents(), pool=pool, length=LENGTH)
    np.testing.assert_array_equal(dense, given.matrix.toarray())
    assert found["document"].to_pylist() == given.document.tolist()
    types = {name: str(found.schema.field(name).type) for name in found.column_names}
    kinds = {"features": "list<element: int32>", "values": "list<element: float>"}
    counted = [len(densely(model, lab.sae(), text)[1]) for text in documents()]
    if pool is None:
        assert types == {"document": "int32", "position": "int32", "token": "string"} | kinds
        assert found["position"].to_pylist() == given.position.tolist()  # type: ignore[union-attr]
        assert found["token"].to_pylist() == given.token
    else:
        assert types == {"document": "int32", "tokens": "int64"} | kinds
        assert found["tokens"].to_pylist() == counted
    assert pq.ParquetFile(out).num_row_groups > 1
    assert (done.rows, done.documents, done.tokens) == (len(found), len(documents()), sum(counted))
    told = json.loads(found.schema.metadata[b"lancet"])
    assert told["sae"]["d_sae"] == FEATURES and (told["pool"], told["length"]) == (pool, LENGTH)
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # no work folder, no lock
    with pytest.raises(UsageError, match=r"is there already; choose another --out"):
        encode(lab, corpus, out, pool, length=LENGTH)


def test_no_more_than_so_many_tokens(model: Model, corpus: Path, tmp_path: Path) -> None:
    done = encode(lab_of(model), corpus, tmp_path / "a.parquet", tokens=150, length=LENGTH)
    assert done.rows == done.tokens == len(pq.read_table(tmp_path / "a.parquet")) == 150
    whole = lab_of(model).features(documents(), length=LENGTH)
    np.testing.assert_allclose(table(tmp_path / "a.parquet")[1], whole.matrix.toarray()[:150], atol=1e-5)


# ---- interrupted -----------------------------------------------------------------------------------------------------


def encode_until_killed(folder: str, corpus: Path, out: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    rows.CHUNK = CHUNK
    lab = lab_of(open_model(folder, "cpu", "float32"))
    encode(lab, corpus, out, "mean", length=LENGTH, say=KillsAtStep("encoding:", 3))


def test_killed_and_resumed(model: Model, corpus: Path, tmp_path: Path) -> None:
    """Three chunks are done, the third in the middle of the long document; the file is the same byte for byte."""
    lab, out = lab_of(model), tmp_path / "a.parquet"
    encode(lab, corpus, tmp_path / "plain.parquet", "mean", length=LENGTH)
    code = exit_code(encode_until_killed, model.name, corpus, out, torch.get_num_threads())
    assert code == -signal.SIGKILL
    assert not out.exists() and len(list((tmp_path / ".a.parquet.work").glob("00*.parquet"))) == 3
    with pytest.raises(MismatchError, match=r"another --pool \(pool mean, now max\); go on with the same, delete"):
        encode(lab, corpus, out, "max", length=LENGTH)
    with pytest.raises(MismatchError, match="another --length"):
        encode(lab, corpus, out, "mean", length=LENGTH + 1)
    with pytest.raises(MismatchError, match="another corpus"):
        encode(lab, written(tmp_path / "other.jsonl", texts(3)), out, "mean", length=LENGTH)
    changed = lab_of(model)
    changed.saes[0].b_enc[:] += 1
    with pytest.raises(MismatchError, match="another SAE"):
        encode(changed, corpus, out, "mean", length=LENGTH)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        original = rows.table
        patch.setattr(rows, "table", lambda *given: made.append(given) or original(*given))
        encode(lab, corpus, out, "mean", length=LENGTH)
    assert out.read_bytes() == (tmp_path / "plain.parquet").read_bytes()
    assert len(made) == len(list(rows.chunks(model, documents(), LENGTH))) - 3 > 0


class Stopped(BaseException):
    """What no one catches."""


def test_interrupted_while_joining(model: Model, corpus: Path, tmp_path: Path) -> None:
    lab, out = lab_of(model), tmp_path / "a.parquet"
    encode(lab, corpus, tmp_path / "plain.parquet", length=LENGTH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_read", lambda path: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            encode(lab, corpus, out, length=LENGTH)
    assert not out.exists()
    part = min((tmp_path / ".a.parquet.work").glob("000001-*"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-9])
    with pytest.raises(DamagedError, match="delete it, and the same command writes it again"):
        encode(lab, corpus, out, length=LENGTH)
    part.unlink()
    encode(lab, corpus, out, length=LENGTH)
    assert out.read_bytes() == (tmp_path / "plain.parquet").read_bytes()


def test_standard_input_that_differs(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of standard input nothing is known but what was read."""
    import io

    class In:
        buffer = io.BytesIO(b"the cat sat on the mat")

    monkeypatch.setattr(sys, "stdin", In)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_read", lambda path: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            encode(lab_of(model), "-", tmp_path / "a.parquet")
    In.buffer = io.BytesIO(b"the dog sat on the mat")
    with pytest.raises(MismatchError, match="another corpus"):
        encode(lab_of(model), "-", tmp_path / "a.parquet")


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes(model: Model, corpus: Path, tmp_path: Path) -> None:
    lab, out = lab_of(model), tmp_path / "a.parquet"
    with pytest.raises(UsageError, match="no pooling 'sum'; choose max, mean, count"):
        encode(lab, corpus, out, "sum")
    with pytest.raises(UsageError, match="2 to 256 tokens"):
        encode(lab, corpus, out, length=1)
    with pytest.raises(UsageError, match="at least 1"):
        encode(lab, corpus, out, tokens=0)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": " "}\n{no\n')
    with pytest.raises(UsageError, match=r"the corpus is empty.*1 line left out, first line 2 \(not JSON\)"):
        encode(lab, empty, out)
    assert not list(tmp_path.glob(".a*work"))
    with pytest.raises(UsageError, match="cannot write"):
        encode(lab, corpus, empty / "a.parquet")
    with module.plans.alone(out, tmp_path / ".a.parquet.work"), pytest.raises(UsageError, match="another encode is"):
        encode(lab, corpus, out)
    with pytest.raises(UsageError, match="no text to encode"):
        lab.features([])
    with pytest.raises(UsageError, match="text 1 is not valid Unicode"):
        lab.features(["a", "\ud800"])
    with pytest.raises(UsageError, match="no pooling 'sum'"):
        lab.features("a", pool="sum")


def test_bad_lines_are_told(model: Model, tmp_path: Path) -> None:
    path, said = tmp_path / "c.jsonl", []
    path.write_bytes(b'{"text": "the cat"}\n{no\n{"text": "the dog"}\n')
    done = encode(lab_of(model), path, tmp_path / "a.parquet", say=said.append)
    assert (done.documents, done.bad_lines) == (2, 1) and said == [done.bad] and "first line 2" in done.bad


def test_one_text(model: Model) -> None:
    found = lab_of(model).features("the cat")
    assert set(found.document.tolist()) == {0} and "".join(found.token or []) == "the cat"
