"""Cards: in a terminal of any width, in a pipe, as a page that runs nothing, as a picture and as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fixtures_atlas import KEY, KNOWN, SILENT, write_atlas
from fixtures_edits import save_sae
from rich.cells import cell_len

from lancet import lab as lab_module
from lancet.atlas import place, which
from lancet.atlas.atlas import Atlas, Example
from lancet.atlas.card import cards, share_error
from lancet.atlas.page import page
from lancet.cli import card as card_cli
from lancet.cli import main, show
from lancet.errors import MissingError, UnknownName, UsageError
from lancet.files import data_dir, write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atlas(tmp_path_factory.mktemp("cards") / "atlas")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    """`run(words) -> (code, out, err)` of `lancet card`."""

    def call(*words: str, where: bool = True) -> tuple[int, str, str]:
        show.console.cache_clear()
        show.notes.cache_clear()
        more = ["--atlas", str(folder)] if where else []
        monkeypatch.setattr(sys, "argv", ["lancet", "card", *words, *more])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def give_names(**entries: Any) -> None:
    write_json(data_dir() / "names" / f"{KEY}.json", {"lancet_names": 1, "key": KEY, "names": entries})


def test_in_a_pipe_strength_is_marked_without_colour(run: Any) -> None:
    give_names(bridge={"feature": 3})
    code, out, _ = run("bridge")
    assert code == 0 and "#3 bridge (made-up/sae at blocks.2.hook_resid_pre)" in out
    assert "\x1b" not in out
    assert re.search(r"fires\ton 0\.\d+% of 1,000,000 tokens", out)
    assert "[bridge]" in out or "[Bridge]" in out
    assert "_" in out and "80-100% of the maximum" in out
    assert "the two lenses agree on 2 of 2 words: river, wood" in out
    assert re.search(r"together\t#\d+ \S+ \d+\.\d% ± \d\.\d%", out)


def test_several_features_and_those_that_never_fired(run: Any) -> None:
    _, out, _ = run("12", "#10", str(SILENT))
    assert [line.split()[0] for line in out.splitlines() if line.startswith("#")] == ["#12", "#10", f"#{SILENT}"]
    assert "never in 1,000,000 tokens" in out


def test_json(run: Any) -> None:
    told = json.loads(run("10", "--json")[1])
    assert told["feature"] == 10 and told["fires_tokens"] == KNOWN[10][0] and len(told["histogram"]) == 50
    assert told["near"][0].keys() == {"feature", "name", "fires", "cosine"}
    assert told["together"][0].keys() == {"feature", "name", "fires", "share", "error"}
    share, error = told["together"][0]["share"], told["together"][0]["error"]
    assert error == pytest.approx((share * (1 - share) / told["together_fired"]) ** 0.5)
    assert told["examples"][0]["tokens"][told["examples"][0]["peak"]] in KNOWN[10][0]
    assert [card["feature"] for card in json.loads(run("1", "2", "--json")[1])] == [1, 2]


def test_what_names_no_feature_is_told(run: Any, folder: Path) -> None:
    give_names(bridge={"feature": 3}, mood={"blend": [[1, 0.5], [2, 0.5]]}, gone={"feature": 99})
    atlas = Atlas.open(folder)
    assert which.feature(atlas, " #12 ") == 12 and which.feature(atlas, "bridge") == 3
    with pytest.raises(UnknownName, match="nearest: bridge"):
        which.feature(atlas, "brige")
    with pytest.raises(UsageError, match="lancet card 1 2"):
        which.feature(atlas, "mood")
    for text in ("64", "gone"):
        with pytest.raises(UsageError, match="#0 to #63"):
            which.feature(atlas, text)
    assert run("64")[0] == 2 and run("1", "--examples", "0")[0] == 2
    assert run("1", "2", "--png", "x.png")[0] == 2


def test_which_atlas_is_meant(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingError, match="lancet harvest"):
        which.find("gpt2-small")
    assert run("1", "--model", "gpt2-small", where=False)[0] == 1
    harvested = write_atlas(place.default("gpt2-small-res-jb/blocks.6.hook_resid_pre"), 16)
    assert which.find("gpt2-small").folder == harvested
    assert which.find("gpt2-small", ["blocks.6.hook_resid_pre"]).folder == harvested
    assert which.find("gpt2-small", ["gpt2-small-res-jb/blocks.6.hook_resid_pre"]).folder == harvested
    assert run("1", "--model", "gpt2-small", where=False)[0] == 0
    sae = tmp_path / "mine"
    inside = write_atlas(sae / "atlas", 16)
    assert which.find("any", [str(sae)]).folder == inside
    monkeypatch.setattr("lancet.loading.assets", lambda: tmp_path)
    (tmp_path / "smollm2" / "blocks.12.hook_resid_pre").mkdir(parents=True)
    (tmp_path / "smollm2" / "blocks.12.hook_resid_pre" / "cfg.json").write_text("{}")
    bundled = write_atlas(tmp_path / "smollm2" / "blocks.12.hook_resid_pre" / "atlas", 16)
    assert which.find("smollm2").folder == which.find("smollm2", ["resid_pre.12"]).folder == bundled


def test_an_atlas_of_another_sae_in_a_folder_of_the_same_name(tmp_path: Path) -> None:
    from lancet.loading import sae_from_folder
    from lancet.namefile import key
    from lancet.sae import random_sae
    from lancet.site import Site

    saes = [save_sae(tmp_path / f"{seed}" / "mine", random_sae(8, 16, seed=seed, site=Site(2))) for seed in (0, 1)]
    harvested = write_atlas(place.default("mine"), 16, key=key(sae_from_folder(saes[0])))
    assert which.find("any", [str(saes[0])]).folder == harvested
    with pytest.raises(MissingError, match="no atlas of"):
        which.find("any", [str(saes[1])])


def test_a_labs_atlas(monkeypatch: pytest.MonkeyPatch) -> None:
    from lancet.sae import random_sae
    from lancet.site import Site

    sae = random_sae(8, 16, site=Site(2))
    lab = object.__new__(lab_module.Lab)
    lab.saes, lab._shipped, lab._atlas = [sae], {}, None
    assert lab.atlas is None
    from lancet.namefile import key

    write_atlas(place.default(sae.name), 16, key="b" * 24)
    assert lab.atlas is None, "an atlas of other weights under the same name"
    write_atlas(place.default(sae.name), 16, key=key(sae))
    assert lab.atlas is not None and lab.atlas is lab.atlas and lab.atlas.belongs(lab)


def test_a_card_opens_no_model(folder: Path) -> None:
    code = (
        "import sys; from lancet.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: sys.exit(e.code or int('torch' in sys.modules or 'pyarrow' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "card", "3", "--atlas", str(folder)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---- widths ----------------------------------------------------------------------------------------------------------


def example(tokens: list[str], peak: int) -> Example:
    strengths = [2.0 if i == peak else 1.0 if i == peak - 1 else 0.0 for i in range(len(tokens))]
    return Example(3, 0, 0, 2.0, 1, "".join(tokens), tuple(tokens), tuple(strengths), peak)


@pytest.mark.parametrize("width", [20, 33, 60, 500])
@pytest.mark.parametrize(
    "tokens", [["走", "过", "了", "金门", "大桥", "，", "去", "看", "海"] * 3, [" the", " bridge\n", " x"] * 9]
)
def test_examples_fit_the_terminal(tokens: list[str], width: int) -> None:
    drawn = card_cli.coloured(example(tokens, 13), width)
    assert cell_len(drawn.plain) <= width and "\n" not in drawn.plain
    assert tokens[13].strip() in drawn.plain
    assert "…" in drawn.plain or width == 500
    peak = [span for span in drawn.spans if "underline" in str(span.style)]
    assert [drawn.plain[span.start : span.end] for span in peak] == [tokens[13].strip(" ").replace("\n", "↵")]


def test_a_character_of_several_tokens_has_the_largest_strength() -> None:
    found = Example(3, 0, 0, 2.0, 1, "a桥b", ("a", "桥", "", "", "b"), (0.0, 0.5, 2.0, 1.0, 0.0), 2)
    assert found.pieces() == ([("a", 0.0), ("桥", 1.0), ("b", 0.0)], 1)
    assert card_cli.marked(found) == "a[桥]b"
    assert 'class="peak"' in page_of(found)


def page_of(found: Example) -> str:
    from lancet.atlas.page import _example

    return _example(found)


def test_control_characters_do_not_reach_a_terminal() -> None:
    drawn = card_cli.coloured(example([" a", "\x1b[2J", " b"], 1), 80)
    assert "\x1b" not in drawn.plain


def test_colours_in_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "72")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show.console.cache_clear()
    card_cli.printed(cards(Atlas.open(folder), [10])[0])
    out = capsys.readouterr().out
    show.console.cache_clear()
    assert "\x1b[" in out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert all(cell_len(line) <= 72 for line in plain.splitlines())


def test_sparklines() -> None:
    assert card_cli.spark([0, 1, 4, 8]) == "·▂▅█"
    assert card_cli.spark([]) == "" and card_cli.spark([0, 0]) == "··"
    assert share_error(0.5, 100) == pytest.approx(0.05)


# ---- page and picture ------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """Every element with its attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_runs_and_loads_nothing(folder: Path) -> None:
    give_names(bridge={"feature": 3})
    made = cards(Atlas.open(folder), [12, 3, 10])
    seen = Seen()
    seen.feed(page(made))
    assert not {"script", "img", "b", "iframe", "link", "object"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in ("src", "href")]
    assert seen.tags.count("style") == 1, "a token that ends the style sheet must not"
    assert '"><img src=x onerror=alert(1)>' in seen.text and "<script>" in seen.text and "&amp" in seen.text
    assert "大桥" in seen.text and "#3 bridge" in seen.text
    assert "default-src 'none'" in page(made) and "prefers-color-scheme: dark" in page(made)
    assert "http:" not in page(made) and "https:" not in page(made)


def test_page_and_picture_files(run: Any, tmp_path: Path) -> None:
    code, out, err = run("12", "3", "--html", str(tmp_path / "cards.html"))
    assert (code, out) == (0, "") and "wrote" in err and "</html>" in (tmp_path / "cards.html").read_text()
    for feature in ("12", str(SILENT)):
        assert run(feature, "--png", str(tmp_path / f"{feature}.png"))[0] == 0
        assert (tmp_path / f"{feature}.png").read_bytes()[:4] == b"\x89PNG"
