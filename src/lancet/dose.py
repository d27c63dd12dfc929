"""The dose: which strength of an edit makes a model speak of a concept, and what that costs.

Strength acts neither evenly nor monotonically, so it is swept, not searched. Every strength writes continuations of
neutral prompts; the finished texts are read alone by the unedited model. Per strength: the concept rate, the surprise
(nats a token above what the plain continuations have), the share of repeated 3-grams, the distance from the plain
continuation. A strength's score is the harmonic mean of

    concept rate,   fluency  1 - extra surprise / (2 * limit),   freshness  1 - repeated 3-grams

and zero beyond a limit: fluency is 1 for text as plain as plain text and a half at the limit. The dose is the best
score on calibration prompts, and is reported on other prompts and seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lancet import intervals
from lancet.intervals import Interval

if TYPE_CHECKING:
    from pathlib import Path

    from lancet.sweep import Text


@dataclass(frozen=True)
class Limits:
    """What a dose may cost.

    Attributes:
        surprise: nats a token above the plain continuations.
        repeats: share of repeated 3-grams.
    """

    surprise: float = 1.5
    repeats: float = 0.1


@dataclass(frozen=True)
class Row:
    """One strength of one way of saying the concept, measured.

    Attributes:
        way: what was moved: the target, or the name of a baseline.
        edit: in the notation, "" for a way that edits nothing.
        amount: the strength, "" where there is none.
        said: detector -> share of texts that say the concept, with Wilson's interval.
        extra: surprise above the plain continuation of the same prompt and seed, nats a token, bootstrap over prompts.
        surprise: nats a token.
        repeats, distance: as in `sweep.Text`, means over texts.
        score: 0 beyond a limit.
        texts: the continuations.
    """

    way: str
    edit: str
    amount: str
    said: Mapping[str, Interval]
    extra: Interval
    surprise: Interval
    repeats: Interval
    distance: Interval
    score: float
    texts: tuple[Text, ...] = field(default=(), repr=False)

    @property
    def sign(self) -> str:
        """The operation, as edits write it: `+=` or `=`; "" where nothing is edited."""
        before, _, _ = self.edit.rpartition(f" {self.amount}") if self.amount else ("", "", "")
        return before.rpartition(" ")[2]

    @property
    def short(self) -> str:
        """The way and its strength, however long the edit is."""
        return " ".join(part for part in (self.way, self.sign, self.amount) if part)

    @property
    def rate(self) -> Interval:
        """The first detector's."""
        return next(iter(self.said.values()))

    def to_json(self, texts: bool = False) -> dict[str, Any]:
        """Its attributes, intervals as [value, low, high]; the texts themselves where asked."""
        out: dict[str, Any] = {
            "way": self.way,
            "edit": self.edit,
            "amount": self.amount,
            "concept": {name: interval.to_json() for name, interval in self.said.items()},
            **{name: getattr(self, name).to_json() for name in ("extra", "surprise", "repeats", "distance")},
            "score": round(self.score, 4),
        }
        if texts:
            out["texts"] = [
                {"prompt": t.prompt, "seed": t.seed, "text": t.text, "says": t.says, "nats": _round(t.nats)}
                for t in self.texts
            ]
        return out


