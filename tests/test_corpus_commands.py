"""`lancet harvest` and `lancet encode` as commands, and that `card` and `search` read what was harvested."""
# ruff: noqa: F811 - fixtures of another file

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_cli import Done, documented, folders, run  # noqa: F401 - fixtures

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "你好", "list", "of", "value"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, draw = tmp_path_factory.mktemp("corpus") / "c.jsonl", random.Random(0)
    rows = [json.dumps({"body": " ".join(draw.choices(WORDS, k=20))}, ensure_ascii=False) for _ in range(8)]
    path.write_text("\n".join([*rows, "{no", rows[0]]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def pair(folders: tuple[str, str]) -> list[str]:
    """For commands that open nothing, to which `run` adds nothing."""
    return ["--model", folders[0], "--sae", folders[1]]


def keys(value: Any) -> set[str]:
    """The names of all objects in JSON."""
    if isinstance(value, list):
        return {key for each in value for key in keys(each)}
    return set(value) | {key for each in value.values() for key in keys(each)} if isinstance(value, dict) else set()


def test_harvest_then_card_then_search(
    run: Callable[..., Done],
    corpus: Path,
    pair: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LANCET_DATA", str(tmp_path / "data"))
    words = ["harvest", str(corpus), "--field", "body", "--tokens", "0.2k", "--length", "32"]
    done = run(*words, "--json")
    assert done.code == 0, done.err
    told = done.json
    assert keys(told) == documented("lancet harvest CORPUS... --json")
    assert told["corpus"]["tokens"] == 200 and told["atlases"] == [str(tmp_path / "data" / "atlas" / "mid")]
    assert sorted(path.name for path in Path(told["atlases"][0]).iterdir()) == [
        "examples.parquet", "facts.safetensors", "features.parquet", "manifest.json", "passages.parquet",
    ]  # fmt: skip
    again = run(*words)
    assert again.code == 2 and again.out == ""
    assert "holds a finished atlas; choose another --out, or delete it first" in again.err

    rows = pq.read_table(Path(told["atlases"][0]) / "features.parquet").to_pylist()
    most = max(rows, key=lambda row: row["fired"])
    card = run("card", f"#{most['feature']}", *pair, "--json", bare=True)
    assert card.code == 0, card.err
    assert card.json["fired"] == most["fired"] and card.json["tokens"] == 200 and card.json["examples"]
    plain = run("card", str(most["feature"]), *pair, bare=True)
    assert plain.code == 0 and f"#{most['feature']}" in plain.out
    word = next(t.strip() for row in rows for t in row["fires_tokens"] if t.strip() in WORDS)
    found = run("search", word, *pair, "--json", bare=True)
    assert found.code == 0, found.err
    assert found.json and any(hit["fires"] == [word] for hit in found.json)
    assert keys(found.json) <= documented("lancet search WORDS --json")


def test_harvest_tells_what_it_left_out(run: Callable[..., Done], corpus: Path, tmp_path: Path) -> None:
    done = run("harvest", str(corpus), "--field", "body", "--out", str(tmp_path / "a"), "--no-lenses")
    assert done.code == 0 and done.out == f"wrote {tmp_path / 'a'}\n"
    assert "of 8 documents in" in done.err and "1 repeats and 1 bad lines left out" in done.err
    assert "1 line left out, first line 9 (not JSON)" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["harvest", "{corpus}", "--tokens", "many"], "a number of tokens is written 10M"),
        (["harvest", "./nothing.txt"], "does not exist; give a file"),
        (["harvest", "{corpus}", "--out", "{tmp}/a"], "the corpus is empty"),  # another field
        (["harvest", "{corpus}", "--engine", "spark", "--out", "{tmp}/a"], "local and ray"),
        (["encode", "{corpus}", "--out", "{tmp}/a", "--pool", "sum"], "no pooling 'sum'; choose max, mean, count"),
        (["encode", "./nothing.txt", "--out", "{tmp}/a"], "does not exist; give a file"),
        (["encode", "{corpus}", "--out", "{tmp}/a", "--length", "1"], "2 to 4096 tokens"),
        (["encode", "{corpus}", "--out", "{corpus}"], "is there already; choose another --out"),
        (
            ["encode", "{corpus}", "--out", "{tmp}/a", "--sae", "x", "--sae", "y"],
            "encode writes the features of one SAE",
        ),
    ],
)
def test_mistakes(words: list[str], said: str, run: Callable[..., Done], corpus: Path, tmp_path: Path) -> None:
    done = run(*(word.format(corpus=corpus, tmp=tmp_path) for word in words))
    assert done.code == 2, done.err
    assert said in done.err.splitlines()[-1] and done.out == ""


def test_encode(run: Callable[..., Done], corpus: Path, tmp_path: Path) -> None:
    words = ["encode", str(corpus), "--field", "body"]
    done = run(*words, "--out", str(tmp_path / "a.parquet"), "--tokens", "100", "--json")
    assert done.code == 0, done.err
    assert keys(done.json) <= documented("lancet encode CORPUS... --json")
    assert done.json["tokens"] == done.json["rows"] == len(pq.read_table(tmp_path / "a.parquet")) == 100
    done = run(*words, "--out", str(tmp_path / "b.parquet"), "--pool", "max")
    assert done.code == 0 and done.out == f"wrote {tmp_path / 'b.parquet'}\n"
    assert "9 rows: " in done.err and "1 bad lines left out" in done.err
