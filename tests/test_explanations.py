"""Descriptions of features: how they are kept, taken in out of what others published, and proposed out of an atlas."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fixtures_atlas import KEY, SCHEMAS, SILENT, example, manifest, record, write_atlas, write_tables
from fixtures_names import lancet

from lancet.atlas import explanations, importing, place, proposals
from lancet.atlas.atlas import Atlas
from lancet.atlas.explanations import Explanation
from lancet.atlas.importing import Target
from lancet.errors import DamagedError, LancetError, MismatchError, UsageError

JB = Target(KEY, 100, "gpt2-small", "gpt2-small-res-jb/blocks.6.hook_resid_pre", 6, "gpt2-small/6-res-jb")


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(write_atlas(tmp_path_factory.mktemp("atlas"), 64))


def neuronpedia(index: Any, text: Any = "bridges", layer: str = "6-res-jb", **more: Any) -> dict[str, Any]:
    """A record as Neuronpedia's exports have them."""
    return {
        "modelId": "gpt2-small",
        "layer": layer,
        "index": str(index),
        "description": text,
        "explanationModelName": "gpt-4o-mini",
        "typeName": "oai_token-act-pair",
        "authorId": "x",
        "embedding": [0.1, 0.2],
        "scoreV1": 0,
    } | more


def lines(path: Path, *records: Any) -> str:
    text = "\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


# ---- the store -------------------------------------------------------------------------------------------------------


def test_entries_come_back_and_replace_those_of_their_source() -> None:
    assert explanations.load(KEY) == {}
    one = Explanation(3, "桥 and “bridges”\u2028", "ask: m", 0.75, 20)
    two = Explanation(3, "a bridge", "auto", note="fires on: bridge")
    assert explanations.keep(KEY, [two, one, one]) == 2
    assert explanations.load(KEY) == {3: [one, two]}
    other = Explanation(3, "rivers", "auto")
    explanations.keep(KEY, [other, Explanation(1, "x", "auto")])
    assert explanations.load(KEY) == {1: [Explanation(1, "x", "auto")], 3: [one, other]}
    assert explanations.of(KEY, [2, 3]) == {3: [one, other]}
    assert explanations.of("another", [3]) == {}
    assert explanations.best(explanations.load(KEY)[3]) == one
    assert explanations.best([]) is None
    assert explanations.best([Explanation(3, "bad", "ask: m", 0.4, 20), two]) == two
    assert explanations.forget(KEY, "auto") == 2
    assert explanations.load(KEY) == {3: [one]}
    assert explanations.load("another") == {}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"feature": -1, "text": "x", "source": "y"}',
        '{"feature": 1, "text": "", "source": "y"}',
        '{"feature": 1, "text": "x", "source": "y", "score": 2}',
    ],
)
def test_a_damaged_file_is_told_and_not_written_over(line: str) -> None:
    explanations.keep(KEY, [Explanation(1, "x", "auto")])
    where = explanations.path(KEY)
    where.write_text(where.read_text() + line + "\n")
    before = where.read_bytes()
    with pytest.raises(DamagedError, match="line 3"):
        explanations.load(KEY)
    with pytest.raises(DamagedError, match="line 3"):
        explanations.keep(KEY, [Explanation(2, "y", "auto")])

    assert where.read_bytes() == before


def test_a_key_is_no_path() -> None:
    for wrong in ("../names", "", "a/b"):
        with pytest.raises(UsageError, match="no SAE's key"):
            explanations.load(wrong)


def test_processes_that_write_at_once_lose_nothing() -> None:
    code = (
        "import sys; from lancet.atlas.explanations import keep, Explanation\n"
        "for i in range(5): keep('k', [Explanation(i, 'x', sys.argv[1])])"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("one", "two")]
    assert [process.wait(60) for process in running] == [0, 0]
    assert {i: [e.source for e in found] for i, found in explanations.load("k").items()} == {
        i: ["one", "two"] for i in range(5)
    }


def test_a_busy_file_is_waited_for_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    explanations.keep(KEY, [Explanation(1, "x", "auto")])
    real = filelock.FileLock
    monkeypatch.setattr(filelock, "FileLock", lambda path, timeout: real(path, timeout=0.1))
    with real(explanations.path(KEY).with_suffix(".lock")), pytest.raises(LancetError, match="another process"):
        explanations.keep(KEY, [Explanation(1, "y", "auto")])


# ---- what others published -------------------------------------------------------------------------------------------


