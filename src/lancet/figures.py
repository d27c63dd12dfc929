"""Pictures: the spectrum of a token, the score of a text, a feature beside single neurons."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.files import whole_file

if TYPE_CHECKING:
    from lancet.dose import Dose
    from lancet.reading import Reading, Spot
    from lancet.watch import Unit, Watch

CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "Microsoft YaHei", "PingFang SC",
    "Hiragino Sans GB", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Heiti SC", "Noto Sans CJK JP",
    "Arial Unicode MS", "Droid Sans Fallback",
)  # fmt: skip
INK, ACCENT, PAPER = "#1d2733", "#c8452d", "#fbfaf7"
GREY, PALE = "#8a8f98", "#c9c6bb"
MOST_FEATURES = 24
MOST_CONTEXTS = 8


@cache
def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def fonts_for(text: str) -> tuple[list[str], str]:
    """Font families that have the characters of `text`, and a note ("" where all is well).

    Matplotlib falls back glyph by glyph along the list.
    """
    from matplotlib import font_manager

    family = ["DejaVu Sans"]
    wide = {c for c in text if ord(c) >= 0x2E80}
    if not wide:
        return family, ""
    here = {font.name for font in font_manager.fontManager.ttflist}
    found = [name for name in CJK_FONTS if name in here]
    if found:
        return [*family, found[0]], ""
    return family, "no installed font has these characters: install one such as Noto Sans CJK (Debian: fonts-noto-cjk)"


def spectrum(spot: Spot, path: Path, top: int = 15) -> Path:
    """One token's features as bars, strongest first, with each one's share of the reconstruction.

    Raises:
        UsageError: the path cannot be written.
    """
    plt = _pyplot()
    lits = spot.top(top, spot.reading.dense)
    names = [f"#{lit.feature}  {lit.name or lit.fires}".rstrip() for lit in lits]
    family, note = fonts_for(spot.text + "".join(names))
    with plt.rc_context({"font.family": family}):
        figure, axes = plt.subplots(figsize=(9, 1.4 + 0.36 * max(3, len(lits))), facecolor=PAPER)
        axes.set_facecolor(PAPER)
        values = [lit.value for lit in lits]
        axes.barh(range(len(lits)), values, color=[ACCENT, *[INK] * len(lits)][: len(lits)], height=0.66)
        most = max(values, default=1.0)
        for row, lit in enumerate(lits):
            axes.text(
                lit.value + most * 0.01, row, f"{lit.value:.1f}   {lit.share:.0%}", va="center", fontsize=9, color=INK
            )
        axes.set_yticks(range(len(lits)), [_plain(n) for n in names], fontsize=9, color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, most * 1.18)
        axes.set_xlabel("activation   (share of the reconstruction)", color=INK, fontsize=9)
        most_lit, explained = max(spot.lit), sum(spot.explained) / len(spot.explained)
        axes.set_title(
            f"{_plain(spot.text.strip())!r}: {most_lit} of {spot.reading.sae.d_sae:,} features lit, "
            f"{explained:.0%} explained",
            loc="left", fontsize=11, color=INK,
        )  # fmt: skip
        return _finish(figure, axes, path, note)


def score(reading: Reading, path: Path, features: int = MOST_FEATURES) -> Path:
    """The piano roll of a text: features as rows, tokens as columns, strength as colour.

    The features shown are those with the largest activation anywhere in the text, features that fire on more than a
    tenth of all tokens left out unless the reading lists them; rows are in the order in which they first sound.

    Raises:
        UsageError: the path cannot be written.
    """
    import numpy as np

    plt = _pyplot()
    positions = reading.read_positions()
    lits = reading._top(positions, features, reading.dense)
    lits.sort(key=lambda lit: lit.position)
    grid = np.array([[float(v) for v in reading.features.of_feature(lit.feature)[positions]] for lit in lits])
    pieces = [_plain(reading.tokens.piece(p)) for p in positions]
    names = [f"{lit.name or lit.fires}  #{lit.feature}".strip() for lit in lits]
    family, note = fonts_for("".join(pieces + names))
    with plt.rc_context({"font.family": family}):
        width = min(40.0, 3.8 + 0.42 * len(positions))
        figure, axes = plt.subplots(figsize=(width, 1.8 + 0.27 * max(4, len(lits))), facecolor=PAPER)
        shown = np.ma.masked_less_equal(grid.reshape(len(lits), len(positions)), 0)
        axes.set_facecolor("#f1efe8")
        image = axes.pcolormesh(shown, cmap="magma_r", vmin=0, edgecolors=PAPER, linewidth=1.2)
        axes.set_yticks(np.arange(len(lits)) + 0.5, [_plain(n) for n in names], fontsize=8, color=INK)
        axes.set_xticks(np.arange(len(positions)) + 0.5, pieces, rotation=60, ha="right", fontsize=9, color=INK)
        axes.invert_yaxis()
        axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
        bar.set_label("activation", color=INK, fontsize=9)
        bar.outline.set_visible(False)
        axes.set_title(f"{reading.sae.site}, the {len(lits)} strongest features", loc="left", fontsize=11, color=INK)
        return _finish(figure, axes, path, note)


def contrast(watch: Watch, path: Path) -> Path:
    """A feature beside single neurons: scores of the sentences about it and of others, and where else each is strong.

    Raises:
        UsageError: the path cannot be written.
    """
    plt = _pyplot()
    told = [f"{c.before}{c.token}{c.after}" for unit in watch.units for c in unit.contexts]
    family, note = fonts_for("".join(told) + watch.about)
    with plt.rc_context({"font.family": family}):
        size = (5.2 * len(watch.units), 6.4)
        figure, axes = plt.subplots(2, len(watch.units), figsize=size, facecolor=PAPER, squeeze=False)
        figure.subplots_adjust(hspace=0.42, wspace=0.12, top=0.86)
        for unit, upper, lower in zip(watch.units, *axes, strict=True):
            _sentences(upper, watch, unit)
            _elsewhere(lower, unit)
        name = f" {watch.name}" if watch.name else ""
        own, of_own, other, of_other = watch.fired
        figure.suptitle(
            f"#{watch.feature}{_plain(name)} fires in {own} of {of_own} sentences about {_plain(watch.about)} and in "
            f"{other} of {of_other} others",
            x=0.125, ha="left", fontsize=12, color=INK,
        )  # fmt: skip
        return _finish(figure, axes.ravel(), path, note)


def _sentences(axes: Any, watch: Watch, unit: Unit) -> None:
    """One dot a sentence, those about the context above the others."""
    import numpy as np

    scores, own = np.array(unit.scores), np.array([sighting.about for sighting in watch.sightings])
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(scores))
    axes.set_facecolor(PAPER)
    for about, row, colour in ((True, 1, ACCENT), (False, 0, INK)):
        axes.scatter(scores[own == about], row + jitter[own == about], s=22, color=colour, alpha=0.6, linewidths=0)
    axes.axvline((unit.usual + unit.level) / 2, color=ACCENT, linewidth=0.8, linestyle=":")
    axes.set_yticks([1, 0], ["about it", "others"], fontsize=9, color=INK)
    axes.set_ylim(-0.6, 1.6)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.set_title(f"{unit.label}: AUROC {unit.auroc:.3f}", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("strongest activation in the sentence", fontsize=9, color=INK)


def _elsewhere(axes: Any, unit: Unit) -> None:
    """Bars of the strongest other contexts, from the usual value on; coloured where they come half way to the level."""
    axes.set_facecolor(PAPER)
    axes.set_title(
        f"elsewhere: {unit.reached} of {unit.of} other sentences come half way", loc="left", fontsize=10, color=INK
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(MOST_CONTEXTS - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    reach = unit.level - unit.usual
    most = max([reach, *(context.value - unit.usual for context in unit.contexts)])
    for row, context in enumerate(unit.contexts[:MOST_CONTEXTS]):
        above = context.value - unit.usual
        axes.barh(
            row + 0.34, max(0.0, above / most) if most > 0 else 0.0, height=0.12,
            color=ACCENT if above >= reach / 2 else PALE,
        )  # fmt: skip
        drawn = axes.text(0, row, _plain(context.before[-20:]), fontsize=8, color=GREY, va="center")
        for text, style in (
            (context.token, {"color": ACCENT, "weight": "bold"}),
            (context.after[:20], {"color": GREY}),
        ):
            drawn = axes.annotate(_plain(text), xy=(1, 0), xycoords=drawn, fontsize=8, va="bottom", **style)
    if not unit.contexts:
        axes.text(0, 0, "nowhere", fontsize=9, color=INK)


def response(dose: Dose, path: Path) -> Path:
    """The dose-response curve: concept rate, extra surprise and repeats over strength, on the calibration prompts.

    The recommended way is drawn in colour, baselines in grey; the recommended dose is marked, limits are dotted.

    Raises:
        UsageError: the path cannot be written, or no way has a strength that can be drawn.
    """
    from lancet.errors import UsageError

    plt = _pyplot()
    curves = dose.curves()
    if not curves:
        raise UsageError("there is nothing to draw: no edit was swept")
    chosen = dose.chosen
    shown = [
        ("says the concept", lambda row: row.rate, None),
        ("extra surprise, nats a token", lambda row: row.extra, dose.limits.surprise),
        ("repeated 3-grams", lambda row: row.repeats, dose.limits.repeats),
    ]
    family, note = fonts_for("".join(label for label, _ in curves))
    with plt.rc_context({"font.family": family}):
        figure, panels = plt.subplots(1, 3, figsize=(13, 4), facecolor=PAPER)
        for axes, (title, of, limit) in zip(panels, shown, strict=True):
            axes.set_facecolor(PAPER)
            for label, rows in curves:
                mine = chosen is not None and any(row is chosen for _, row in rows)
                ends = [(of(row).low, of(row).high) for _, row in rows]
                at, values = [x for x, _ in rows], [of(row).value for _, row in rows]
                colour = ACCENT if mine else GREY
                axes.plot(
                    at,
                    values,
                    color=colour,
                    marker="o",
                    markersize=3,
                    linewidth=1.8 if mine else 0.9,
                    label=_plain(label),
                )
                if mine:
                    axes.fill_between(at, *zip(*ends, strict=True), color=ACCENT, alpha=0.15, linewidth=0)
                    axes.plot(
                        *next([x, of(row).value] for x, row in rows if row is chosen),
                        color=ACCENT, marker="D", markersize=9, fillstyle="none",
                    )  # fmt: skip
            if limit is not None:
                axes.axhline(limit, color=ACCENT, linewidth=0.8, linestyle=":")
            axes.set_title(title, loc="left", fontsize=10, color=INK)
            axes.set_xlabel(f"strength, {dose.unit}", fontsize=9, color=INK)
            axes.tick_params(length=0, labelsize=9, colors=INK)
            for side in axes.spines.values():
                side.set_visible(False)
        # Beside the panels: a dozen curves leave no corner free.
        panels[-1].legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.02, 1))
        told = f"recommended {chosen.short}" if chosen else "no strength fits the limits"
        figure.suptitle(_plain(f"{dose.called}: {told}"), x=0.01, ha="left", fontsize=11, color=INK)
        return _finish(figure, panels[0], path, note)


def _plain(text: str) -> str:
    """Line breaks made visible, and dollar signs kept from being read as formulas."""
    return text.replace("\n", "↵").replace("$", r"\$")


def _finish(figure: Any, axes: Any, path: Path, note: str) -> Path:
    import warnings

    from lancet.errors import UsageError

    plt = _pyplot()
    for part in axes if isinstance(axes, Iterable) else [axes]:
        for side in part.spines.values():
            side.set_visible(False)
    if note:
        figure.text(0.01, 0.005, note, fontsize=7, color=ACCENT)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        plt.close(figure)
        raise UsageError(f"cannot draw to {path}: end its name in one of {', '.join('.' + k for k in sorted(known))}")
    try:
        with whole_file(path) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a missing glyph is told by the note
            figure.savefig(temporary, dpi=144, bbox_inches="tight", facecolor=PAPER)
    finally:
        plt.close(figure)
    return path
