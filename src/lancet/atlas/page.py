"""Cards as one page of HTML that needs nothing else: no network, no scripts, light and dark.

Tokens, names and texts come from corpora and from other people's files: every one of them is escaped, and the page
forbids itself to run or load anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from lancet.atlas.atlas import Example
from lancet.atlas.card import POSITIONS, Card, Neighbour
from lancet.files import whole_file

HEIGHT, BAR = 56, 8  # of a chart, and of a column of it, in pixels

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --paper: #fbfaf7; --grey: #6b717b; --line: #e2dfd6;
  --accent: 200 69 45; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e4dc; --paper: #171b21; --grey: #9aa0aa; --line: #2c323b; --accent: 226 104 78; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.5rem; margin: 2.4rem 0 .2rem; } h1 small { font-weight: 400; color: var(--grey); font-size: 1rem; }
h2 { font-size: .95rem; margin: 1.5rem 0 .4rem; color: var(--grey); font-weight: 600; }
article + article { border-top: 1px solid var(--line); margin-top: 3rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1.2rem; margin: 1rem 0; }
dt { color: var(--grey); } dd { margin: 0; overflow-wrap: anywhere; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 3rem; } figure { margin: .6rem 0; }
figcaption { color: var(--grey); font-size: .82rem; } svg { display: block; overflow: visible; }
rect { fill: rgb(var(--accent)); } line { stroke: var(--line); }
code { font: 13px/1.5 ui-monospace, "Noto Sans Mono", "Noto Sans CJK SC", monospace; background: var(--line);
  padding: 0 .25em; border-radius: 3px; white-space: pre; } small { color: var(--grey); }
.example { display: grid; grid-template-columns: 4rem 1fr; gap: .8rem; padding: .3rem 0;
  border-top: 1px solid var(--line); }
.example > small { text-align: right; font-variant-numeric: tabular-nums; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { background: rgb(var(--accent) / calc(var(--s) * .75)); border-radius: 3px; }
.text .peak { outline: 1.5px solid rgb(var(--accent)); font-weight: 600; }
"""


def write(cards: Sequence[Card], path: Path) -> Path:
    """Writes a page of cards.

    Raises:
        UsageError: the path cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(page(cards), encoding="utf-8")
    return path


def page(cards: Sequence[Card]) -> str:
    """The page as text."""
    title = ", ".join(f"#{card.feature} {card.name}".rstrip() for card in cards)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<body>\n{''.join(_card(card) for card in cards)}</body>\n</html>\n"
    )


def _card(card: Card) -> str:
    record, told = card.record, card.manifest
    out = [
        f'<article id="f{card.feature}"><h1>#{card.feature} {escape(card.name)} '
        f"<small>{escape(told.where)}</small></h1>"
    ]
    out += [f"<p>{escape(e['text'])} <small>{escape(_source(e))}</small></p>" for e in card.explanations]
    rows: list[tuple[str, str]] = []
    if not record.fired:
        rows.append(("fires", f"never in {told.tokens:,} tokens"))
    else:
        rows.append(("fires", f"on {record.density:.3%} of {told.tokens:,} tokens ({record.fired:,})"))
        least = f", minimum {record.minimum:.3g}" if record.minimum < 0 else ""
        rows.append(("strength", f"mean {record.mean:.3g}, maximum {record.maximum:.3g}{least}"))
        rows.append(("fires on", _tokens(record.fires_tokens, (f"{share:.0%}" for share in record.fires_shares))))
    for lens, label in (("effect", "makes likelier (nats)"), ("logit", "logit lens")):
        for way, name in (("up", label), ("down", "less likely")):
            tokens, values = getattr(record, f"{lens}_{way}"), getattr(record, f"{lens}_{way}_values")
            if tokens:
                rows.append((name, _tokens(tokens, (f"{value:+.2f}" for value in values))))
    if card.agreement:
        rows.append(("lenses", escape(card.agreement)))
    if card.near:
        rows.append(("near", _beside(card.near, "{0.amount:.2f}")))
    if card.together:
        counted = f" <small>of {record.together_fired:,} firings counted</small>"
        rows.append(("together", _beside(card.together, "{0.amount:.1%} ± {0.error:.1%}") + counted))
    out.append(f"<dl>{''.join(f'<dt>{label}</dt><dd>{text}</dd>' for label, text in rows)}</dl>")
    first, last = card.filled()
    if last > first:
        steps = [f"from {card.edge(i):.3g}" for i in range(first, last)]
        ends = f"{card.edge(first):.2g} to {card.edge(last):.2g}"
        sizes = _chart(record.histogram[first:last], steps, "{:,}", f"firings by activation, {ends}")
        places = [f"position {place}" for place in POSITIONS]
        most = f"share of tokens that fire, by position from 1 to 512 on; at most {max(card.rates):.2%}"
        out.append(f'<div class="charts">{sizes}{_chart(card.rates, places, "{:.3%}", most)}</div>')
    for band, examples in card.by_band():
        out.append(f"<h2>{escape(card.band(band))}</h2>{''.join(map(_example, examples))}")
    return "".join(out) + "</article>\n"


def _source(told: dict[str, object]) -> str:
    score = told["score"]
    return str(told["source"]) + (f", score {score:.2f}" if isinstance(score, float) else "")


def _tokens(tokens: Iterable[str], values: Iterable[str]) -> str:
    return " ".join(f"<code>{escape(t)}</code> <small>{v}</small>" for t, v in zip(tokens, values, strict=True))


def _beside(neighbours: Iterable[Neighbour], amount: str) -> str:
    parts = []
    for n in neighbours:
        what = escape(n.name) if n.name else " ".join(f"<code>{escape(token)}</code>" for token in n.fires[:2])
        parts.append(f"#{n.feature} {what} <small>{amount.format(n)}</small>")
    return " · ".join(parts)


def _chart(values: Sequence[float], labels: Sequence[str], number: str, caption: str) -> str:
    """Columns, each with what it is and holds as its title."""
    most, width = max(values, default=0) or 1, (BAR + 2) * len(values)
    bars = []
    for i, (value, label) in enumerate(zip(values, labels, strict=True)):
        tall = max(1.0, HEIGHT * value / most) if value else 0.0
        bars.append(
            f'<rect x="{i * (BAR + 2)}" y="{HEIGHT - tall:.1f}" width="{BAR}" height="{tall:.1f}"><title>{label}: '
            f"{number.format(value)}</title></rect>"
        )
    told = escape(caption)
    return (
        f'<figure><svg width="{width}" height="{HEIGHT}" role="img" aria-label="{told}"><line x1="0" x2="{width}" '
        f'y1="{HEIGHT}" y2="{HEIGHT}"/>{"".join(bars)}</svg><figcaption>{told}</figcaption></figure>'
    )


def _example(example: Example) -> str:
    spans = []
    pieces, peak = example.pieces()
    for i, (text, share) in enumerate(pieces):
        if share < 0.01 and i != peak:
            spans.append(escape(text))
        else:
            kind = ' class="peak"' if i == peak else ""
            value = f"{share * example.value:.3g}"
            spans.append(f'<span{kind} style="--s:{share:.2f}" title="{value}">{escape(text)}</span>')
    return f'<div class="example"><small>{example.value:.3g}</small><div class="text">{"".join(spans)}</div></div>'
