"""The picture of an evaluation: sparsity against what the model loses, and the SAEs than which none is better."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from lancet.errors import UsageError
from lancet.figures import ACCENT, GREY, INK, PALE, PAPER, _finish, _plain, _pyplot, fonts_for

if TYPE_CHECKING:
    from lancet.evaluation.scores import Evaluation

LINE = 0.3  # inches of a line of the list beside the plot
WIDE = 58  # characters of a line of a name
SPREAD = 20  # times the smallest L0 from which the axis is logarithmic


def front(found: Evaluation, path: Path) -> Path:
    """L0 against loss recovered, a numbered point for each SAE, the Pareto front in colour; names stand in a list
    beside the plot, where the longest have room.

    Raises:
        UsageError: the path cannot be written, or no SAE has a loss recovered.
    """
    shown = sorted((each for each in found.saes if each.recovered is not None), key=lambda each: each.l0)
    shown = [each for each in shown if math.isfinite(each.recovered or 0.0)]
    if not shown:
        raise UsageError("there is nothing to draw: no SAE has a loss recovered")
    best = found.front
    names = [_folded(each.name) for each in shown]
    family, note = fonts_for("".join(names) + found.model)
    plt = _pyplot()
    with plt.rc_context({"font.family": family}):
        height = max(4.2, 0.9 + 2 * LINE * len(shown))
        figure, axes = plt.subplots(figsize=(6.4, height), facecolor=PAPER)
        axes.set_facecolor(PAPER)
        steps = ([each.l0 for each in best], [each.recovered for each in best])
        axes.plot(*steps, color=ACCENT, linewidth=1.2, drawstyle="steps-post", zorder=1)
        row = LINE / (height * axes.get_position().height)  # of the axes' height
        for i, each in enumerate(shown):
            colour, top = ACCENT if each in best else GREY, 1 - 2 * i * row
            axes.scatter(each.l0, each.recovered, s=190, color=colour, edgecolors=PAPER, zorder=2)
            place = {"ha": "center", "va": "center", "zorder": 3}
            axes.annotate(str(i + 1), (each.l0, each.recovered), color=PAPER, fontsize=8, **place)
            axes.text(1.04, top, str(i + 1), transform=axes.transAxes, fontsize=10, color=colour, va="top")
            told = f"L0 {each.l0:.1f}, recovered {each.recovered:.3f}, explained {each.explained_variance:.3f}"
            for down, text, tone, size in ((0.0, names[i], INK, 10), (0.8, told, GREY, 8)):
                at = (1.09, top - (down + 0.58 * names[i].count("\n") * (down > 0)) * row)
                axes.text(*at, text, transform=axes.transAxes, color=tone, fontsize=size, va="top")
        low, high = shown[0].l0, shown[-1].l0
        if low > 0 and high > SPREAD * low:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(0.12)
        axes.set_xlabel("L0, features lit at a token", fontsize=9, color=INK)
        axes.set_ylabel("loss recovered", fontsize=9, color=INK)
        axes.tick_params(length=0, labelsize=9, colors=INK)
        axes.grid(color=PALE, linewidth=0.5)
        axes.set_axisbelow(True)
        title = f"{_shortened(found.model, WIDE)}: {found.tokens:,} tokens"
        axes.set_title(_plain(title), loc="left", fontsize=11, color=INK)
        return _finish(figure, axes, path, note)


def _folded(name: str) -> str:
    """A name in two lines where one is too short for it."""
    name = _shortened(name, 2 * WIDE)
    at = name.rfind("/", max(0, len(name) - WIDE - 1), WIDE) + 1 or WIDE  # before a part of it, where both lines allow
    parts = (name[:at], name[at:]) if len(name) > WIDE else (name,)
    return "\n".join(_plain(part) for part in parts)


def _shortened(name: str, most: int) -> str:
    """A name with its middle left out where it is long: beginning and end tell SAEs apart."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
