"""Directions, and the arithmetic that makes new ones out of features.

An expression (`love - romance`, `0.6 * #12 + 0.4 * #77`, `unit(bridge)`) is a small tree; evaluated, it is a Direction:
a vector at one site with the recipe that made it. Directions at different sites never mix. What is left where parts
cancel is rounding, and counts as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lancet.errors import UsageError
from lancet.site import Site
from lancet.units import short

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ref:
    """A feature by number (`#12`, `blocks.8.hook_resid_pre#77`) or anything by name (`bridge`).

    With several SAEs a site tells whose number or name it is: `blocks.8.hook_resid_pre#bridge`.
    """

    name: str = ""
    index: int = -1
    site: Site | None = None

    def __str__(self) -> str:
        if self.site is None and self.name:
            return self.name
        return f"{self.site or ''}#{self.name or self.index}"


@dataclass(frozen=True)
class Number:
    """A plain number."""

    value: float

    def __str__(self) -> str:
        return short(self.value)


@dataclass(frozen=True)
class Text:
    """The name of a file."""

    value: str

    def __str__(self) -> str:
        quote = "'" if '"' in self.value else '"'
        return f"{quote}{self.value}{quote}"


@dataclass(frozen=True)
class Binary:
    """`left + right`, `-`, `*` or `/`."""

    operator: str
    left: Expression
    right: Expression

    def __str__(self) -> str:
        def side(part: Expression, right: bool) -> str:
            # The right side keeps its parentheses even where they could go: the text reads back as the same tree.
            loose = isinstance(part, Binary) and (
                (self.operator in "*/" and part.operator in "+-")
                or (right and (self.operator in "*/") == (part.operator in "*/"))
            )
            return f"({part})" if loose else str(part)

        return f"{side(self.left, False)} {self.operator} {side(self.right, True)}"


@dataclass(frozen=True)
class Call:
    """A function of directions: `unit(a)`, of length 1; `without(a, b)`, a with its part along b removed.

    Or of files: `mean_difference("like.txt", "unlike.txt")`, the mean value over the sentences of one less that over
    those of the other (DiffMean), a bundled neutral text where no second file is named.
    """

    function: str
    arguments: tuple[Expression, ...]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(str, self.arguments))})"


@dataclass(frozen=True)
class Function:
    """What a function takes: `least` to `most` arguments, files' names or else directions."""

    least: int
    most: int
    files: bool = False


Expression = Ref | Number | Text | Binary | Call
FUNCTIONS = {"unit": Function(1, 1), "without": Function(2, 2), "mean_difference": Function(1, 2, files=True)}
CANCELLED = 1e-6  # of the parts' own length: float32 leaves as much of `0.1 * a + 0.2 * a - 0.3 * a`


def refs(expression: Expression) -> Iterator[Ref]:
    """Every feature and name in an expression, from left to right."""
    match expression:
        case Ref():
            yield expression
        case Binary(_, left, right):
            yield from refs(left)
            yield from refs(right)
        case Call(_, arguments):
            for argument in arguments:
                yield from refs(argument)
        case Number() | Text():
            pass


def substitute(expression: Expression, by: Callable[[Ref], Expression]) -> Expression:
    """The same expression with every feature and name replaced."""
    match expression:
        case Ref():
            return by(expression)
        case Binary(operator, left, right):
            return Binary(operator, substitute(left, by), substitute(right, by))
        case Call(function, arguments):
            return Call(function, tuple(substitute(argument, by) for argument in arguments))
        case Number() | Text():
            return expression


