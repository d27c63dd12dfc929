"""Mixing: directions out of expressions and out of sentences, and what they are.

`mix` tells of a direction how long it is, which features lie nearest to it, what it makes the model say, and what is
left in it of each of its parts. `mean_difference` makes one out of the sentences of two files: the difference of their
mean values (DiffMean, as in arXiv 2501.17148).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.algebra import Binary, Call, Direction, Expression, Ref, Text, refs
from lancet.effect import STRENGTH, Effect
from lancet.errors import UsageError
from lancet.files import text_lines

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.lab import Lab
    from lancet.sae import Sae
    from lancet.tokens import Tokens

BATCH = 32


@dataclass(frozen=True)
class Neighbour:
    """A feature that points the way of a direction, or against it.

    Attributes:
        feature: its index; sae: whose; name: the user's, "" where it has none.
        cosine: of the angle between its decoder row and the direction.
        fires, says: the tokens that it fires on and the words that it makes likelier, "" where not measured.
    """

    feature: int
    sae: str
    cosine: float
    name: str = ""
    fires: str = ""
    says: str = ""


@dataclass(frozen=True)
class Part:
    """What is left of one part in the whole.

    Attributes:
        part: as it was written.
        norm: its own length.
        cosine: of the angle between it and the whole.
        along: how far the whole reaches along it, in the site's units; divided by `norm` the whole's coordinate on it.
    """

    part: str
    norm: float
    cosine: float
    along: float


@dataclass(frozen=True, eq=False)
class Mix:
    """A direction and what it is.

    Attributes:
        direction: the vector, with the expression as its recipe.
        rn: its length in units of the site's typical norm.
        parts: what is left of each part.
        nearest, opposed: features by cosine, strongest first.
        effect: what it makes the model say.
    """

    direction: Direction
    rn: float
    parts: tuple[Part, ...]
    nearest: tuple[Neighbour, ...]
    opposed: tuple[Neighbour, ...]
    effect: Effect

    def to_json(self) -> dict[str, Any]:
        """{"expression", "site", "norm", "norm_rn", "parts", "nearest", "opposed", "effect"}."""
        return {
            "expression": self.direction.recipe,
            "site": str(self.direction.site),
            "norm": round(self.direction.norm, 5),
            "norm_rn": round(self.rn, 5),
            "parts": [_rounded(part) for part in self.parts],
            "nearest": [_rounded(feature) for feature in self.nearest],
            "opposed": [_rounded(feature) for feature in self.opposed],
            "effect": self.effect.to_json(),
        }

    def to_frame(self) -> Any:
        """A pandas data frame of the nearest and the opposed features."""
        import pandas

        return pandas.DataFrame([_rounded(feature) for feature in (*self.nearest, *self.opposed)])

    def __str__(self) -> str:
        lines = [
            f"{self.direction.recipe} at {self.direction.site}: length {self.direction.norm:.3f} ({self.rn:.3f}rn)"
        ]
        lines += [f"  {part.part}: cosine {part.cosine:+.2f}, along it {part.along:+.3f}" for part in self.parts]
        lines += [f"  #{x.feature} {x.cosine:+.2f} {x.name or x.fires}" for x in (*self.nearest, *self.opposed)]
        return "\n".join([*lines, str(self.effect)])


def _rounded(found: Part | Neighbour) -> dict[str, Any]:
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in vars(found).items()}


def mix(
    lab: Lab,
    expression: str | Expression | Direction,
    near: int = 8,
    opposed: int = 4,
    strength: float = STRENGTH,
    words: int = 20,
) -> Mix:
    """What the direction of an expression is.

    Args:
        near, opposed: how many features to list.
        strength: at which the effect lens adds it, in units of the site's typical norm.
        words: tokens listed on each side of the effect.

    Raises:
        UsageError, UnknownName: it cannot be read, names something unknown, mixes sites, or its parts cancel.
    """
    if isinstance(expression, str):
        from lancet.grammar import parse_expression

        expression = parse_expression(expression)
    whole = lab.direction(expression)
    if whole.norm == 0:
        raise UsageError(f"{whole.recipe} is the zero vector and points nowhere: its parts cancel; choose other parts")
    if near < 1 or opposed < 0 or words < 1:
        raise UsageError(f"near and words must be at least 1, opposed at least 0, got {near}, {words}, {opposed}")
    found = [] if isinstance(expression, Direction) else parts_of(expression)
    told = []
    for part in found:
        own = mean_difference(lab, part, expression) if isinstance(part, Call) else lab.direction(part)
        told.append(Part(str(part), own.norm, whole.cosine(own), whole.norm * whole.cosine(own)))
    ups, downs = neighbours(lab, whole, near, opposed)
    (effect,) = lab.effect([whole], strength, words)
    return Mix(whole, whole.norm / lab._norm(whole.site), tuple(told), ups, downs, effect)


def parts_of(expression: Expression) -> list[Ref | Call]:
    """The features, names and mean differences that an expression is made of, each once; none of a bare one."""
    found: list[Ref | Call] = []

    def collect(tree: Expression) -> None:
        match tree:
            case Call(function, arguments) if function != "mean_difference":
                for argument in arguments:
                    collect(argument)
            case Binary(_, left, right):
                collect(left)
                collect(right)
            case Ref() | Call():
                found.append(tree)

    collect(expression)
    return [] if isinstance(expression, Ref) else list(dict.fromkeys(found))


def neighbours(
    lab: Lab, direction: Direction, near: int, opposed: int
) -> tuple[tuple[Neighbour, ...], tuple[Neighbour, ...]]:
    """The features of the open SAEs at a site that point most the way of a direction, and most against it."""
    import torch

    from lancet import naming

    found: list[tuple[float, Sae, int]] = []
    for sae in lab.saes:
        if sae.writes != direction.site:
            continue
        unit = direction.unit().vector
        parts = []
        for piece in sae.pieces(sae.d_out):
            rows = sae.rows(piece)
            parts.append((rows @ unit.to(rows.device)) / rows.norm(dim=1).clamp_min(1e-30))
        cosines = torch.cat(parts)
        for largest, count in ((True, near), (False, opposed)):
            values, ids = cosines.topk(min(count, len(cosines)), largest=largest)
            found += [(value, sae, index) for value, index in zip(values.tolist(), ids.tolist(), strict=True)]
    names = {id(sae): naming.load(sae) for _, sae, _ in found}

    def told(cosine: float, sae: Sae, index: int) -> Neighbour:
        name = names[id(sae)].of_feature(index)
        return Neighbour(index, sae.name, cosine, name, lab.fires(index, sae), lab.says(index, sae))

    found.sort(key=lambda entry: -entry[0])
    up = tuple(told(*entry) for entry in found[:near] if entry[0] > 0)
    down = tuple(told(*entry) for entry in found[::-1][:opposed] if entry[0] < 0)
    return up, down


# ---- out of sentences ------------------------------------------------------------------------------------------------


def mean_difference(lab: Lab, call: Call, whole: Expression | Direction) -> Direction:
    """The Direction of `mean_difference("like.txt", "unlike.txt")`; measured once for a lab and a state of the files.

    Args:
        whole: the expression that it is a part of, whose other parts tell at which site it is taken.

    Raises:
        UsageError: a file cannot be read or is empty.
    """
    # Where the other parts lie at several sites they refuse each other, whatever is chosen here.
    sites = {lab.direction(ref).site for ref in ([] if isinstance(whole, Direction) else refs(whole))}
    sae = next((sae for sae in lab.saes if sae.writes in sites), None) or lab.sae()
    texts = [text_lines(Path(argument.value)) for argument in call.arguments if isinstance(argument, Text)]
    key = (sae.site, *(tuple(lines) for lines in texts))
    if key not in lab._means:
        like = mean_value(lab, sae, texts[0])
        unlike = mean_value(lab, sae, texts[1]) if len(texts) == 2 else neutral_mean(lab, sae)
        lab._means[key] = like - unlike
    return Direction(sae.writes, lab._means[key], str(call))


def mean_value(lab: Lab, sae: Sae, texts: Sequence[str]) -> Tensor:
    """[d_out] the mean over texts of their mean value at the site that an SAE writes, in its basis, start left out."""
    import torch

    rows = sorted((lab.tokenize(text) for text in texts), key=len)
    total = torch.zeros(sae.d_out, device=lab.model.device)
    for first in range(0, len(rows), BATCH):
        for value in values(lab, sae, rows[first : first + BATCH]):
            total += value.mean(0)
    return total / len(rows)


def values(lab: Lab, sae: Sae, rows: Sequence[Tokens]) -> list[Tensor]:
    """For each of a batch of texts [tokens, d_out], the values at the site that an SAE writes, the start left out."""
    batch = lab.model.batch(rows)
    found = lab.model.values(batch, [sae.writes])[sae.writes]
    return [sae.out_basis(value[keep]) for value, keep in zip(found, batch.content, strict=True)]


def neutral_mean(lab: Lab, sae: Sae) -> Tensor:
    """The same over bundled neutral sentences: those of the background, which are measured once for a pair and kept."""
    from lancet import background

    if sae.writes == sae.site:
        return sae.out_basis(background.of(lab.model, sae).examples.to(lab.model.device)).mean(0)
    return mean_value(lab, sae, background.neutral_sentences(300))
