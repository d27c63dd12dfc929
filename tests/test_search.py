"""Searching an atlas: what fires, what says, Chinese without spaces, names and descriptions, and the kept index."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures_atlas import KEY, write_atlas

from lancet.atlas import card, explanations, index, terms
from lancet.atlas.atlas import Atlas
from lancet.atlas.explanations import Explanation
from lancet.atlas.search import Hit, search
from lancet.cli import main, show
from lancet.errors import UsageError
from lancet.files import data_dir, write_json


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path_factory.getbasetemp() / "search-cache"))


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(write_atlas(tmp_path_factory.mktemp("searched") / "atlas"))


def found(atlas: Atlas, query: str, **more: Any) -> dict[int, Hit]:
    return {hit.feature: hit for hit in search(atlas, query, **more)}


def test_terms() -> None:
    assert terms.terms("The Bridges_of 金门大桥!") == [
        "the",
        "bridge",
        "of",
        "金",
        "门",
        "大",
        "桥",
        "金门",
        "门大",
        "大桥",
    ]
    assert terms.terms("glass bus this ＡＢＣ") == ["glass", "bus", "this", "abc"]
    assert terms.asked("Golden 桥") == [("golden", ["golden"]), ("桥", ["桥"])]
    assert terms.covered("bridges", ["bridge"]) == ["bridges"]
    assert terms.covered("金门大桥", ["金门", "大桥", "大"]) == ["金门", "大桥"]
    assert terms.covered("金门大桥", ["门大", "大桥"]) == ["门大桥"]
    assert terms.covered("金门大桥", ["桥"]) == ["桥"] and terms.covered("bridge", []) == []


@pytest.mark.parametrize(
    ("text", "token", "word"),
    [
        ("the old bridges of", " brid", "bridges"),
        ("the old bridges of", "ges", "bridges"),
        ("the old bridges of", " old", "old"),
        ("走过金门大桥去", "门", "金门大"),
        ("他 says 桥", "桥", "桥"),
        ("a, b", ", ", ","),
        ("a  b", "  ", ""),
        ("走过桥去", "", "过桥去"),
    ],
)
def test_the_word_around_a_token(text: str, token: str, word: str) -> None:
    begin = text.index(token) if token else text.index("去")  # a token of no characters is part of the one before
    assert terms.around(text, begin, begin + len(token)) == word


def test_what_fires_what_says_and_what_only_has_examples(atlas: Atlas) -> None:
    hits = found(atlas, "bridges")
    assert {feature: hit.does for feature, hit in hits.items()} == {
        3: "fires", 7: "fires and says", 5: "says", 9: "examples only",
    }  # fmt: skip
    assert next(iter(hits)) == 7 and list(hits)[-1] == 9
    assert hits[3].fires == ("bridges",) and hits[3].says == ()
    assert [hit.feature for hit in search(atlas, "word20")] == [20]
    assert next(iter(found(atlas, "rope cable"))) == 5
    assert next(iter(found(atlas, "arch bridge"))) == 7, "a feature with both words goes first"
    assert search(atlas, "xylophone") == []
    assert len(search(atlas, "and", top=3)) == 3


def test_chinese_needs_no_spaces(atlas: Atlas) -> None:
    assert found(atlas, "大桥")[10].does == "fires"
    assert found(atlas, "江水")[10].says == ("江", "水")
    assert "风景" in "".join(found(atlas, "看风景")[10].about)
    assert next(iter(found(atlas, "金门大桥"))) == 10


def test_names_and_descriptions_are_searched_as_they_are_now(atlas: Atlas) -> None:
    file = data_dir() / "names" / f"{KEY}.json"
    assert 20 not in found(atlas, "harbour")
    write_json(
        file, {"lancet_names": 1, "key": KEY, "names": {"old_harbour": {"feature": 20}, "mood": {"blend": [[1, 1]]}}}
    )
    hit = found(atlas, "harbours")[20]
    assert (hit.does, hit.name, hit.named) == ("name only", "old_harbour", ("harbours",))

    explanations.keep(KEY, [Explanation(21, "words about lighthouses", "auto")])
    explanations.keep(KEY, [Explanation(2, "lighthouses too", "ask: x", 0.9)])
    hits = found(atlas, "lighthouse")
    assert hits.keys() == {21, 2} and hits[21].does == "description only"
    assert hits[21].description == "words about lighthouses"
    assert card.explanations(KEY, 2) == ({"text": "lighthouses too", "source": "ask: x", "score": 0.9},)


def test_the_index_is_built_once_and_again_for_another_manifest(tmp_path: Path) -> None:
    folder = write_atlas(tmp_path / "atlas", 16)
    atlas = Atlas.open(folder)
    said: list[str] = []
    assert found(atlas, "bridge", say=said.append).keys() == found(atlas, "bridge", say=said.append).keys()
    assert said == ["building the index of 16 features (once)"]
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"shard_tokens": 1}))
    search(Atlas.open(folder), "bridge", say=said.append)
    assert len(said) == 2
    (index.place(atlas) / "fires.scores.npy").write_bytes(b"damaged")
    assert 3 in found(Atlas.open(folder), "bridge", say=said.append) and len(said) == 3


def test_a_cache_that_cannot_be_written_costs_only_time(atlas: Atlas, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path / "file"))
    assert 3 in found(atlas, "bridge")


@pytest.mark.parametrize("query", ["", "  ", "...", "_"])
def test_a_query_without_words_is_refused(atlas: Atlas, query: str) -> None:
    with pytest.raises(UsageError, match="holds no word"):
        search(atlas, query)


def test_the_command(atlas: Atlas, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        show.console.cache_clear()
        show.notes.cache_clear()
        monkeypatch.setattr(sys, "argv", ["lancet", "search", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    where = ("--atlas", str(atlas.folder))
    code, out, _ = run("bridge", "--top", "2", *where)
    assert code == 0 and out.splitlines()[0].startswith("feature\tdoes\tfires on") and len(out.splitlines()) == 3
    told = json.loads(run("大桥", "--json", *where)[1])
    assert told[0]["feature"] == 10 and told[0]["fires"] == ["大桥"] and "大桥" in told[0]["fires_tokens"]
    assert "fires: bridge; says: bridge" in run("stone bridge", *where)[1]
    code, out, err = run("xylophone", *where)
    assert (code, out) == (0, "") and "nothing in made-up/sae" in err
    assert run(*where)[0] == 2 and run("a", "--like", "b")[0] == 2 and run("bridge", "--top", "0", *where)[0] == 2