def test_an_export_of_many_batches(tmp_path: Path) -> None:
    folder = tmp_path / "6-res-jb"
    for batch in range(12):
        some = [neuronpedia(i, f" text\n{i} ") for i in range(batch * 8, batch * 8 + 8)]
        lines(folder / "explanations" / f"batch-{batch}.jsonl.gz", *some)
    lines(folder / "features" / "batch-0.jsonl.gz", {"index": "1"})
    for given in ([str(folder)], [str(folder / "explanations")], [str(folder / "explanations" / "batch-*.gz")]):
        found = importing.read(given, JB)
        assert (found.files, len(found.entries), found.corrupt, found.empty) == (12, 96, 0, 0)
        assert [entry.feature for entry in found.entries] == list(range(96))
        assert found.entries[5].text == "text 5"
        assert found.entries[5].source == "import: gpt2-small/6-res-jb gpt-4o-mini oai_token-act-pair"
    twice = importing.read([str(folder), str(folder / "explanations" / "batch-1.jsonl.gz")], JB)
    assert twice.files == 12


def test_several_explanations_of_one_feature_all_stay(tmp_path: Path) -> None:
    given = lines(
        tmp_path / "x.jsonl",
        neuronpedia(3, "one"),
        neuronpedia(3, "two"),
        neuronpedia(3, "two"),
        neuronpedia(3, "three", explanationModelName="claude"),
    )
    explanations.keep(KEY, importing.read([given], JB).entries)
    explanations.keep(KEY, importing.read([given], JB).entries)
    assert sorted(entry.text for entry in explanations.load(KEY)[3]) == ["one", "three", "two"]


def test_others_records_are_refused_and_counted(tmp_path: Path) -> None:
    mixed = [
        neuronpedia(1),
        neuronpedia(2, layer="7-res-jb"),
        neuronpedia(5_000, layer="7-res-jb"),
        neuronpedia(3, modelId="gemma-2-2b"),
        neuronpedia(4, layer="6-att-kk"),
        "{ cut",
        "[1]",
        neuronpedia("x"),
        neuronpedia(6, ""),
        neuronpedia(7, None),
        "",
    ]
    found = importing.read([lines(tmp_path / "x.jsonl", *mixed)], JB)
    assert [entry.feature for entry in found.entries] == [1]
    assert found.others == {"gpt2-small/7-res-jb": 2, "gemma-2-2b/6-res-jb": 1, "gpt2-small/6-att-kk": 1}
    assert (found.corrupt, found.empty) == (3, 2)
    assert found.first == "x.jsonl line 6: no JSON"
    with pytest.raises(MismatchError, match=r"2 of gpt2-small/7-res-jb \(2\); give a file .*--anyway"):
        importing.read([lines(tmp_path / "y.jsonl", *mixed[1:3])], JB)
    assert len(importing.read([lines(tmp_path / "z.jsonl", *mixed[:2])], JB, anyway=True).entries) == 2


def test_an_index_that_the_sae_lacks_refuses_all(tmp_path: Path) -> None:
    given = lines(tmp_path / "x.jsonl", neuronpedia(1), neuronpedia(100), neuronpedia(101))
    with pytest.raises(MismatchError, match=r"2 of 3 records .*#101 in x.jsonl line 3; it has #0 to #99"):
        importing.read([given], JB)


@pytest.mark.parametrize(
    ("model", "layer", "fits"),
    [
        ("gpt2-small", "6-res-jb", True),
        ("openai-community/gpt2", 6, True),
        ("gpt2", "blocks", True),
        ("gpt2-medium", "6-res-jb", False),
        ("gpt2-small", "11-res-jb", False),
        (None, None, True),
    ],
)
def test_whose_a_record_is_where_no_page_is_known(model: str | None, layer: Any, fits: bool) -> None:
    assert importing.fits(model, layer, Target(KEY, 100, "openai-community/gpt2", "mine", 6)) is fits


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "feature,name\n3,bridges\n5,\"ropes, cables\"\n"),
        ("a.csv", "3,bridges\n5,ropes, cables\n"),
        ("a.csv", "\ufeffname,index,other\r\nbridges,3,x\r\n\"ropes, cables\",#5,y\r\n"),
        ("a.tsv", "index\tdescription\n3\tbridges\n5\tropes, cables\n"),
        ("a.json", '[{"feature": 3, "label": "bridges"}, {"feature": 5, "label": "ropes, cables"}]'),
        ("a.json", '{"explanations": [{"index": 3, "text": "bridges"},\n {"index": "5", "text": "ropes, cables"}]}'),
    ],
)  # fmt: skip
def test_tables_and_lists(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    found = importing.read([str(tmp_path / name)], JB)
    assert [(e.feature, e.text) for e in found.entries] == [(3, "bridges"), (5, "ropes, cables")]
    assert found.entries[0].source == f"import: {name}"


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file to import at"):
        importing.read([str(tmp_path / "none-*.jsonl")], JB)
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UsageError, match=r"no known kind; give .jsonl"):
        importing.read([str(tmp_path / "a.pdf")], JB)
    (tmp_path / "a.csv").write_text("what,ever\n1,x\n")
    with pytest.raises(UsageError, match="'what, ever'; give the columns"):
        importing.read([str(tmp_path / "a.csv")], JB)
    whole = gzip.compress(b'{"index": 1, "description": "x"}\n' * 100)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(DamagedError, match=r"cut.jsonl.gz: it is cut off.*nothing was taken in"):
        importing.read([str(tmp_path / "cut.jsonl.gz")], JB)
    (tmp_path / "latin.jsonl").write_bytes(b'{"index": 1, "description": "caf\xe9"}')
    with pytest.raises(DamagedError, match=r"latin.jsonl"):
        importing.read([str(tmp_path / "latin.jsonl")], JB)


