"""`lancet find`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lancet.cli import show
from lancet.errors import UsageError

if TYPE_CHECKING:
    from lancet.cli.opening import Choice
    from lancet.find import Candidate, Found


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
    from lancet.find import carriers

    like, unlike = [*like, *sentences(files[0])], [*unlike, *sentences(files[1])]
    if words is not None and like:
        raise UsageError("give words or --like sentences, not both")
    if words is not None:
        like, unlike = carriers(words)
        at = words
    lab = choice.open()
    with show.working("finding"):
        found = lab.find(like, unlike, at, top=top, together=together, blend=blend, causes=causes)
    if json:
        show.as_json(found.to_json())
        return
    table(found)
    show.say("; ".join([*found.notes, *lab.model.notes]))


def sentences(file: Path | None) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        UsageError: it cannot be read, or holds none.
    """
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {error}; give a file of UTF-8 text, one sentence a line") from error
    if not lines:
        raise UsageError(f"{file} is empty; give one sentence a line")
    return lines


def table(found: Found) -> None:
    """The candidates, what the few detect together, the baselines and the blend."""
    rows = [
        [
            f"#{c.feature}",
            does(c),
            f"{c.auroc:.3f}",
            f"{c.f1:.2f}",
            f"{c.elsewhere:.1%}",
            "" if c.lens is None else f"{c.lens:+.2f}",
            "" if c.mention is None else f"{c.mention:.1%}",
            c.fires,
            c.says,
            c.logits,
        ]
        for c in found.candidates
    ]
    head = [
        "feature",
        "",
        "AUROC",
        "F1",
        "elsewhere",
        "nats",
        "says it",
        "fires on",
        "makes the model say",
        "logit lens",
    ]
    title = f"{len(found.like)} examples; words that set them apart: {', '.join(found.says) or 'none'}"
    show.table(head, rows, right=["AUROC", "F1", "elsewhere", "nats", "says it"], title=title)
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


def does(candidate: Candidate) -> str:
    """ "detects", "causes", both, or nothing."""
    words = [word for word, is_so in (("detects", candidate.detects), ("causes", candidate.causes)) if is_so]
    return ", ".join(words)
