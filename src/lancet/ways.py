"""The ways of making a model speak of a concept that a sweep tries: the target, or what examples suggest; baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lancet import background, baselines
from lancet.algebra import Direction, Expression, Ref, substitute
from lancet.edit import Edit, Operation
from lancet.errors import UsageError
from lancet.namefile import Kept, normal
from lancet.span import Span
from lancet.units import Amount

if TYPE_CHECKING:
    from lancet.find import Found
    from lancet.lab import Lab

STRENGTHS = ("0.15rn", "0.2rn", "0.25rn", "0.3rn", "0.35rn", "0.4rn", "0.45rn", "0.5rn", "0.6rn", "0.75rn")
TIMES = ("0.5x", "1x", "1.5x", "2x", "3x", "4x")  # what a single feature is set to
COMPARED = ("0.2rn", "0.3rn", "0.4rn", "0.5rn", "0.6rn", "0.75rn")  # what baselines are tried at
LONGEST = 60  # characters of a target that it is called by
ORTHOGONAL, PREFIX = "orthogonal (Neuronpedia)", "prompt prefix"


@dataclass(frozen=True)
class Way:
    """One way of saying the concept.

    Attributes:
        name: what it is called in the table.
        target: what its edits move; None for a way that edits nothing.
        strengths: operation -> the amounts that are tried.
        own: whether it may be recommended; the others are baselines.
        prefix: text put before every prompt.
    """

    name: str
    target: Expression | Direction | None
    strengths: Mapping[Operation, Sequence[Amount]]
    own: bool = False
    prefix: str = ""

    def edits(self, span: Span) -> list[Edit | None]:
        """One for each strength; a single None for a way that edits nothing."""
        if self.target is None:
            return [None]
        return [
            Edit(self.target, operation, amount, span)  # type: ignore[arg-type] - a Direction is taken as it is
            for operation, amounts in self.strengths.items()
            for amount in amounts
        ]


def target_way(
    lab: Lab, target: int | str | Direction, amounts: Sequence[Amount], operations: Sequence[Operation]
) -> Way:
    """The way of a target that was named."""
    from lancet.grammar import parse_expression

    expression: Any = target
    if isinstance(target, int):
        expression = Ref(index=target)
    elif isinstance(target, str):
        expression = parse_expression(normal(target))
    text = str(expression)
    return Way(
        text if len(text) <= LONGEST else "the target",
        expression,
        _strengths(lab, expression, amounts, operations),
        own=True,
    )


def suggested(
    lab: Lab,
    found: Sequence[Found],
    keywords: Sequence[str],
    amounts: Sequence[Amount],
    operations: Sequence[Operation],
) -> list[Way]:
    """The ways that examples suggest: a blend fitted to the words, the one that `find` makes, the best feature."""
    from lancet import fit

    out = []
    for each in found:
        site = each.sae.site if len(lab.saes) > 1 else None
        at = f" at {site}" if site else ""
        # Words that merely set the examples apart (of the Eiffel Tower: city, iron) would draw the fit to themselves.
        wanted = fit.phrases(lab, keywords) or [[word] for word in each.words]
        targets: dict[str, Expression] = {}  # the first is what baselines that need a direction go along
        if wanted and each.sae.site == each.sae.writes:
            rows = [lab.model.tokenize(text, most=min(lab.model.context, background.TOKENS)) for text in each.like]
            own = background.statistics(lab.model, each.sae, rows)
            start = baselines.difference_of_means(own, background.of(lab.model, each.sae))
            targets["fitted blend"] = blended(fit.fit(lab, each.sae, start, wanted), site)
        if each.parts:
            targets["blend"] = blended(each.parts, site)
        causing = [c for c in each.candidates if c.causes] or each.candidates
        targets["feature"] = Ref(index=max(causing, key=lambda c: c.mention or 0.0).feature, site=site)
        for what, expression in targets.items():
            out.append(Way(f"{what}{at}", expression, _strengths(lab, expression, amounts, operations), own=True))
    return out


def blended(parts: Sequence[tuple[int, float]], site: Any = None) -> Expression:
    """The expression of a blend, weights to four digits, so that what is dosed is what the text of the edit says."""
    rounded = tuple((index, float(f"{weight:.4g}")) for index, weight in parts)
    expression = Kept(blend=rounded).expressed
    return substitute(expression, lambda ref: replace(ref, site=site))


def _strengths(
    lab: Lab, target: Any, amounts: Sequence[Amount], operations: Sequence[Operation]
) -> dict[Operation, list[Amount]]:
    found, _ = lab.ready(target, Amount(0.0))
    single = not isinstance(found, Direction)
    out: dict[Operation, list[Amount]] = {}
    for operation in operations:
        if operation == "set" and single and not found[0].kind.editable:  # type: ignore[index]
            continue
        fires = single and float(lab.facts(found[0]).maximum[found[1]]) > 0  # type: ignore[index]
        grid = TIMES if operation == "set" and fires else STRENGTHS if operation == "add" else COMPARED
        out[operation] = [a for a in amounts if a.unit != "x" or fires] or [Amount.parse(text) for text in grid]
    if not out:
        raise UsageError(f"{target} can only be added to; leave add among the operations")
    return out


def compared(lab: Lab, way: Way, like: Sequence[str], keywords: Sequence[str], amounts: Sequence[Amount]) -> list[Way]:
    """The ways that stand beside the one that is dosed, each over its own grid of strengths."""
    grid = [a for a in amounts if a.unit == "rn"] or [Amount.parse(text) for text in COMPARED]
    out = []
    for sae in lab.saes if like else []:
        at = f" at {sae.writes}" if len(lab.saes) > 1 else ""
        for name, direction in baselines.directions(lab, sae, like).items():
            out.append(Way(f"{name}{at}", replace(direction, recipe=f"{name}{at}"), {"add": grid}))
    assert way.target is not None
    direction = lab.direction(way.target)
    out.append(Way(ORTHOGONAL, replace(direction, recipe=f"along {way.name}"), {"set": grid}))
    if prefix := (f"This is about {', '.join(keywords[:3])}. " if keywords else f"{like[0].strip()} " if like else ""):
        out.append(Way(PREFIX, None, {}, prefix=prefix))
    return out