def test_what_was_written_out_is_read_again(tmp_path: Path) -> None:
    kept = [
        Explanation(3, "a", "auto", note="n"),
        Explanation(3, "b", "ask: m", 0.9, 20),
        Explanation(5, "桥", "import: x"),
    ]
    explanations.keep(KEY, kept)
    assert explanations.export(KEY, tmp_path / "out.jsonl") == 3
    before = explanations.load(KEY)
    explanations.path(KEY).unlink()
    explanations.keep(KEY, importing.read([str(tmp_path / "out.jsonl")], JB).entries)
    assert explanations.load(KEY) == before
    other = Target("b" * 24, 100, "gpt2", "other")
    with pytest.raises(MismatchError, match="explanations of another SAE"):
        importing.read([str(tmp_path / "out.jsonl")], other)


# ---- what the atlas alone tells --------------------------------------------------------------------------------------


def test_names_of_the_made_up_atlas(atlas: Atlas) -> None:
    found = {entry.feature: entry for entry in proposals.propose(atlas)}
    assert len(found) == 63 and SILENT not in found
    assert found[3].text == "bridge (says: river, wood)"
    assert found[5].text == "rope, cable (says: bridge, span)"
    assert found[7].text.startswith("bridge, arch") and "says" not in found[7].text and "(agrees)" in found[7].note
    assert "romans" in found[7].note and "stone" in found[7].note
    assert found[9].text == "romans, goths (says: emperor, legion)"
    assert found[10].text == "大桥 (says: 江, 水)" and "风景" in found[10].note
    assert found == {entry.feature: entry for entry in proposals.propose(atlas)}


def formal(folder: Path) -> Atlas:
    """An atlas of features that are about forms: every example is made of the given tokens around a peak."""
    draw = random.Random(0)
    plain = [" and", " so", " we", " went", " on", " with", " that", " until", " evening", " came", " over", " home"]
    forms: list[tuple[list[str], list[str], float]] = [  # (tokens before the peak, peaks), density
        ([], [",", ","], 0.03),
        ([], [".", ";", "!", ":"], 0.03),
        ([","], plain, 0.03),
        (["\n"], ["The", "We", "So", "Then", "An", "He", "They", "It"], 0.03),
        ([], ["\n\n", "\n"], 0.03),
        ([], plain, 0.8),
        ([], [" 7", " 12", " 1999", " 40"], 0.03),
        ([" Golden"], plain, 0.2),
        ([], plain, 0.03),
        ([" walk", " talk", " sing", " jump", " look", " kick", " bark"], ["ing", "ing"], 0.03),
        ([], plain, 0.02),
    ]  # fmt: skip
    rows: dict[str, list[dict[str, Any]]] = {"features": [], "examples": [], "passages": []}
    for feature, (before, peaks, density) in enumerate(forms):
        for rank in range(20):
            example(rows, feature, 0 if rank < 10 else 5, rank % 10, 5.0, draw.choice(peaks), plain, draw)
            shown, passage = rows["examples"][-1], rows["passages"][-1]
            edges = [0, *passage["ends"]]
            tokens = [passage["text"][edges[i] : edges[i + 1]] for i in range(40)]
            if before:
                tokens[shown["peak"] - 1] = draw.choice(before)
            if feature == 8:
                tokens[shown["peak"] - 2], tokens[shown["peak"] + 2] = " suspension", " river"
            passage["text"] = "".join(tokens)
            passage["ends"] = [sum(map(len, tokens[: i + 1])) for i in range(40)]
        row = record(feature, 1000, 5.0, [], [], 64, draw)
        row |= {"density": density, "fires_tokens": [], "fires_shares": [], "positions": [100] * 10}
        if feature == 10:
            row["positions"] = [900, 100, *[0] * 8]
        rows["features"].append(row)
    told = manifest(len(forms))
    told["positions"] = [1000, *[111_000] * 9]
    return Atlas.open(write_tables(folder, {n: pa.Table.from_pylist(r, SCHEMAS[n]) for n, r in rows.items()}, told))


