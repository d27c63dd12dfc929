"""Mixed directions against plain vector arithmetic, and what is told of them against plain loops."""

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

from lancet import background
from lancet.cli import main, show
from lancet.edit import RowChange
from lancet.errors import UnknownName, UsageError
from lancet.grammar import parse_edit, parse_expression
from lancet.lab import Lab
from lancet.model import Model
from lancet.sae import random_sae
from lancet.site import Site

LIKE = ["The cat sat on the mat.", "A dog ran.", "你好，世界 is a greeting"]
UNLIKE = ["    return the value of the list", "No cats here at all, none whatever."]


@pytest.fixture(scope="module")
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2()


@pytest.fixture
def lab(model: Model, tmp_path: Path) -> Lab:
    return with_facts(random_lab(model, d_sae=96), tmp_path / "facts.safetensors", [5.0] * 96, 20.0)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    for name, lines in (("like", LIKE), ("unlike", UNLIKE)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return str(tmp_path / "like.txt"), str(tmp_path / "unlike.txt")


def row(lab: Lab, index: int) -> np.ndarray:
    return lab.sae().W_dec[index].double().numpy()


def means(lab: Lab, texts: list[str]) -> np.ndarray:
    """The mean over texts of the mean value over their tokens, text by text, by transformers' own hidden states."""
    out = []
    for text in texts:
        ids = torch.tensor([lab.tokenize(text).ids])
        states = lab.model.hf(ids, output_hidden_states=True).hidden_states[lab.sae().site.layer]
        out.append(states[0, 1:].detach().double().numpy().mean(0))
    return np.mean(out, 0)


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def without(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - (a @ b) / (b @ b) * b


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("#1 - #2", lambda r: r(1) - r(2)),
        ("2 * (#1 + #2) / 4 - -#3", lambda r: (r(1) + r(2)) / 2 + r(3)),
        ("unit(#1)", lambda r: unit(r(1))),
        ("unit(#1 - 3 * #2) * 0.5", lambda r: unit(r(1) - 3 * r(2)) * 0.5),
        ("without(#1, #2)", lambda r: without(r(1), r(2))),
        ("without(#1 + #2, unit(#2) - #3)", lambda r: without(r(1) + r(2), unit(r(2)) - r(3))),
        ("love - romance", lambda r: r(4) - (0.5 * r(5) + 2 * r(6))),
    ],
)
def test_expressions_are_vector_arithmetic(lab: Lab, text: str, made: Any) -> None:
    lab.name("love", 4)
    lab.name("romance", [(5, 0.5), (6, 2.0)])
    found = lab.direction(text)
    assert np.allclose(found.vector.numpy(), made(lambda i: row(lab, i)), atol=1e-5)
    assert found.recipe == str(parse_expression(text))


