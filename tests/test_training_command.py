"""`lancet train` as a command: its options are the settings, what it makes is read by `lancet read`, and its table."""
# ruff: noqa: F811 - fixtures of another file

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import Done, documented, folders, run  # noqa: F401 - fixtures

from lancet.cli import show
from lancet.cli.train import Board
from lancet.training.config import TrainConfig, helps, option
from lancet.training.progress import HEAD, Row

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "list", "of", "value"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, draw = tmp_path_factory.mktemp("corpus") / "c.jsonl", random.Random(0)
    path.write_text("".join(json.dumps({"body": " ".join(draw.choices(WORDS, k=20))}) + "\n" for _ in range(40)))
    return path


@pytest.fixture
def train(run: Callable[..., Done], folders: tuple[str, str], corpus: Path) -> Callable[..., Done]:
    """Runs the command on the corpus with a model."""
    model = ["--model", folders[0], "--device", "cpu", "--dtype", "float32"]
    return lambda *words: run("train", str(corpus), *words, *model, bare=True)


def test_train_then_read(train: Callable[..., Done], run: Callable[..., Done], tmp_path: Path) -> None:
    settings = tmp_path / "t.toml"
    settings.write_text('field = "body"\nsites = "resid_pre.1"\nfeatures = 64\nk = 5\nbatch = 64\nlr = "fast"\n')
    words = ["--config", str(settings), "--tokens", "0.6k", "--k", "6", "--lr", "1e-3", "--length", "32"]
    done = train(*words, "--out", str(tmp_path / "sae"), "--json")
    assert done.code == 0, done.err
    assert "memory: 0." in done.err and "step 9 of 9, tokens 576" in done.err and "explained" in done.err
    (told,) = done.json
    assert set(told) <= documented("lancet train CORPUS... --json") and told["folder"] == str(tmp_path / "sae")
    assert told["config"]["k"] == [6] and told["config"]["features"] == [64] and told["tokens"] == 576
    read = run("read", "the cat sat", "--sae", str(tmp_path / "sae"), "--anyway", "--json")
    assert read.code == 0 and read.json["site"] == "blocks.1.hook_resid_pre"
    again = train(*words, "--out", str(tmp_path / "sae"))
    assert again.code == 2 and "finished SAE; choose another --out" in again.err


def test_several(train: Callable[..., Done], tmp_path: Path) -> None:
    words = ["--field", "body", "--site", "resid_pre.1", "--site", "resid_pre.2", "--seed", "1", "--seed", "2"]
    words += ["--features", "64", "--k", "4", "--tokens", "200", "--batch", "64", "--length", "32"]
    done = train(*words, "--out", str(tmp_path / "a"))
    assert done.code == 0, done.err
    made = [f"blocks.{layer}.hook_resid_pre-seed{seed}" for layer in (1, 2) for seed in (1, 2)]
    assert done.out == "".join(f"wrote {tmp_path / 'a' / name}\n" for name in made)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no site: say where the SAE reads with --site"),
        (["--site", "resid_pre.1", "--arch", "topp"], "unknown architecture 'topp'; nearest: topk"),
        (["--site", "resid_pre.99"], "no site blocks.99.hook_resid_pre"),
        (["--site", "resid_pre.1", "--memory", "1MB"], "16,384 features do not fit"),
        (["--site", "resid_pre.1", "--features", "64", "--k", "4"], "the corpus is empty"),  # another field
        (["--config", "none.toml"], "cannot read none.toml"),
    ],
)
def test_mistakes(words: list[str], said: str, train: Callable[..., Done], tmp_path: Path) -> None:
    done = train(*words, "--out", str(tmp_path / "a"))
    assert done.code == 2 and done.out == ""
    assert said in done.err.splitlines()[-1]


def test_options_are_the_settings(run: Callable[..., Done]) -> None:
    page = " ".join(run("train", "--help", bare=True).out.split())
    for each in fields(TrainConfig):
        assert option(each.name) in page
        assert helps()[each.name].split()[0] in page


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(show, "notes", lambda: console)
    board = Board()
    figures = {"loss": 12.345, "l0": 31.98, "explained": 0.8765, "dead": 0.0125}
    board.board([Row("blocks.1[x]", 1200, 5000, 4_915_200, 20_000.0, 780.0, figures)])
    board.step("reading, tokens", 5, 10)
    board.board([Row("blocks.1[x]", 1300, 5000, 5_324_800, 20_000.0, 60.0, figures)])
    board.board([])
    assert board.live is None
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for cell in (*HEAD, "1,200 of 5,000", "4,915,200", "20,000", "13 min", "60 s", "12.35", "32.0", "0.8765", "1.25%"):
        assert cell in shown, cell
    assert "reading, tokens" in shown and "5 of 10" in shown