def test_forms_are_called_what_they_are(tmp_path: Path) -> None:
    found = [entry.text for entry in proposals.propose(formal(tmp_path))]
    assert found[:7] == [
        "comma ,",
        "punctuation",
        "after a comma",
        "start of line",
        "line breaks",
        "almost everywhere",
        "numbers",
    ]
    assert found[7] == 'on many tokens: after "golden"'
    assert found[8] == "text about river, suspension"
    assert found[9] == "-ing, a part of words"
    assert found[10] == "first token of a text"


def test_words_of_two_scripts() -> None:
    assert list(proposals.words("The Golden-Gate isn't 金门大桥, ok 桥")) == [
        "the", "golden", "gate", "isn't", "金门", "门大", "大桥", "ok", "桥",
    ]  # fmt: skip


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_commands(atlas: Atlas, tmp_path: Path) -> None:
    where = ["--atlas", str(atlas.folder)]
    code, _, err = lancet("names", "list", *where)
    assert code == 1 and "`lancet names auto` proposes some" in err
    code, out, err = lancet("names", "auto", *where)
    assert code == 0 and "proposed 63 names" in out and "1 never fired" in out
    given = lines(tmp_path / "x.jsonl", neuronpedia(3, modelId="made-up", layer="2-sae"), neuronpedia(4), "{")
    code, out, err = lancet("names", "import", given, *where)
    assert code == 0 and out.startswith("took in 1 explanations of 1 of the 64 features")
    assert "refused 1 of gpt2-small/6-res-jb" in err and "1 lines could not be read (x.jsonl line 3: no JSON)" in err
    code, out, err = lancet("names", "list", "3", *where)
    assert code == 0 and len(out.splitlines()) == 3 and "fires on: bridge" in out
    code, out, err = lancet("names", "list", *where, "--search", "BRIDGE", "--json")
    assert [entry["feature"] for entry in json.loads(out)] == [3, 5, 7]
    code, out, err = lancet("names", "list", *where, "--limit", "2")
    assert len(out.splitlines()) == 3 and "2 of 63" in err
    code, out, err = lancet("names", "list", *where, "--source", "import")
    assert len(out.splitlines()) == 2
    code, out, err = lancet("names", "export", str(tmp_path / "all.jsonl"), *where, "--json")
    assert json.loads(out) == {"file": str(tmp_path / "all.jsonl"), "explanations": 64}
    code, out, err = lancet("names", "import", str(tmp_path / "all.jsonl"), *where, "--json")
    assert json.loads(out)["taken"] == 64
    code, out, err = lancet("names", "list", str(SILENT), *where)
    assert code == 2 and f"#{SILENT} has no explanation" in err
    code, out, err = lancet("names", "list", "64", *where)
    assert code == 2 and "#0 to #63" in err
    code, out, err = lancet("names", "list", "--atlas", str(tmp_path))
    assert code == 1 and "holds no atlas" in err


def test_the_pairs_atlas_is_found() -> None:
    code, _, err = lancet("names", "list", "--model", "gpt2-small", "--sae", "mine/sae", "--json")
    assert code == 1 and "`lancet harvest`" in err and "--atlas" in err
    write_atlas(place.default("mine/sae"), 64)
    code, out, _ = lancet("names", "list", "--model", "gpt2-small", "--sae", "mine/sae", "--json")
    assert code == 0 and json.loads(out) == []


def test_nothing_heavy_is_imported(atlas: Atlas) -> None:
    code = (
        "import sys, lancet.cli.names, lancet.atlas.survey, lancet.atlas.proposals, lancet.atlas.importing\n"
        "heavy = {'torch', 'transformers', 'numpy', 'httpx', 'duckdb', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_many_features_are_kept_and_read_quickly() -> None:
    many = [Explanation(i, f"something about bridge number {i}", "auto") for i in range(16384)]
    start = time.process_time()
    explanations.keep(KEY, many)
    assert sum(map(len, explanations.load(KEY).values())) == 16384
    assert time.process_time() - start < 3


def test_every_line_is_found_by_halves() -> None:
    """Features with none, one and several explanations, of many lengths, the first and the last among them."""
    draw = random.Random(0)
    given = [
        Explanation(f, "x" * draw.randint(1, 90), source)
        for f in sorted(draw.sample(range(2000), 300))
        for source in ("a", "b", "c")[: draw.randint(1, 3)]
    ]
    explanations.keep(KEY, given)
    whole = explanations.load(KEY)
    assert sum(map(len, whole.values())) == len(given)
    assert explanations.of(KEY, range(2001)) == whole
    assert explanations.of(KEY, [min(whole), max(whole)]) == {f: whole[f] for f in (min(whole), max(whole))}
