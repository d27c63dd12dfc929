"""`--model gpt2-small`, from the command line to the end: fetched from a hub on the loopback, converted by sae-lens,
put into its basis, measured, read, steered, and the demo's whole story told. The weights are random, so the self-test
refuses them unless `--anyway` is given, and what the features are is found there and then."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import save_tiny_gpt2
from fixtures_hub import GPT2, RES_JB, SAES, make_gpt2, make_res_jb, point_at
from loopback import Hub, serving
from safetensors.torch import load_file, save_file

from lancet import background, facts
from lancet.cli import main, show
from lancet.loading import open_model
from lancet.site import Site

TEXT = "The Golden Gate Bridge is located in San Francisco."
LIT = 40  # features that fire on a token, as in a trained SAE
HOW = ("--model", "gpt2-small", "--device", "cpu")


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def make_sparse(root: Path) -> None:
    """Lowers the SAE's encoder bias, so that it lights as few features as a trained one."""
    model = open_model(str(root / GPT2), "cpu", "float32")
    site = Site.parse("blocks.6.hook_resid_pre")
    file = root / SAES / str(site) / "sae_weights.safetensors"
    weights = load_file(file)
    batch = model.batch([model.tokenize(TEXT)])
    x = model.values(batch, [site])[site][batch.content]
    before = (x - x.mean(-1, keepdim=True) - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    weights["b_enc"] -= before.flatten().topk(LIT * len(x)).values[-1]
    save_file(weights, file)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path]]:
    """The hub with GPT-2's exact shape, and a home whose caches all commands share."""
    root = tmp_path_factory.mktemp("hub")
    make_gpt2(root / GPT2)
    make_res_jb(root / SAES / "blocks.6.hook_resid_pre")
    make_sparse(root)
    with serving(root) as hub:
        yield hub, tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path]]:
    """The same with a model of eight small layers under its name."""
    root = tmp_path_factory.mktemp("hub")
    save_tiny_gpt2(root / GPT2, n_layer=8)
    make_res_jb(root / SAES / "blocks.6.hook_resid_pre", d_in=64, d_sae=512)
    make_sparse(root)
    with serving(root) as hub:
        yield hub, tmp_path_factory.mktemp("home")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs a command in this process, on less bundled text than it would read."""
    sentences = background.neutral_sentences()[:100]
    monkeypatch.setattr(facts, "MEASURED_TEXTS", 6)
    monkeypatch.setattr(background, "neutral_sentences", lambda count=100: sentences[:count])

    def call(where: tuple[Hub, Path], *words: str) -> Done:
        hub, home = where
        with monkeypatch.context() as patch:
            point_at(patch, hub.url, home)
            patch.setattr(sys, "argv", ["lancet", *words, *HOW])
            for made in (show.console, show.notes):
                made.cache_clear()
            with pytest.raises(SystemExit) as ended:
                main()
            for made in (show.console, show.notes):
                made.cache_clear()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return call


def read_and_steer(where: tuple[Hub, Path], run: Callable[..., Done]) -> Done:
    """What the first command said."""
    first = done = run(where, "read", TEXT, "--anyway", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["sae"], told["site"]) == (RES_JB, "blocks.6.hook_resid_pre")
    assert "fetching openai-community/gpt2" in done.err and "features never fired there" in done.err
    lit = [token["top"] for token in told["tokens"]]
    assert lit[5] and lit[5][0]["url"].startswith("https://www.neuronpedia.org/gpt2-small/6-res-jb/")

    asked = len(where[0].asked)
    edit = f"#{lit[5][0]['feature']} += 0.5rn"
    done = run(where, "steer", "The cat", edit, "--tokens", "6", "--anyway", "--json")
    assert done.code == 0, done.err
    plain, steered = json.loads(done.out)
    assert steered["edits"] == [edit] and steered["recipe"]["saes"] == [RES_JB]
    assert (plain["name"], plain["edits"]) == ("plain", [])
    assert "measuring" not in done.err and len(where[0].asked) == asked  # all is here now
    return first


def the_whole_story(where: tuple[Hub, Path], run: Callable[..., Done], out: Path) -> None:
    done = run(where, "demo", "--anyway", "--out", str(out), "--json")
    assert done.code == 0, done.err
    told: dict[str, Any] = json.loads(done.out)
    assert {file.name for file in out.iterdir()} == {"score.png", "spectrum.png"}
    found = told["find"]["candidates"]
    assert found and told["fires"][0]["about"]
    best = found[0]["feature"]
    lit = {row["text"]: row["strongest"] for row in told["fires"]}
    assert any(lit.values()), "the feature that was found lights in none of the sentences"
    assert {row["name"] for row in told["steer"]} > {"plain"}
    # Found there and then: the same feature as by the sentences alone, on the same caches.
    examples = [word for line in told["find"]["like"] for word in ("--like", line)]
    again = run(where, "find", *examples, "--at", "Bridge", "--top", "5", "--anyway", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["candidates"][0]["feature"] == best
    # A second telling comes to the same.
    done = run(where, "demo", "--anyway", "--out", str(out), "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["steer"] == told["steer"]


def test_read_and_steer_by_name(tiny: tuple[Hub, Path], run: Callable[..., Done]) -> None:
    read_and_steer(tiny, run)


def test_random_weights_are_refused_without_anyway(tiny: tuple[Hub, Path], run: Callable[..., Done]) -> None:
    refused = run(tiny, "read", TEXT)
    assert refused.code == 1 and not refused.out
    told = refused.err.splitlines()[-1]
    assert told.startswith(f"lancet: {RES_JB} at blocks.6.hook_resid_pre of gpt2-small fails its self-test: ")
    assert "--anyway (anyway=True) opens it all the same" in told


def test_demo_by_name(tiny: tuple[Hub, Path], run: Callable[..., Done], tmp_path: Path) -> None:
    the_whole_story(tiny, run, tmp_path / "out")


@pytest.mark.slow
def test_gpt2_smalls_exact_shape(exact: tuple[Hub, Path], run: Callable[..., Done], tmp_path: Path) -> None:
    first = read_and_steer(exact, run)
    assert "fetching openai-community/gpt2 (249 MB)" in first.err and "of 24,576 features never" in first.err
    the_whole_story(exact, run, tmp_path / "out")
