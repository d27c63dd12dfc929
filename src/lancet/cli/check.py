"""`lancet check`: the self-test of a pair."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lancet.cli import show

if TYPE_CHECKING:
    from lancet.checkup import Checkup
    from lancet.cli.opening import Choice


def run(file: Path | None, choice: Choice, json: bool) -> None:
    from dataclasses import replace

    from lancet.check import check
    from lancet.files import text_lines

    texts = text_lines(file) if file is not None else None
    lab = replace(choice, anyway=True).open()  # what is to be tested is not refused before it was
    done = []
    for sae in lab.saes:
        with show.working(f"testing {sae.name}"):
            done.append(check(lab.model, sae, texts))
    if json:
        show.as_json([checkup.to_json() for checkup in done])
    else:
        for checkup in done:
            told(checkup)
        show.say("; ".join(lab.model.notes))
    if any(checkup.poor for checkup in done):
        sys.exit(1)


def told(checkup: Checkup) -> None:
    """One table for each pair, and the reasons under it."""
    show.heading(checkup.pair)
    rows = [["fine" if f.fine else "POOR", f.what, f.got, f.wanted] for f in checkup.findings]
    show.table(["", "tested", "got", "wanted"], rows)
    for finding in checkup.poor:
        if finding.why:
            show.line(f"{finding.what}: {finding.why}", "bold red")
    if not checkup.poor:
        show.line("the pair belongs together", "green")