def _round(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def score(rate: float, extra: float, repeats: float, limits: Limits) -> float:
    """Harmonic mean of concept rate, fluency and freshness; 0 where a limit is broken or nothing was written."""
    if math.isnan(extra) or extra > limits.surprise or repeats >= limits.repeats:
        return 0.0
    fluency = 1 - max(0.0, extra) / (2 * limits.surprise) if limits.surprise else 1.0
    return intervals.harmonic([rate, fluency, 1 - repeats])


def measured(way: str, edit: str, amount: str, texts: Sequence[Text], plain: Sequence[Text], limits: Limits) -> Row:
    """A row of the table out of the texts of one strength.

    Args:
        plain: the plain continuations of the same prompts and seeds, in the same order.
    """
    groups = [text.prompt for text in texts]
    said = {
        name: intervals.rate(sum(text.says[name] for text in texts), len(texts)) for name in (texts[0].says or {"": 0})
    }
    extra = intervals.mean([text.nats - other.nats for text, other in zip(texts, plain, strict=True)], groups)
    repeats = intervals.mean([text.repeats for text in texts], groups)
    return Row(
        way=way,
        edit=edit,
        amount=amount,
        said=said,
        extra=extra,
        surprise=intervals.mean([text.nats for text in texts], groups),
        repeats=repeats,
        distance=intervals.mean([text.distance for text in texts], groups),
        score=score(next(iter(said.values())).value, extra.value, repeats.value, limits),
        texts=tuple(texts),
    )


def best(rows: Sequence[Row], limits: Limits) -> Row | None:
    """The row with the best score, None where none says the concept within the limits.

    A row whose extra surprise is within the limit by less than its own standard error (a quarter of its interval)
    would as likely as not break it on other prompts: such a row is taken only where there is no other.
    """
    fine = [row for row in rows if row.score > 0]
    sure = [row for row in fine if row.extra.value + (row.extra.high - row.extra.low) / 4 <= limits.surprise]
    return max(sure or fine, key=lambda row: row.score, default=None)


@dataclass
class Dose:
    """What `lab.dose` returns.

    Attributes:
        target: what was dosed, as written.
        detectors: what counts as saying the concept: name -> in words; the first decides.
        limits: what a dose may cost.
        calibration: every strength of every way, on the calibration prompts; the plain text first.
        chosen: the recommended row of the calibration, None where no strength fits the limits.
        report: on other prompts and seeds: plain text, the recommended dose, each baseline at its own best dose.
        kept: operation -> the amount that `auto` stands for from now on.
        notes: what the reader must know.
    """

    target: str
    detectors: dict[str, str]
    limits: Limits
    calibration: list[Row]
    chosen: Row | None
    report: list[Row]
    kept: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def called(self) -> str:
        """What was dosed, in few words."""
        from lancet.ways import LONGEST

        return self.target if len(self.target) <= LONGEST else "the target"

    @property
    def reported(self) -> Row | None:
        """The recommended dose on the report's prompts."""
        return next((row for row in self.report if self.chosen and row.edit == self.chosen.edit), None)

    def to_json(self, texts: bool = True) -> dict[str, Any]:
        """Everything; `texts=False` leaves the report's continuations out."""
        return {
            "target": self.target,
            "detectors": self.detectors,
            "limits": vars(self.limits),
            "recommended": self.chosen.edit if self.chosen else None,
            "kept": self.kept,
            "calibration": [row.to_json() for row in self.calibration],
            "report": [row.to_json(texts) for row in self.report],
            "notes": self.notes,
            "recipe": self.recipe,
        }

    def to_frame(self) -> Any:
        """A pandas data frame, one row a strength, with a column that says on which prompts."""
        import pandas

        return pandas.DataFrame(
            [
                {
                    "prompts": prompts,
                    "way": row.way,
                    "edit": row.edit,
                    "concept": row.rate.value,
                    "extra": row.extra.value,
                    "repeats": row.repeats.value,
                    "distance": row.distance.value,
                    "score": row.score,
                }
                for prompts, rows in (("calibration", self.calibration), ("report", self.report))
                for row in rows
            ]
        )

    @property
    def unit(self) -> str:
        """What the curve is drawn in: the unit of the recommended amount, else of the first."""
        from lancet.units import Amount

        row = self.chosen or next((row for row in self.calibration if row.amount), None)
        return Amount.parse(row.amount).unit if row and row.amount else "raw"

    def curves(self) -> list[tuple[str, list[tuple[float, Row]]]]:
        """(way and operation, [(strength, row)]) for each sweep of two or more strengths in `unit`, by strength."""
        from lancet.units import Amount

        found: dict[str, list[tuple[float, Row]]] = {}
        for row in self.calibration:
            if row.amount and (amount := Amount.parse(row.amount)).unit == self.unit:
                found.setdefault(f"{row.way} {row.sign}", []).append((amount.value, row))
        return [(label, sorted(rows, key=lambda pair: pair[0])) for label, rows in found.items() if len(rows) > 1]

    def plot(self, path: str | Path) -> Path:
        """Draws the dose-response curve."""
        from pathlib import Path as AnyPath

        from lancet.figures import response

        return response(self, AnyPath(path))

    def __str__(self) -> str:
        head = f"{self.called}: " + (
            f"recommended {self.chosen.short}" if self.chosen else "no strength fits the limits"
        )
        lines = [
            f"  {row.short:44} says {row.rate}  extra {row.extra}  repeats {row.repeats.value:.2f}  "
            f"score {row.score:.2f}"
            for row in self.report
        ]
        return "\n".join([head, *lines])
