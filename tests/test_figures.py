"""Pictures: real image files whose pixels differ, in every script, or an error and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import random_lab, with_facts

from lancet import figures
from lancet.errors import UsageError
from lancet.lab import Lab

TEXTS = {
    "English": "The Golden Gate Bridge is in San Francisco.",
    "Chinese": "金门大桥在旧金山，柳叶刀。",
    "formulas": "It costs $5 or $x_1^2$ \\frac{1}{2}\n\tand _more_ {here} 🦙.",
}
kinds = pytest.mark.parametrize("kind", ["score", "spectrum"])


@pytest.fixture(scope="module")
def lab(tiny_gpt2: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Lab:
    path = tmp_path_factory.mktemp("facts") / "facts.safetensors"
    return with_facts(random_lab(tiny_gpt2(), d_sae=128), path, [5.0] * 128, 10.0, [0.5] * 30)


def draw(lab: Lab, kind: str, text: str, path: Path) -> Path:
    reading = lab.read(text)
    return reading.plot(path, at=text[4:8] if kind == "spectrum" else None)


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    return imread(path)


@kinds
@pytest.mark.parametrize("name", TEXTS)
def test_a_picture_is_drawn(kind: str, name: str, lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "图.png"
    assert draw(lab, kind, TEXTS[name], path) == path
    assert [file.name for file in path.parent.iterdir()] == ["图.png"]
    image = pixels(path)
    assert path.stat().st_size > 8_000
    assert min(image.shape[:2]) > 200
    assert image[..., :3].std() > 0.05  # not blank
    assert len(set(map(tuple, image[::7, ::7, :3].reshape(-1, 3).tolist()))) > 20


@kinds
def test_other_formats(kind: str, lab: Lab, tmp_path: Path) -> None:
    assert b"<svg" in draw(lab, kind, TEXTS["English"], tmp_path / "a.svg").read_bytes()
    assert draw(lab, kind, TEXTS["English"], tmp_path / "a.PNG").read_bytes()[:4] == b"\x89PNG"


def test_fonts_for_chinese() -> None:
    assert figures.fonts_for("The Bridge, naïve") == (["DejaVu Sans"], "")
    family, note = figures.fonts_for("金门大桥")
    if len(family) > 1:
        assert family[1] in figures.CJK_FONTS
        assert note == ""
    else:
        assert "no installed font has these characters" in note
        assert "fonts-noto-cjk" in note


@kinds
@pytest.mark.parametrize("font", [True, False])
def test_without_a_chinese_font_a_note_is_drawn(
    kind: str, font: bool, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[str] = []
    original = Figure.text
    monkeypatch.setattr(Figure, "text", lambda self, x, y, s, **kw: (drawn.append(s), original(self, x, y, s, **kw))[1])
    monkeypatch.setattr(figures, "CJK_FONTS", ("DejaVu Serif",) if font else ())
    draw(lab, kind, TEXTS["Chinese"], tmp_path / "a.png")
    draw(lab, kind, TEXTS["English"], tmp_path / "b.png")
    assert [text for text in drawn if "no installed font" in text] == drawn
    assert len(drawn) == (0 if font else 1)


@kinds
def test_a_bad_suffix(kind: str, lab: Lab, tmp_path: Path) -> None:
    for name in ("a.xyz", "a", "a.png.txt"):
        with pytest.raises(UsageError, match=r"cannot draw to .*: end its name in one of .*\.png"):
            draw(lab, kind, TEXTS["English"], tmp_path / name)
    assert not list(tmp_path.iterdir())


@kinds
def test_a_folder_that_cannot_be_written(kind: str, lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "file" / "deeper" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(UsageError, match=r"cannot write .* choose a path in a folder that you may write to"):
            draw(lab, kind, TEXTS["English"], path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.png"]
    assert (tmp_path / "file").read_text() == "here"


@kinds
def test_an_error_while_drawing_leaves_nothing(
    kind: str, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    def broken(self: Figure, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", broken)
    (tmp_path / "a.png").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        draw(lab, kind, TEXTS["English"], tmp_path / "a.png")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "old"
    assert not plt.get_fignums()  # nothing is kept in memory either


@kinds
def test_nothing_lit(kind: str, tiny_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    lab = random_lab(tiny_gpt2(), d_sae=16)
    lab.saes[0].b_enc = torch.full((16,), -1e6)
    silent = with_facts(lab, tmp_path / "facts.safetensors", [1.0], 1.0)
    assert draw(silent, kind, TEXTS["English"], tmp_path / "a.png").stat().st_size > 3_000


def test_dense_features_are_drawn_when_asked_for(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[list[str]] = []
    original = Axes.set_yticks
    monkeypatch.setattr(
        Axes,
        "set_yticks",
        lambda self, at, labels=None, **kw: (drawn.append(list(labels or [])), original(self, at, labels, **kw))[1],
    )
    for dense in (False, True):
        reading = lab.read(TEXTS["English"], dense=dense)
        for at in (None, "Gate"):
            drawn.clear()
            reading.plot(tmp_path / "a.png", at=at)
            features = {int(label.split("#")[1].split()[0]) for labels in drawn for label in labels if "#" in label}
            assert features
            assert (min(features) < 30) == dense


def test_the_strongest_features_are_drawn_in_order(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    bars: list[Any] = []
    original = Axes.barh
    monkeypatch.setattr(
        Axes, "barh", lambda self, y, width, **kw: (bars.append(list(width)), original(self, y, width, **kw))[1]
    )
    spot = lab.read(TEXTS["English"]).at("Gate")
    figures.spectrum(spot, tmp_path / "a.png", top=6)
    assert bars == [[lit.value for lit in spot.top(6)]]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_pareto_front_has_a_number_and_a_name_for_each(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    from lancet.evaluation.decoder import Similarity
    from lancet.evaluation.scores import Evaluation, Histogram, Losses, Scores

    def scores(i: int, recovered: float | None) -> Scores:
        losses = Losses(3, 3.1, 9, recovered, 0.1, 2000)
        name = f"release-of-$x_1$/layer_12/width_{2**i}k/average_l0_{i}/" + "a_long_end" * (i % 4)
        density, alike = Histogram((0.0, 1.0), (1,), 0), Similarity(0.3, 0.1, 0.0, 9)
        return Scores(name, name, "", "a", "a", "topk", 9, 2000, 0.9, 0.9, 0, 10.0 * 2**i, 0.9, density, losses, alike)

    some = [scores(i, 0.8 + 0.02 * i - 0.1 * (i == 2)) for i in range(count)]
    found = Evaluation("模型", "text", 2000, (*some, scores(9, None)))
    assert [each.l0 for each in found.front] == [10.0 * 2**i for i in range(count) if i != 2]
    drawn: list[tuple[Any, Any]] = []
    save = Figure.savefig

    def kept(self: Any, *args: Any, **more: Any) -> None:
        self.canvas.draw()
        drawn.extend((text.get_text(), text.get_window_extent()) for text in self.axes[0].texts)
        save(self, *args, **more)

    monkeypatch.setattr(Figure, "savefig", kept)
    path = found.plot(tmp_path / "front.png")
    assert pixels(path)[..., :3].std() > 0.05
    assert len(drawn) == 4 * count  # in the plot; in the list number, name and figures
    for i, (text, box) in enumerate(drawn):
        for other, beside in drawn[:i]:
            assert not box.overlaps(beside), (text, other)
    empty = Evaluation("model", "text", 2000, (scores(0, None),))
    with pytest.raises(UsageError, match="nothing to draw"):
        empty.plot(tmp_path / "none.png")
    with pytest.raises(UsageError, match="cannot draw to"):
        found.plot(tmp_path / "front.doc")
    assert [file.name for file in tmp_path.iterdir()] == ["front.png"]