def test_mean_differences(lab: Lab, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    like, unlike = files
    expected = means(lab, LIKE) - means(lab, UNLIKE)
    text = f'mean_difference("{like}", "{unlike}")'
    assert np.allclose(lab.direction(text).vector.numpy(), expected, atol=1e-4)
    mixed = lab.direction(f"unit({text}) - 2 * #3").vector.numpy()
    assert np.allclose(mixed, unit(expected) - 2 * row(lab, 3), atol=1e-4)
    monkeypatch.setattr(background, "neutral_sentences", lambda count=0: UNLIKE)
    monkeypatch.setenv("LANCET_CACHE", str(Path(like).parent / "cache"))
    assert np.allclose(lab.direction(f"mean_difference('{like}')").vector.numpy(), expected, atol=1e-4)
    monkeypatch.setattr(lab.model, "values", lambda *_: pytest.fail("measured twice"))
    assert np.allclose(lab.direction(text).vector.numpy(), expected, atol=1e-4)
    monkeypatch.undo()
    Path(like).write_text(UNLIKE[0])  # another state of the file is another direction
    changed = means(lab, UNLIKE[:1]) - means(lab, UNLIKE)
    assert np.allclose(lab.direction(text).vector.numpy(), changed, atol=1e-4)


def test_a_name_keeps_a_mean_difference_when_its_files_are_gone(lab: Lab, files: tuple[str, str]) -> None:
    text = f'mean_difference("{files[0]}", "{files[1]}")'
    vector = lab.direction(text).vector
    lab.name("tone", f"{text} - #2")
    Path(files[0]).unlink()
    assert torch.allclose(lab.direction("tone + #2").vector, vector, atol=1e-5)
    with pytest.raises(UsageError, match=r"cannot read .*like.txt: No such file"):
        lab.direction(text)


def test_the_site_of_a_mean_difference_is_that_of_its_companions(model: Model, files: tuple[str, str]) -> None:
    lab = Lab(model, [random_sae(64, 32, seed=i, site=Site(i)) for i in (1, 3)])
    text = f'mean_difference("{files[0]}", "{files[1]}")'
    assert lab.direction(text).site == Site(1)
    found = lab.direction(f"{text} - resid_pre.3#2")
    only = Lab(model, [lab.saes[1]])
    assert found.site == Site(3)
    assert np.allclose(found.vector.numpy(), means(only, LIKE) - means(only, UNLIKE) - row(only, 2), atol=1e-4)
    with pytest.raises(UsageError, match="never mix"):
        lab.direction("resid_pre.1#2 - resid_pre.3#2")


def test_a_transcoder_and_an_sae_that_write_one_site_mix(model: Model) -> None:
    transcoder = random_sae(64, 32, "transcoder", site=Site(1, "mlp.hook_in"), writes=Site(1, "mlp.hook_out"))
    sae = random_sae(64, 32, seed=1, site=Site(1, "mlp.hook_out"))
    lab = Lab(model, [transcoder, sae])
    found = lab.direction("#3 - blocks.1.mlp.hook_out#4")
    assert torch.allclose(found.vector, transcoder.W_dec[3] - sae.W_dec[4])


@pytest.mark.parametrize("text", ["0.1 * #1 + 0.2 * #1 - 0.3 * #1", "#1 / 3 - #1 / 3", "without(3 * #1, #1)", "#2 * 0"])
def test_what_cancels_is_zero(lab: Lab, text: str) -> None:
    """Rounding is no direction: pushed to some length it would be noise."""
    assert lab.direction(text).norm == 0
    with pytest.raises(UsageError, match="points nowhere"):
        lab.mix(text)
    with pytest.raises(UsageError, match="points nowhere"):
        lab.logits("abc", f"({text}) += 0.5rn")
    assert lab.direction("1e-5 * #1").norm > 0


@pytest.mark.parametrize(
    ("text", "character", "said"),
    [
        ("unit('a.txt')", "'", "unit takes directions, not files' names"),
        ("mean_difference(#1)", "#", "mean_difference takes files' names in quotes"),
        ("without(#1)", "w", "without takes two arguments"),
        ("mean_difference('a', 'b', 'c')", "m", "mean_difference takes one argument or two arguments"),
        ("means('a')", "m", "no function means; there are unit, without and mean_difference"),
        ("#1 - 'a.txt'", "'", "expected"),
        ('mean_difference("a.txt)', '"', "expected"),
    ],
)
def test_mistakes_are_told_at_their_character(text: str, character: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_expression(text)
    _, shown, caret = str(caught.value).split("\n")
    assert caret.index("^") == shown.index(character)


@pytest.mark.parametrize("text", ['mean_difference("a b.txt")', 'without(mean_difference(\'it"s\', "x"), #1) - a'])
def test_functions_of_files_read_back(text: str) -> None:
    tree = parse_expression(text)
    assert parse_expression(str(tree)) == tree
    assert str(parse_edit(f"({text}) += 0.5rn").target) == str(tree)


# ---- what a mix is ---------------------------------------------------------------------------------------------------


def test_a_mix_against_plain_loops(lab: Lab, files: tuple[str, str]) -> None:
    lab.name("love", 4)
    text = f'2 * love - #5 + 0.1 * mean_difference("{files[0]}", "{files[1]}") - #5'
    found = lab.mix(text, near=6, opposed=3, strength=0.5, words=7)
    third = means(lab, LIKE) - means(lab, UNLIKE)
    whole = 2 * row(lab, 4) - 2 * row(lab, 5) + 0.1 * third
    assert found.direction.norm == pytest.approx(np.linalg.norm(whole), rel=1e-4)
    assert found.rn == pytest.approx(np.linalg.norm(whole) / 20, rel=1e-4)
    for part, vector in zip(found.parts, (row(lab, 4), row(lab, 5), third), strict=True):
        assert part.norm == pytest.approx(np.linalg.norm(vector), rel=1e-4)
        assert part.cosine == pytest.approx(unit(whole) @ unit(vector), abs=1e-4)
        assert part.along == pytest.approx(whole @ unit(vector), abs=1e-3)
    assert [part.part for part in found.parts][:2] == ["love", "#5"]
    cosines = {i: float(unit(whole) @ unit(row(lab, i))) for i in range(96)}
    order = sorted(cosines, key=lambda i: -cosines[i])
    assert [x.feature for x in found.nearest] == order[:6]
    assert [x.feature for x in found.opposed] == order[::-1][:3]
    for x in (*found.nearest, *found.opposed):
        assert x.cosine == pytest.approx(cosines[x.feature], abs=1e-4)
        assert x.name == ("love" if x.feature == 4 else "")
    (effect,) = lab.effect(text, 0.5, 7)
    assert (found.effect.promotes, found.effect.suppresses) == (effect.promotes, effect.suppresses)
    assert found.to_json()["parts"][0]["part"] == "love"
    assert len(found.to_frame()) == 9
    assert "#5" in str(found)


def test_a_part_removed_has_no_share(lab: Lab) -> None:
    first, second = lab.mix("without(#1, #2)").parts
    assert first.along > 0
    assert abs(second.along) < 1e-5
    assert lab.mix("#1").parts == ()


def test_a_direction_is_read_like_a_feature(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "neutral_sentences", lambda count=0: [*LIKE, *UNLIKE])
    found = lab.read_direction("The dog sat.", "#1 - 2 * #2")
    v = unit(row(lab, 1) - 2 * row(lab, 2))

    def along(text: str) -> np.ndarray:
        ids = torch.tensor([lab.tokenize(text).ids])
        states = lab.model.hf(ids, output_hidden_states=True).hidden_states[lab.sae().site.layer]
        return states[0].detach().double().numpy() @ v

    own = along("The dog sat.")
    neutral = np.concatenate([along(text)[1:] for text in (*LIKE, *UNLIKE)])
    told = found.to_json()
    assert [t["position"] for t in told["tokens"]] == list(range(1, len(own)))
    assert np.allclose([t["projection"] for t in told["tokens"]], own[1:], atol=1e-3)
    norm = np.linalg.norm(row(lab, 1) - 2 * row(lab, 2))
    assert np.allclose([t["coordinate"] for t in told["tokens"]], own[1:] / norm, atol=1e-4)
    standing = (own[1:] - neutral.mean()) / neutral.std(ddof=1)
    assert np.allclose([t["standing"] for t in told["tokens"]], standing, atol=1e-2)
    assert float(found.standing[0]) == 0
    assert "".join(t["text"] for t in told["tokens"]) == "The dog sat."
    assert list(found.to_frame()["text"]) == [t["text"] for t in told["tokens"]]


def test_a_direction_is_ablated(lab: Lab) -> None:
    """`= 0` removes its component and nothing else."""
    tokens = lab.tokenize("The dog sat.")
    changes = lab.changes("(#1 - #2) = 0", tokens, len(tokens))
    change: RowChange = changes[lab.sae().site]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    after = change.new_value(x, torch.arange(1, 6))
    v = torch.tensor(unit(row(lab, 1) - row(lab, 2)), dtype=torch.float32)
    assert torch.allclose(after @ v, torch.zeros(5), atol=1e-4)
    assert torch.allclose(after, x - (x @ v)[:, None] * v, atol=1e-4)


def test_wrong_requests(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for text, said in (
        (f'mean_difference("{tmp_path}/empty.txt")', "is empty; give one text a line"),
        (f'mean_difference("{tmp_path}/latin.txt")', "it is not UTF-8 text"),
        (f'mean_difference("{tmp_path}")', "cannot read"),
        ("2", "is a number, not a direction"),
        ("#1 * #2", "has no meaning"),
    ):
        with pytest.raises(UsageError, match=said):
            lab.mix(text)
    with pytest.raises(UnknownName, match="feature name 'nothing'"):
        lab.mix("nothing - #1")
    with pytest.raises(UsageError, match="near and words must be at least 1"):
        lab.mix("#1", near=0)


def test_the_command(
    lab: Lab, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = save_sae(tmp_path / "sae", lab.sae())
    (folder / "facts.safetensors").write_bytes((tmp_path / "facts.safetensors").read_bytes())
    where = ["--model", lab.model.name, "--sae", str(folder), "--device", "cpu", "--dtype", "float32", "--anyway"]

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lancet", *words, *where])
        show.console.cache_clear()
        show.notes.cache_clear()
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    text = f'#1 - mean_difference("{files[0]}", "{files[1]}")'
    told = json.loads(run("mix", text, "--json")[1])
    lab.sae().name = "sae"
    assert told == lab.mix(text).to_json()
    shown = run("mix", text, "--near", "2")[1]
    assert f"length {told['norm']:.3f}" in shown
    assert "promotes\tnats\tsuppresses" in shown
    told = json.loads(run("read", "The dog sat.", "--direction", "#1 - #2", "--json")[1])
    assert told["direction"] == "#1 - #2"
    assert f"{told['tokens'][2]['projection']:+.2f}" in run("read", "The dog sat.", "--direction", "#1 - #2")[1]
    code, out, err = run("read", "The dog sat.", "--direction", "#1 -")
    assert (code, out) == (2, "")
    assert "cannot read the expression" in err
    assert run("read", "The dog sat.", "--direction", "#1", "--at", "dog")[0] == 2
