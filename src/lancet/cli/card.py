"""`lancet card`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lancet.cli import show
from lancet.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from lancet.atlas.atlas import Atlas, Example
    from lancet.atlas.card import Card, Neighbour
    from lancet.cli.opening import Choice

MARGIN = 10  # columns before an example's text: its value
FAINT = 0.25  # of the peak's strength: from here on a token is marked where there are no colours
PALE, DEEP, INK, PAPER = (251, 227, 214), (200, 69, 45), "#1d2733", "#ffffff"


def run(
    features: list[str],
    folder: Path | None,
    many: int,
    html: Path | None,
    png: Path | None,
    choice: Choice,
    json: bool,
) -> None:
    from lancet.atlas import which
    from lancet.atlas.card import cards

    if many < 1:
        raise UsageError(f"--examples must be at least 1, got {many}")
    if png is not None and len(features) > 1:
        raise UsageError(f"--png draws one card, and {len(features)} were asked for; give one feature")
    atlas = opened(choice, folder)
    made = cards(atlas, [which.feature(atlas, text) for text in features], many, min(many, 4))
    if html is not None:
        from lancet.atlas.page import write

        show.say(f"wrote {write(made, html)}")
    if png is not None:
        from lancet.card_picture import draw

        show.say(f"drew {draw(made[0], png)}")
    if json:
        told = [card.to_json() for card in made]
        show.as_json(told[0] if len(told) == 1 else told)
    elif html is None and png is None:
        for card in made:
            printed(card)


def opened(choice: Choice, folder: Path | None) -> Atlas:
    """The atlas in a folder, else that of the pair chosen; no model is opened."""
    from lancet.atlas import which

    if folder is not None:
        return which.find("", folder=folder)
    full = choice.named()
    assert full.model is not None
    return which.find(full.model, full.saes)


def printed(card: Card) -> None:
    """A whole card."""
    show.heading(" ".join(filter(None, [f"#{card.feature}", card.name, f"({card.manifest.where})"])))
    _rows(list(facts(card)))
    if not card.record.fired:
        return
    for band, examples in card.by_band():
        show.heading(card.band(band))
        for example in examples:
            show_example(example)


def facts(card: Card) -> list[tuple[str, str]]:
    """(label, text) of everything but the examples."""
    record, told = card.record, card.manifest
    out = [(_source(e["source"], e["score"]), str(e["text"])) for e in card.explanations]
    if not record.fired:
        out.append(("fires", f"never in {told.tokens:,} tokens"))
    else:
        out.append(("fires", f"on {record.density:.3%} of {told.tokens:,} tokens ({record.fired:,})"))
        least = f", minimum {record.minimum:.3g}" if record.minimum < 0 else ""
        out.append(("strength", f"mean {record.mean:.3g}, maximum {record.maximum:.3g}{least}"))
        first, last = card.filled()
        if last > first:
            drawn = spark(record.histogram[first:last])
            out.append(("firings", f"{card.edge(first):.3g} {drawn} {card.edge(last):.3g} (by activation)"))
        out.append(("position", f"1 {spark(card.rates)} 512 on (share of tokens there, most {max(card.rates):.2%})"))
        out.append(("fires on", _pairs(record.fires_tokens, [f"{s:.0%}" for s in record.fires_shares])))
    for label, lens, unit in (("says", "effect", "nats"), ("logit lens", "logit", "logits")):
        up, down = (getattr(record, f"{lens}_{way}") for way in ("up", "down"))
        values = [[f"{v:+.2f}" for v in getattr(record, f"{lens}_{way}_values")] for way in ("up", "down")]
        if up:
            out.append((label, f"{_pairs(up, values[0])} ({unit})"))
        if down:
            out.append((f"{label}, less" if label == "says" else "less", _pairs(down, values[1])))
    if card.agreement:
        out.append(("lenses", card.agreement))
    if card.near:
        out.append(("near", ";  ".join(f"{_beside(n)} {n.amount:.2f}" for n in card.near)))
    if card.together:
        counted = f"of {record.together_fired:,} firings counted"
        out.append(("together", ";  ".join(f"{_beside(n)} {_share(n)}" for n in card.together) + f" ({counted})"))
    return out


def _source(source: str, score: float | None) -> str:
    return f"{source} ({score:.2f})" if score is not None else source


def _pairs(tokens: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{show.visible(t.strip(' ') or t)} {v}" for t, v in zip(tokens, values, strict=True))


def _beside(neighbour: Neighbour) -> str:
    what = neighbour.name or ", ".join(show.visible(t.strip(" ") or t) for t in neighbour.fires[:2])
    return f"#{neighbour.feature} {what}".rstrip()


def _share(neighbour: Neighbour) -> str:
    sign = "±" if show.can_show("±") else "+-"
    return f"{neighbour.amount:.1%} {sign} {neighbour.error or 0:.1%}"


def spark(values: Sequence[float]) -> str:
    """Values as characters of rising height, relative to the largest; a dot where there is nothing."""
    steps = "▁▂▃▄▅▆▇█" if show.can_show("▁▂▃▄▅▆▇█") else "_.-=+*%#"
    most = max(values, default=0.0)
    return "".join(
        ("·" if show.can_show("·") else " ") if v <= 0 else steps[min(len(steps) - 1, int(v / most * len(steps)))]
        for v in values
    )


def _rows(rows: Sequence[tuple[str, str]]) -> None:
    """Label and text; in a terminal the text wraps beside its label."""
    if not sys.stdout.isatty():
        for label, text in rows:
            print(f"{label}\t{text}".replace("\n", "\\n"))
        return
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", max_width=24)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(Text(show.harmless(label)), Text(show.harmless(text)))
    show.console().print(grid)


# ---- examples ----------------------------------------------------------------------------------------------------


def show_example(example: Example) -> None:
    """An example on one line: its value and as much of the window as there is room for around the peak."""
    if not sys.stdout.isatty():
        print(f"{example.value:.3g}\t{marked(example)}")
        return
    from rich.text import Text

    line = Text().append(f"{example.value:>{MARGIN - 2}.3g}  ", style="dim")
    line.append_text(coloured(example, show.console().width - MARGIN))
    show.console().print(line, no_wrap=True, overflow="crop")


def marked(example: Example) -> str:
    """The window where there are no colours: [the peak], _other tokens that fire_."""
    out = []
    shown, peak = _shown(example)
    for i, (token, strength) in enumerate(shown):
        body = token.strip(" ")
        if body and (i == peak or strength >= FAINT):
            ends = "[]" if i == peak else "__"
            token = token.replace(body, f"{ends[0]}{body}{ends[1]}", 1)
        out.append(token)
    return "".join(out).strip(" ")


def coloured(example: Example, width: int) -> Text:
    """The window as styled text of at most `width` columns: background by strength, the peak underlined too."""
    from rich.cells import cell_len
    from rich.text import Text

    shown, peak = _shown(example)
    sizes = [cell_len(token) for token, _ in shown]
    dots = "…" if show.can_show("…") else ".."
    first, last = around(sizes, peak, width - 2 * cell_len(dots))
    out = Text(dots if first else "", style="dim")
    for i in range(first, last):
        token, strength = shown[i]
        lead = token[: len(token) - len(token.lstrip(" "))] if token.strip(" ") else ""
        out.append(lead)
        out.append(token[len(lead) :], style=style(strength, i == peak))
    out.append(dots if last < len(shown) else "", style="dim")
    return out


def _shown(example: Example) -> tuple[list[tuple[str, float]], int]:
    """An example's pieces as they may be printed, and which is the peak."""
    mark = "↵" if show.can_show("↵") else "\\n"
    pieces, peak = example.pieces()
    return [(show.harmless(text.replace("\n", mark).replace("\t", " ")), share) for text, share in pieces], peak


def around(sizes: Sequence[int], peak: int, width: int) -> tuple[int, int]:
    """First and end of the tokens around the peak that take at most `width` columns; the peak always."""
    first, last, room = peak, peak + 1, width - sizes[peak]
    while True:
        grown = False
        if first > 0 and sizes[first - 1] <= room:
            first -= 1
            room -= sizes[first]
            grown = True
        if last < len(sizes) and sizes[last] <= room:
            room -= sizes[last]
            last += 1
            grown = True
        if not grown:
            return first, last


def style(strength: float, peak: bool) -> str:
    """A background from pale to deep, and ink that can be read on it in a light and in a dark terminal."""
    if strength < 0.02:
        return "bold underline" if peak else ""
    mixed = (round(a + (b - a) * min(1.0, strength)) for a, b in zip(PALE, DEEP, strict=True))
    ink = PAPER if strength > 0.6 else INK
    return f"{'bold underline ' if peak else ''}{ink} on #{''.join(f'{part:02x}' for part in mixed)}"
