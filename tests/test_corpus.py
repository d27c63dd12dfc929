"""Documents out of files of all kinds, and documents into shards."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lancet.atlas import activations, shards
from lancet.atlas.corpus import Bad, documents, sources
from lancet.errors import DamagedError, MissingError, UsageError
from lancet.evaluation.texts import chunks
from lancet.model import Model
from lancet.site import Site
from lancet.training.text import prepare


def read(*given: str | Path, column: str = "text", bad: Bad | None = None) -> list[str]:
    return list(documents(sources(given), column, bad))


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_packed_or_not(tmp_path: Path, packed: str, kind: str) -> None:
    texts = ["Ein Satz.\nNoch einer über Äpfel.", "第二段"]
    long = [text + " and more" * 300 for text in texts]  # too long to be joined
    raw = "\n\n\n".join(long) if kind == "txt" else "\n".join(json.dumps({"text": text}) for text in long)
    path = tmp_path / f"a.{kind}{packed}"
    if packed == ".gz":  # of two members
        data = raw.encode()
        path.write_bytes(gzip.compress(data[:1000]) + gzip.compress(data[1000:]))
    elif packed:
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
            file.write(raw.encode())
    else:
        path.write_bytes(raw.encode())
    assert read(path) == long


def test_passages(tmp_path: Path) -> None:
    """Short ones are joined up to 2,000 characters; a byte order mark and \\r\\n mean nothing."""
    path = tmp_path / "a.md"
    path.write_bytes(("\ufeffone\r\nline\r\n \r\n" + "\n\n".join(["x" * 900] * 3) + "\n\n" + "y" * 3000).encode())
    assert read(path) == [f"one\nline\n\n{'x' * 900}\n\n{'x' * 900}", "x" * 900, "y" * 3000]
    path.write_text("\n".join(["z" * 99] * 3000))
    found = read(path)
    assert sum(map(len, found)) > 2900 * 99 and max(map(len, found)) < 101_000


def test_bad_lines_are_counted(tmp_path: Path) -> None:
    path, bad = tmp_path / "a.jsonl", Bad()
    rows = [b'{"text": "good"}', b"{no", b'{"text": "\xff"}', b'{"other": 1}', b'{"text": 3}', b"", b'"text"']
    path.write_bytes(b"\n".join([*rows, b'{"text": "\\ud800"}', b'{"text": ""}', b'{"text": "last"}']))
    assert read(path, bad=bad) == ["good", "last"]
    assert bad.total == 6
    assert str(bad) == f"{path}: 6 lines left out, first line 2, 3, 4, 5, 7, ... (not JSON)"
    text, bad = tmp_path / "b.txt", Bad()
    text.write_bytes(b"good\nb\xffd\n\nmore")
    assert read(text, bad=bad) == ["good\n\nmore"]
    assert bad.first == {str(text): [2]}


def test_a_packed_file_that_is_cut_short(tmp_path: Path) -> None:
    path, bad = tmp_path / "a.jsonl.gz", Bad()
    rng = np.random.default_rng(0)
    rows = "\n".join(json.dumps({"text": rng.bytes(200).hex()}) for _ in range(500))
    whole = gzip.compress(rows.encode())
    path.write_bytes(whole[: len(whole) // 2])
    read(path, bad=bad)
    assert bad.total >= 0  # no error; what there is was read
    path.write_bytes(b"no gzip at all, whatever its name says")
    bad = Bad()
    assert read(path, bad=bad) == []
    assert "damaged" in str(bad)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"body": [f"text {i}" for i in range(1000)] + [None], "n": range(1001)}), path, row_group_size=100
    )
    assert read(path, column="body") == [f"text {i}" for i in range(1000)]
    with pytest.raises(UsageError, match=r"no column 'text'; it has body, n.*--field"):
        read(path)
    with pytest.raises(UsageError, match="holds no text"):
        read(path, column="n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DamagedError, match="Parquet"):
        read(path, column="body")


def test_folders_and_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/2.txt", "a.txt", "b/1.jsonl", "c.pdf"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert read(tmp_path) == ['{"text": "a.txt"}', "b/1.jsonl", '{"text": "b/2.txt"}']
    with pytest.raises(UsageError, match=r"no known kind; give \.txt"):
        sources(tmp_path / "c.pdf")
    with pytest.raises(UsageError, match="does not exist"):
        sources("./nothing.txt")
    with pytest.raises(UsageError, match="no corpus"):
        sources([])
    (tmp_path / "d").mkdir()
    with pytest.raises(UsageError, match="holds no file"):
        sources(tmp_path / "d")


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class In:
        buffer = io.BytesIO(b'\n{"text": "one"}\n{"text": "two"}\n')

    monkeypatch.setattr(sys, "stdin", In)
    assert read("-") == ["one", "two"]
    In.buffer = io.BytesIO(b"plain\ntext\n\n")
    assert read("-") == ["plain\ntext"]


def test_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    held = datasets.Dataset.from_dict({"text": ["one", "two"]})
    held.save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "one") == ["one", "two"]
    with pytest.raises(UsageError, match="no column 'body'"):
        read(tmp_path / "one", column="body")
    with pytest.raises(MissingError, match="no data set nobody/nothing"):
        read("nobody/nothing")


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2(n_layer=1)


def test_seen_finds_every_repeat() -> None:
    rng, seen, known = np.random.default_rng(0), shards.Seen(), set()
    for _ in range(50):
        hashes = rng.integers(0, 2000, 60).astype(np.uint64)
        for value, new in zip(hashes.tolist(), seen.new(hashes).tolist(), strict=True):
            assert new == (value not in known)
            known.add(value)
    assert sum(len(run) for run in seen._runs) == len(known)
    assert len(seen._runs) < 12


def test_prepare(model: Model, tmp_path: Path) -> None:
    texts = [
        "The cat sat. 你好，世界 😀 " * 9,
        "short",
        "The cat sat. 你好，世界 😀 " * 9,
        "<|endoftext|>with a start token",
        "x" * 60,
    ]
    found = shards.prepare(model, texts, tmp_path / "a", length=24, size=60)
    assert (found.documents, found.repeats, found.tokens) == (4, 1, sum(t for t, _ in found.shards))
    again = shards.finished(tmp_path / "a")
    assert again is not None and again.to_json() == found.to_json() and again.shards == found.shards
    assert all(tokens <= 60 for tokens, _ in found.shards)
    documents_: dict[int, list[str]] = {}
    hashes = []
    for index in range(len(found.shards)):
        shard = found.load(index)
        assert shard.number.tolist() == list(range(found.first[index], found.first[index + 1]))
        assert found.of_piece(shard.number).tolist() == [index] * len(shard.number)
        for ids, ends, text, document, hash_ in zip(
            shard.ids, shard.ends, shard.text, shard.document.tolist(), shard.hash.tolist(), strict=True
        ):
            assert 1 <= len(ids) == len(ends) <= 23 and ends[-1] == len(text)
            assert (np.diff(ends) >= 0).all()
            documents_.setdefault(document, []).append(text)
            hashes.append(hash_)
        assert shard.layout.position.tolist() == [p for ids in shard.ids for p in range(1, len(ids) + 1)]
    assert len(set(hashes)) == len(hashes)
    joined = ["".join(parts) for parts in documents_.values()]
    assert joined == [texts[0], texts[1], "with a start token", texts[4]]
    turned = shards.prepare(model, texts[::-1], tmp_path / "b", length=24, size=60)
    assert turned.fingerprint == found.fingerprint
    assert {h for i in range(len(turned.shards)) for h in turned.load(i).hash.tolist()} == set(hashes)
    cut = shards.prepare(model, texts, tmp_path / "c", length=24, tokens=101, size=60)
    assert cut.tokens == 101


def test_a_chat_is_read_with_its_own_start(smollm2_f32: Model, tmp_path: Path) -> None:
    """What a corpus is read with, by harvests, training and evaluation, is what `Lab.read` reads the same text with."""
    model, length = smollm2_f32, 40
    assert model.start_chat not in (None, model.start_plain)
    turns = [{"role": "user", "content": "Name a bridge, and say in which city it stands and who built it."}]
    chat = str(model.tokenizer.apply_chat_template(turns, tokenize=False))
    texts = [chat, "A plain text."]
    found = shards.prepare(model, texts, tmp_path / "shards", length=length)
    shard = found.load(0)
    whole = [list(model.tokenize(text).ids) for text in texts]
    assert len(whole[0]) > length and shard.start.tolist() == [model.start_chat, *[model.start_plain] * 2]
    assert [int(shard.start[0]), *shard.ids[0]] == whole[0][:length]
    assert shard.ids[1].tolist() == whole[0][length:] and [int(shard.start[2]), *shard.ids[2]] == whole[1]
    assert "".join(shard.text[:2]) == chat.removeprefix("<|im_start|>")

    site = Site.parse("blocks.2.hook_resid_pre")
    got = torch.zeros(found.tokens, model.d_model)
    for read in activations.read_pieces(model, [site], shard.ids, shard.start):
        got[read.token] = read.values[site][read.keep]
    alone = [model.values(model.batch([row]), [site])[site][0, 1:] for row in (whole[0][:length], whole[1])]
    torch.testing.assert_close(got[: length - 1], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[-len(alone[1]) :], alone[1], rtol=1e-4, atol=1e-4)

    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    text = prepare(model, sources([file]), "text", tmp_path / "text", length, None, Bad(), lambda tokens: None)
    ids, start = text.pieces(np.array([0, 2]))
    assert start.tolist() == shard.start[[0, 2]].tolist()
    assert [each.tolist() for each in ids] == [shard.ids[0].tolist(), shard.ids[2].tolist()]
    (rows,) = chunks(model, texts, 1000)
    assert rows == whole


def test_an_empty_corpus(model: Model, tmp_path: Path) -> None:
    bad = Bad()
    bad.add("a.jsonl", 3, "not JSON")
    with pytest.raises(UsageError, match=r"the corpus is empty.*a\.jsonl: 1 line left out, first line 3 \(not JSON\)"):
        shards.prepare(model, [], tmp_path, length=24, bad=bad)


def test_a_long_document_is_cut_before_white_space() -> None:
    text = "word " * 60_000
    parts = shards._stretches(text)
    assert "".join(parts) == text
    assert len(parts) > 1 and all(len(part) <= shards.STRETCH for part in parts)
    assert all(part.startswith(" ") for part in parts[1:])
    assert "".join(shards._stretches("x" * 250_000)) == "x" * 250_000
