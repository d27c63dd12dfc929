"""A feature's card as a picture: its figures, its histogram and positions, what it says, its strongest examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.atlas.card import POSITIONS
from lancet.figures import ACCENT, GREY, INK, PALE, PAPER, _finish, _plain, _pyplot, fonts_for

if TYPE_CHECKING:
    from lancet.atlas.atlas import Example
    from lancet.atlas.card import Card

SHOWN = 8  # examples
BEFORE, AFTER = 34, 46  # half-width characters of an example on either side of the peak's beginning
WORDS = 6  # tokens of a lens


def draw(card: Card, path: Path) -> Path:
    """Draws a card.

    Raises:
        UsageError: the path cannot be written.
    """
    plt = _pyplot()
    record = card.record
    examples = [example for _, found in card.by_band() for example in found][:SHOWN]
    text = "".join([card.name, *(e.text for e in examples), *record.fires_tokens, *record.effect_up, *record.logit_up])
    text += "".join(str(explanation["text"]) for explanation in card.explanations)
    family, note = fonts_for(text)
    with plt.rc_context({"font.family": family}):
        figure = plt.figure(figsize=(11, 4.6 + 0.3 * len(examples)), facecolor=PAPER)
        grid = figure.add_gridspec(
            3, 2, height_ratios=[0.75, 1, 0.28 * max(1, len(examples))], hspace=0.45, wspace=0.12
        )
        head, sizes, places, below = (
            figure.add_subplot(part) for part in (grid[0, :], grid[1, 0], grid[1, 1], grid[2, :])
        )
        _head(head, card)
        first, last = card.filled()
        _columns(sizes, record.histogram[first:last] or [0], "firings by activation")
        if last > first:
            ticks = sorted({first, (first + last) // 2, last})
            sizes.set_xticks([t - first - 0.5 for t in ticks], [f"{card.edge(t):.3g}" for t in ticks])
        _columns(places, card.rates, f"share of tokens that fire, by position (most {max(card.rates):.2%})")
        places.set_xticks(range(len(POSITIONS)), POSITIONS, fontsize=7, rotation=30)
        _examples(below, examples)
        return _finish(figure, [head, sizes, places, below], path, note)


def _head(axes: Any, card: Card) -> None:
    record, told = card.record, card.manifest
    axes.set_title(_plain(f"#{card.feature} {card.name}".rstrip()), loc="left", fontsize=15, color=INK, weight="bold")
    lines = [told.where]
    lines += [str(explanation["text"])[:110] for explanation in card.explanations[:1]]
    if record.fired:
        often = f"fires on {record.density:.3%} of {told.tokens:,} tokens"
        lines.append(f"{often}, mean {record.mean:.3g}, maximum {record.maximum:.3g}")
        lines.append(f"fires on: {_listed(record.fires_tokens)}")
    else:
        lines.append(f"never fired in {told.tokens:,} tokens")
    said = record.effect_up or record.logit_up
    if said:
        lines.append(f"makes likelier{'' if record.effect_up else ' (logit lens)'}: {_listed(said)}")
    for row, line in enumerate(lines):
        axes.text(
            0, 1 - row / 4.5, _plain(line), va="top", fontsize=9.5, color=INK if row else GREY, transform=axes.transAxes
        )
    axes.set_axis_off()


def _listed(tokens: Sequence[str]) -> str:
    return ", ".join(token.strip(" ") or repr(token) for token in tokens[:WORDS])


def _columns(axes: Any, values: Sequence[float], title: str) -> None:
    axes.set_facecolor(PAPER)
    axes.bar(range(len(values)), values, color=ACCENT, width=0.8)
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=8, colors=INK)
    axes.set_title(title, loc="left", fontsize=9, color=GREY)


def _examples(axes: Any, examples: Sequence[Example]) -> None:
    """One line each, the peaks below each other in the accent's colour."""
    axes.set_xlim(0, 1)
    axes.set_ylim(max(1, len(examples)) - 0.5, -0.5)
    axes.set_axis_off()
    for row, example in enumerate(examples):
        pieces, at = example.pieces()
        texts = [text.replace("\n", "↵") for text, _ in pieces]
        before, peak, after = "".join(texts[:at]), texts[at], "".join(texts[at + 1 :])
        axes.text(0, row, f"{example.value:.3g}", fontsize=8.5, color=GREY, va="center")
        axes.text(
            0.44, row, _plain(_fitting(before[::-1], BEFORE)[::-1]), fontsize=8.5, color=INK, va="center", ha="right"
        )
        drawn = axes.text(
            0.445, row, _plain(peak.strip(" ") or "␣"), fontsize=8.5, color="white", va="center",
            bbox={"facecolor": ACCENT, "edgecolor": PALE, "linewidth": 0, "pad": 1.5},
        )  # fmt: skip
        axes.annotate(
            _plain(_fitting(after, AFTER)), xy=(1, 0), xycoords=drawn, xytext=(4, 0), textcoords="offset points",
            fontsize=8.5, color=INK, va="bottom",
        )  # fmt: skip


def _fitting(text: str, most: int) -> str:
    """The beginning of a text that takes at most so many half-width columns."""
    from unicodedata import east_asian_width

    for i, character in enumerate(text):
        most -= 2 if east_asian_width(character) in "WF" else 1
        if most < 0:
            return text[:i]
    return text