def reads_files(expression: Expression) -> bool:
    """Whether its value depends on what files hold."""
    match expression:
        case Binary(_, left, right):
            return reads_files(left) or reads_files(right)
        case Call(function, arguments):
            return FUNCTIONS[function].files or any(map(reads_files, arguments))
    return False


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector at a site.

    Attributes:
        site: where it lives.
        vector: [d_model] float32.
        recipe: the expression that makes it again.
    """

    site: Site
    vector: Tensor
    recipe: str

    @property
    def norm(self) -> float:
        """Its length."""
        return float(self.vector.norm())

    def __str__(self) -> str:
        return self.recipe

    def unit(self) -> Direction:
        """The same direction with length 1.

        Raises:
            UsageError: the vector is zero.
        """
        if self.norm == 0:
            raise UsageError(f"{self.recipe} is the zero vector and points nowhere; choose other parts")
        return Direction(self.site, self.vector / self.norm, f"unit({self.recipe})")

    def without(self, other: Direction) -> Direction:
        """The same with its part along `other` removed."""
        self._same_site(other)
        along = other.unit().vector
        left = self.vector - (self.vector @ along) * along
        return Direction(self.site, _left(left, self.norm), f"without({self.recipe}, {other.recipe})")

    def cosine(self, other: Direction) -> float:
        """Cosine of the angle between the two."""
        self._same_site(other)
        return float(self.unit().vector @ other.unit().vector)

    def __add__(self, other: Direction) -> Direction:
        self._same_site(other)
        left = _left(self.vector + other.vector, self.norm + other.norm)
        return Direction(self.site, left, f"({self.recipe} + {other.recipe})")

    def __sub__(self, other: Direction) -> Direction:
        self._same_site(other)
        left = _left(self.vector - other.vector, self.norm + other.norm)
        return Direction(self.site, left, f"({self.recipe} - {other.recipe})")

    def __mul__(self, by: float) -> Direction:
        return Direction(self.site, self.vector * by, f"({short(by)} * {self.recipe})")

    __rmul__ = __mul__

    def __truediv__(self, by: float) -> Direction:
        if by == 0:
            raise UsageError(f"{self.recipe} cannot be divided by zero")
        return Direction(self.site, self.vector / by, f"({self.recipe} / {short(by)})")

    def __neg__(self) -> Direction:
        return self * -1.0

    def _same_site(self, other: Direction) -> None:
        if self.site != other.site:
            raise UsageError(
                f"{self.recipe} lives at {self.site}, {other.recipe} at {other.site}; directions at different sites "
                f"never mix: take both from one SAE"
            )


def _left(vector: Tensor, size: float) -> Tensor:
    """What parts of some size leave, zero where they cancel."""
    return vector * 0 if float(vector.norm()) <= CANCELLED * size else vector


def evaluate(expression: Expression, resolve: Callable[[Ref | Call], Direction]) -> Direction:
    """The Direction of an expression.

    Args:
        expression: the tree.
        resolve: gives the Direction of a Ref, and of the Call of a function that reads files; raises UnknownName or
            UsageError.

    Raises:
        UsageError: numbers and directions are combined in a way that has no meaning, or sites differ.
    """
    value = _value(expression, resolve)
    if not isinstance(value, Direction):
        raise UsageError(f"{expression} is a number, not a direction; name a feature in it")
    return Direction(value.site, value.vector, str(expression))


def _value(expression: Expression, resolve: Callable[[Ref | Call], Direction]) -> Direction | float:
    match expression:
        case Call(function) if FUNCTIONS[function].files:
            return resolve(expression)
        case Text(value):
            raise UsageError(f"{value!r} is the name of a file, not a direction; write mean_difference({expression})")
        case Ref():
            return resolve(expression)
        case Number(value):
            return value
        case Call(function, arguments):
            directions = [evaluate(argument, resolve) for argument in arguments]
            return directions[0].unit() if function == "unit" else directions[0].without(directions[1])
        case Binary(operator, left, right):
            return _combine(expression, operator, _value(left, resolve), _value(right, resolve))


def _combine(whole: Expression, operator: str, a: Direction | float, b: Direction | float) -> Direction | float:
    if isinstance(a, float) and isinstance(b, float):
        if operator == "/" and b == 0:
            raise UsageError(f"division by zero in {whole}")
        return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else 0.0}[operator]
    if isinstance(a, Direction) and isinstance(b, Direction) and operator in "+-":
        return a + b if operator == "+" else a - b
    if isinstance(a, Direction) and isinstance(b, float) and operator in "*/":
        return a * b if operator == "*" else a / b
    if isinstance(a, float) and isinstance(b, Direction) and operator == "*":
        return b * a
    kinds = ["a number" if isinstance(x, float) else "a direction" for x in (a, b)]
    raise UsageError(
        f"{whole}: {kinds[0]} {operator} {kinds[1]} has no meaning; add and subtract directions, multiply and divide "
        f"them by numbers"
    )
