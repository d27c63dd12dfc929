"""`lancet steer`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lancet.cli import show

if TYPE_CHECKING:
    from lancet.cli.opening import Choice
    from lancet.generate import Sampling
    from lancet.lab import Continuation


def run(
    prompt: str,
    edits: list[str],
    tokens: int,
    plain: bool,
    chat: bool,
    samples: int,
    sampling: Sampling,
    blunt: bool,
    choice: Choice,
    json: bool,
) -> None:
    from lancet.edit import Edit
    from lancet.errors import UsageError

    parsed = [Edit.parse(edit) for edit in edits]  # a typo is told before a model is opened
    if samples < 1:
        raise UsageError(f"--samples must be at least 1, got {samples}")
    lab = choice.open()
    with show.working("measuring"):
        ready = lab.tokenize([{"role": "user", "content": prompt}] if chat else prompt)
        lab.steps(parsed, ready, len(ready) + max(tokens, 0))
    jobs = []
    for seed in range(sampling.seed, sampling.seed + samples):
        jobs += [(ready, None, seed, "plain")] * plain + [(ready, parsed, seed, "steered")]
    with show.working("writing (Ctrl-C ends it early)"):
        rows = lab.run(jobs, tokens, sampling, keep_error=not blunt)
    if json:
        show.as_json([row.to_json() for row in rows])
    else:
        side_by_side(rows, prompt)
        show.say("; ".join(lab.model.notes))


def side_by_side(rows: list[Continuation], prompt: str) -> None:
    """Plain and steered rows beside each other in a wide terminal, under each other elsewhere."""
    if not sys.stdout.isatty():
        for row in rows:
            print(f"{row.name}\t{row.sampling.seed}\t{row.ended}\t{(prompt + row.text)!r}"[:100_000])
        return
    from rich import box
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    console = show.console()
    panels = []
    for row in rows:
        text = Text(prompt, style="dim") + Text(row.text, style="bold" if row.name == "steered" else "")
        title = "plain" if not row.edits else ", ".join(row.edits)
        style = "green" if row.edits else "white"
        shape = box.ROUNDED if show.can_show("─╭") else box.ASCII
        subtitle = f"seed {row.sampling.seed}" + (f", {row.ended}" if row.ended != "length" else "")
        panels.append(Panel(text, title=Text(title), subtitle=subtitle, border_style=style, box=shape))
    if console.width >= 100:
        console.print(Columns(panels, equal=True, expand=True, width=console.width // 2 - 2))
    else:
        for panel in panels:
            console.print(panel)
