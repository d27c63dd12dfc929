"""Names: what they stand for against plain vectors, in a new session, beside other processes, after a kill, and out of
files that hold nonsense."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import random_lab, save_sae, with_facts

from lancet import namefile, naming
from lancet.cli import main, show
from lancet.errors import DamagedError, MismatchError, UnknownName, UsageError
from lancet.lab import Lab
from lancet.model import Model
from lancet.naming import Kept
from lancet.sae import random_sae
from lancet.site import Site

BLEND = [[3, 0.5], [4, -2.0]]
CONCEPTS: dict[str, Any] = {"music": {"feature": 7}, "mood": {"feature": 3, "blend": BLEND, "dose_rn": 0.45}}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@pytest.fixture(scope="module")
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2()


@pytest.fixture
def lab(model: Model, tmp_path: Path) -> Lab:
    return with_facts(random_lab(model, d_sae=64), tmp_path / "f.safetensors", [5.0] * 64, 20.0, concepts=CONCEPTS)


def again(lab: Lab) -> Lab:
    """A later session: the same weights under another name, and nothing of the old lab."""
    sae = random_sae(64, 64, site=lab.sae().site)
    sae.name = "somewhere/else"
    return Lab(lab.model, [sae], lab._shipped)  # type: ignore[arg-type]


def row(lab: Lab, index: int) -> torch.Tensor:
    return lab.sae().W_dec[index]


def test_what_names_stand_for_here_and_in_a_later_session(lab: Lab) -> None:
    lab.name("bridge", 12)
    lab.name("span", "bridge")
    lab.name("pair", [(1, 0.25), (2, -3)])
    lab.name("tender", "pair - 2 * bridge + mood")
    lab.name("way", lab.direction("unit(#5)"))
    lab.name("on", "way + bridge")
    expected = {
        "bridge": row(lab, 12),
        "span": row(lab, 12),
        "pair": 0.25 * row(lab, 1) - 3 * row(lab, 2),
        "tender": 0.25 * row(lab, 1) - 3 * row(lab, 2) - 2 * row(lab, 12) + 0.5 * row(lab, 3) - 2 * row(lab, 4),
        "way": row(lab, 5) / row(lab, 5).norm(),
        "on": row(lab, 5) / row(lab, 5).norm() + row(lab, 12),
    }
    for session in (lab, again(lab)):
        assert set(session.names) == set(expected)
        for name, vector in expected.items():
            assert torch.allclose(session.direction(name).vector, vector, atol=1e-5), name
        assert session.feature("span").index == 12
        assert session.feature(12).name == "bridge, span"
        assert session.steps("bridge = 0", session.tokenize("abc"), 4)[0].target[1] == 12  # type: ignore[index]


def test_names_are_an_saes_own(lab: Lab, model: Model) -> None:
    lab.name("bridge", 12)
    other = Lab(model, [random_sae(64, 64, seed=1, site=lab.sae().site)])
    elsewhere = Lab(model, [random_sae(64, 64, site=Site(1))])
    for session in (other, elsewhere):
        with pytest.raises(UnknownName, match="'bridge'; none are known"):
            session.feature("bridge")
    half = random_sae(64, 64, site=lab.sae().site)
    half.W_dec, half.W_enc = half.W_dec.half().float(), half.W_enc.half().float()
    stored = random_sae(64, 64, site=lab.sae().site)
    stored.W_dec, stored.W_enc = half.W_dec.half(), half.W_enc.half()
    assert namefile.key(half) == namefile.key(stored) != namefile.key(lab.sae())


def test_a_name_keeps_its_meaning_whatever_becomes_of_others(lab: Lab) -> None:
    lab.name("love", 1)
    lab.name("tender", "love - 0.5 * music")
    before = lab.direction("tender").vector
    lab.name("love", 2, force=True)
    lab.name("music", 9)
    lab.name("love", "love + tender", force=True)  # no circle: it is its own old meaning
    assert torch.equal(lab.direction("tender").vector, before)
    assert torch.allclose(lab.direction("love").vector, row(lab, 2) + before, atol=1e-6)
    lab.forget("love")
    assert torch.equal(lab.direction("tender").vector, before)
    assert str(naming.load(lab.sae()).entries["tender"]) == "love - 0.5 * music"
    assert naming.load(lab.sae()).entries["tender"].expression == "#1 - 0.5 * #7"


def test_taken_names(lab: Lab) -> None:
    assert lab.name("bridge", 12) == ""
    lab.name("bridge", "#12")  # the same thing again
    with pytest.raises(UsageError, match="bridge is taken: it stands for #12; choose another name, or --force"):
        lab.name("bridge", 13)
    assert lab.feature("bridge").index == 12
    lab.name("bridge", 13, force=True)
    assert lab.feature("bridge").index == 13


def test_the_cards_names_give_way_and_come_back(lab: Lab) -> None:
    assert lab.feature("music").index == 7
    assert lab.name("music", 9) == "music was a concept of the SAE's card, #7"
    assert lab.name("mood", 8) == "mood was a concept of the SAE's card, a blend of 2 features"
    assert (lab.feature("music").index, lab.feature("mood").index) == (9, 8)
    assert lab.forget("music") == "#9"
    assert lab.feature("music").index == 7
    with pytest.raises(UnknownName, match="unknown name 'music'; known: mood"):
        lab.forget("music")


def test_targets_and_names_that_cannot_be(lab: Lab) -> None:
    for bad, hint in (
        ("two words", "such as two_words"),
        ("3d", ""),
        ("", ""),
        ("a-b", "such as a_b"),
        ("a\u0301b\u0301", ""),
    ):
        with pytest.raises(UsageError, match=f"is not a name; use letters.*{hint}"):
            lab.name(bad, 0)
    for target, said in (
        (64, "no feature #64"),
        ("#64", "no feature #64"),
        ("brdge", "unknown feature name 'brdge'"),
        ("#1 +", "cannot read the expression"),
        ([(1, float("nan"))], "finite weights"),
        ([], "one or more"),
        (lab.direction("#1 - #1"), "zero vector"),
    ):
        with pytest.raises(UsageError, match=said):
            lab.name("wrong", target)  # type: ignore[arg-type]
    assert lab.names == {}
    lab.name("cafe\u0301", 3)
    assert lab.feature("caf\u00e9").index == lab.feature("cafe\u0301").index == 3
    assert lab.direction("2 * caf\u00e9").norm == pytest.approx(2 * float(row(lab, 3).norm()))


def test_several_saes(model: Model) -> None:
    first, second = (random_sae(64, 64, seed=i, site=Site(i)) for i in (1, 2))
    lab = Lab(model, [first, second])
    lab.name("bridge", 12)
    lab.name("gate", "resid_pre.2#5")
    lab.name("mix", "resid_pre.2#5 - gate * 3")
    Lab(model, [second]).name("bridge", 6)
    assert torch.equal(lab.direction("bridge").vector, first.W_dec[12])
    assert torch.equal(lab.direction("resid_pre.2#bridge").vector, second.W_dec[6])
    assert lab.feature("gate").site == Site(2)
    assert torch.allclose(lab.direction("mix").vector, -2 * second.W_dec[5])
    assert torch.allclose(Lab(model, [second]).direction("mix").vector, -2 * second.W_dec[5])
    with pytest.raises(UsageError, match="never mix"):
        lab.name("wrong", "bridge + gate")
    with pytest.raises(UnknownName, match="'gate'"):
        lab.direction("resid_pre.1#gate")


def test_doses(lab: Lab) -> None:
    sae, concepts = lab.sae(), lab.facts().concepts
    assert naming.dose_of(sae, "mood") is None
    assert naming.dose_of(sae, "mood", concepts) == "0.45rn"
    assert naming.dose_of(sae, "music", concepts) is None
    lab.name("bridge", 12)
    lab.name("tender", "bridge - #1")
    naming.keep_dose(sae, "bridge", "0.5rn")
    naming.keep_dose(sae, "mood", "2x")
    naming.keep_dose(sae, "tender", "0.3rn")
    naming.keep_dose(sae, "bridge - #2", "7")
    later = again(lab).sae()
    assert [naming.dose_of(later, t) for t in (12, "#12", "bridge")] == ["0.5rn"] * 3  # of the feature, however named
    assert naming.dose_of(later, "mood", concepts) == "2x"
    assert naming.dose_of(later, "tender") == "0.3rn"
    assert naming.dose_of(later, "bridge - #2") == naming.dose_of(later, "#12 - #2") == "7"
    lab.name("bridge", 13, force=True)
    lab.name("tender", 14, force=True)
    assert [naming.dose_of(sae, t) for t in ("bridge", "tender", "bridge - #2", 12)] == [None, None, None, "0.5rn"]
    naming.keep_dose(sae, 12, "")
    assert naming.dose_of(sae, 12) is None
    with pytest.raises(UsageError, match="is not an amount"):
        naming.keep_dose(sae, 12, "lots")


def test_readings_tell_names(lab: Lab) -> None:
    reading = lab.read("The cat sat", top=3)
    feature = reading.spot([1]).top(1)[0].feature
    lab.name("cat_like", feature)
    reading = lab.read("The cat sat", top=3)
    assert reading.spot([1]).top(1)[0].name == "cat_like"
    assert reading.to_json()["tokens"][0]["top"][0]["name"] == "cat_like"


# ---- files -----------------------------------------------------------------------------------------------------------


def test_out_and_in_again(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, target in (("a", 1), ("b", [(1, 0.1), (2, 3.0)]), ("c", "a - b"), ("d", lab.direction("unit(#3)"))):
        lab.name(name, target)  # type: ignore[arg-type]
    naming.keep_dose(lab.sae(), "c", "0.4rn")
    vectors = {name: lab.direction(name).vector for name in "abcd"}
    assert naming.export(lab.sae(), tmp_path / "out.json") == 4
    monkeypatch.setenv("LANCET_DATA", str(tmp_path / "another person"))
    assert lab.names == {}
    lab.name("a", 1)
    assert naming.take_in(lab.sae(), tmp_path / "out.json") == ["a", "b", "c", "d"]
    assert all(torch.equal(lab.direction(name).vector, vector) for name, vector in vectors.items())
    assert naming.dose_of(lab.sae(), "c") == "0.4rn"
    lab.name("a", 2, force=True)
    lab.name("e", 5)
    with pytest.raises(UsageError, match=r"1 of the names in .* are taken: a stands for #2, there for #1"):
        naming.take_in(lab.sae(), tmp_path / "out.json")
    assert lab.feature("a").index == 2
    naming.take_in(lab.sae(), tmp_path / "out.json", force=True)
    assert (lab.feature("a").index, lab.feature("e").index) == (1, 5)


def vector(count: int, value: float = 1.0) -> str:
    return base64.b64encode(torch.full((count,), value).numpy().tobytes()).decode()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: [], "no object"),
        (lambda told: told | {"lancet_names": 2}, "lancet_names"),
        (lambda told: told | {"names": []}, "must be objects"),
        (lambda told: told | {"names": {"a b": {"feature": 1}}}, "is not a name"),
        (lambda told: told | {"names": {"a": {"feature": 64}}}, "a: 64 is no feature"),
        (lambda told: told | {"names": {"a": {"feature": True}}}, "is no feature"),
        (lambda told: told | {"names": {"a": {"feature": "1"}}}, "is no feature"),
        (lambda told: told | {"names": {"a": {}}}, "must have one of"),
        (lambda told: told | {"names": {"a": {"feature": 1, "blend": [[1, 1]]}}}, "must have one of"),
        (lambda told: told | {"names": {"a": {"feature": 1, "more": 1}}}, "must have one of"),
        (lambda told: told | {"names": {"a": {"feature": 1, "said": 1}}}, "said must be text"),
        (lambda told: told | {"names": {"a": {"blend": []}}}, "a blend is a list"),
        (lambda told: told | {"names": {"a": {"blend": [[1, float("nan")]]}}}, "is not \\[feature, weight\\]"),
        (lambda told: told | {"names": {"a": {"blend": [[64, 1]]}}}, "is no feature"),
        (lambda told: told | {"names": {"a": {"expression": "#1 +"}}}, "cannot read"),
        (lambda told: told | {"names": {"a": {"expression": "#1 + #64"}}}, "#64 is no feature"),
        (lambda told: told | {"names": {"a": {"expression": "a + #1"}}}, "a is no feature"),
        (lambda told: told | {"names": {"a": {"vector": vector(3)}}}, "3 numbers, this SAE's have 64"),
        (lambda told: told | {"names": {"a": {"vector": vector(64, float("inf"))}}}, "not finite"),
        (lambda told: told | {"names": {"a": {"vector": "%%"}}}, "does not hold names: a"),
        (lambda told: told | {"doses": {"#1": 3}}, "must be text"),
        (lambda told: told | {"doses": {"#1": "lots"}}, "the dose of #1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nonsense_is_refused_and_changes_nothing(lab: Lab, tmp_path: Path, change: Any, said: str) -> None:
    lab.name("kept", 3)
    naming.export(lab.sae(), tmp_path / "good.json")
    told = json.loads((tmp_path / "good.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps(change(told)))
    with pytest.raises(DamagedError, match=said):
        naming.take_in(lab.sae(), tmp_path / "bad.json")
    assert list(lab.names) == ["kept"]


def test_files_that_are_no_names(lab: Lab, model: Model, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("no JSON")
    with pytest.raises(DamagedError, match="not valid JSON"):
        naming.take_in(lab.sae(), tmp_path / "text.json")
    with pytest.raises(UsageError, match="no file"):
        naming.take_in(lab.sae(), tmp_path / "none.json")
    other = random_sae(64, 64, seed=1)
    naming.give(other, "bridge", Kept(feature=1))
    naming.export(other, tmp_path / "other.json")
    with pytest.raises(MismatchError, match="names of another SAE"):
        naming.take_in(lab.sae(), tmp_path / "other.json")
    lab.name("a", 1)
    namefile.path(lab.sae()).write_text("{}")
    with pytest.raises(DamagedError, match="delete it to begin anew"):
        lab.direction("a")


def test_a_folder_that_cannot_be_written(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LANCET_DATA", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"cannot write .*; set LANCET_DATA"):
        lab.name("a", 1)


def child(work: Callable[[], None]) -> int:
    """Runs something in another process and returns how that ended."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


