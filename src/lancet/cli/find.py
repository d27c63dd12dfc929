"""`lancet find`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lancet.cli import show
from lancet.errors import UsageError
from lancet.files import text_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lancet.cli.opening import Choice
    from lancet.find import Candidate, Found

WIDE, WIDEST = 120, 180  # columns of a terminal from which every figure has room, and the logit lens too
FIGURES = ["AUROC", "unlike", "F1", "token F1", "elsewhere", "nats", "says it", "output"]
SHORT = ["AUROC", "F1", "says it"]  # of those, where there is little room


def run(
    words: str | None,
    like: list[str],
    unlike: list[str],
    files: tuple[Path | None, Path | None],
    at: str | None,
    top: int,
    together: int,
    blend: int,
    causes: bool,
    choice: Choice,
    json: bool,
) -> None:
    like, unlike = (
        [*given, *([] if file is None else text_lines(file))] for given, file in zip((like, unlike), files, strict=True)
    )
    if words is not None and (like or unlike or at is not None):
        raise UsageError("words bring their own sentences: give words alone, or --like with --unlike and --at")
    if words is None and not like:
        raise UsageError("no example; give --like SENTENCE (several) or --like-file FILE, or words: lancet find WORDS")
    lab = choice.open()
    told = []
    for sae in lab.saes:
        with show.working("finding"):
            found = lab.find(
                like if words is None else words,
                unlike,
                at,
                sae=sae.site,
                top=top,
                together=together,
                blend=blend,
                causes=causes,
                say=show.say,
            )
        told.append(found.to_json())
        if json:
            continue
        if len(lab.saes) > 1:
            show.heading(f"{sae.name} at {sae.site}")
        table(found)
        show.say("; ".join(found.notes))
    if json:
        show.as_json(told[0] if len(told) == 1 else told)
    else:
        show.say("; ".join(lab.model.notes))


def table(found: Found) -> None:
    """The candidates, those that say the words, what the few detect together, the baselines and the blend."""
    apart = ", ".join(found.says) or "none"
    _listed(found.candidates, f"{len(found.like)} examples; words that set them apart: {apart}")
    if found.sayers:
        _listed(found.sayers, f"beside them, the features that most make the model say {found.asked}")
    adds = ", ".join(f"#{f} {a:.3f}" for f, a in zip(found.together, found.adds, strict=True))
    show.line(f"together, AUROC as each joins: {adds}")
    show.line("beside it, AUROC: " + ", ".join(f"{name} {value:.3f}" for name, value in found.baselines.items()))
    if found.parts:
        parts = " + ".join(f"{weight:.3g} * #{feature}" for feature, weight in found.parts)
        show.line(f"blend that causes it: {parts}")
    if found.candidates:
        best = found.candidates[0]
        seen = "; ".join(f"{e.token} ({e.value:.1f})" for e in best.where[:6])
        show.line(f"#{best.feature} fires in {len(best.where)} of {len(found.like)} examples: {seen}")


def _listed(candidates: Sequence[Candidate], title: str) -> None:
    width = show.console().width if sys.stdout.isatty() else WIDEST
    wide, widest = width >= WIDE, width >= WIDEST
    unlike = any(c.unlike_auroc is not None for c in candidates)
    chosen = [name for name in (FIGURES if wide else SHORT) if name != "unlike" or unlike]
    rows = [
        [
            f"#{c.feature}{'-' if c.sign < 0 else ''} {c.name or c.described}".rstrip(),
            c.does,
            *(figures(c)[name] for name in chosen),
            c.fires,
            c.says,
            *([c.logits] if widest else []),
        ]
        for c in candidates
    ]
    head = ["feature", "does", *chosen, "fires on", "makes it say", *(["logit lens"] if widest else [])]
    show.table(head, rows, right=FIGURES, title=title)


def figures(c: Candidate) -> dict[str, str]:
    """Every figure of a candidate as it is printed, empty where it was not measured."""
    return {
        "AUROC": f"{c.auroc:.3f}",
        "unlike": "" if c.unlike_auroc is None else f"{c.unlike_auroc:.3f}",
        "F1": f"{c.f1:.2f}",
        "token F1": f"{c.token_f1:.2f}",
        "elsewhere": f"{c.elsewhere:.1%}",
        "nats": "" if c.lens is None else f"{c.lens:+.2f}",
        "says it": "" if c.mention is None else f"{c.mention:.1%}",
        "output": "" if c.output is None else f"{c.output:.2f}",
    }