@needs_fork
def test_a_kill_between_write_and_rename_leaves_the_old_names(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = random_sae(8, 16)
    naming.give(sae, "old", Kept(feature=1))

    def killed() -> None:
        monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        naming.give(sae, "new", Kept(feature=2))

    assert os.WTERMSIG(child(killed)) == signal.SIGKILL
    assert set(naming.load(sae).entries) == {"old"}
    naming.give(sae, "newer", Kept(feature=3))  # the dead process's lock went with it
    assert set(naming.load(sae).entries) == {"old", "newer"}


@needs_fork
def test_several_processes_lose_none() -> None:
    sae = random_sae(8, 16)
    pids = []
    for worker in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                for i in range(5):
                    naming.give(sae, f"name_{worker}_{i}", Kept(feature=i))
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert len(naming.load(sae).entries) == 20


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., tuple[int, str, str]]:
    folder = save_sae(tmp_path / "sae", random_sae(64, 64, site=Site(2)))
    from lancet.facts import Facts

    Facts(torch.full((64,), 5.0), torch.zeros(64), 10.0, 1000, concepts=CONCEPTS).save(folder / "facts.safetensors")

    def call(*words: str) -> tuple[int, str, str]:
        where = ["--model", model.name, "--sae", str(folder), "--device", "cpu", "--dtype", "float32", "--anyway"]
        monkeypatch.setattr(sys, "argv", ["lancet", *words, *where])
        show.console.cache_clear()
        show.notes.cache_clear()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_the_command(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert run("name", "12", "bridge")[1].startswith("bridge is #12 of ")
    code, out, err = run("name", "2 * bridge - #3", "music")
    assert (code, out.startswith("music is 2 * bridge - #3 of ")) == (0, True)
    assert "music was a concept of the SAE's card, #7; `lancet name --remove music` brings that back" in err
    code, _, err = run("name", "13", "bridge")
    assert (code, "bridge is taken: it stands for #12" in err) == (2, True)
    assert run("name", "13", "bridge", "--force")[0] == 0
    told = json.loads(run("name", "--list", "--json")[1])
    assert [(t["name"], t["stands_for"], t["whose"], t["hidden"]) for t in told] == [
        ("bridge", "#13", "yours", False),
        ("music", "2 * #12 - #3", "yours", False),
        ("music", "#7", "card", True),
        ("mood", "0.5 * #3 + -2 * #4", "card", False),
    ]
    assert told[3]["dose"] == "0.45rn"
    assert "card, hidden by yours" in run("name", "--list")[1]
    assert "#13" in run("name", "bridge")[1]
    assert json.loads(run("name", "13", "--json")[1])[0]["name"] == "bridge"
    assert run("name", "--export", str(tmp_path / "names.json"))[1].startswith("wrote 2 names of ")
    assert run("name", "--remove", "bridge")[1] == "bridge no longer stands for #13\n"
    assert "took in 2 names: bridge, music" in run("name", "--import", str(tmp_path / "names.json"))[1]
    assert "music is a concept of the SAE's card again" in run("name", "--remove", "music")[2]
    wrong = ("", "--list --remove bridge", "12 x --list", "brige", "14", "--remove nothing", "1 a-b", "64 far")
    for words in (["name", *line.split()] for line in wrong):
        code, out, err = run(*words)
        assert (code, out) == (2, ""), words
        assert err.startswith("lancet: "), words
    assert "nearest: bridge" in run("name", "brige")[2]
