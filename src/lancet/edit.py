"""Edits: target, operation, amount, span; and what they do to the value at a site.

    f = encode(x);  edit gives f';  the model continues with  x + decode(f') - decode(f)

so that what the SAE fails to explain survives. Only the edited features are computed where the architecture allows it,
and an add needs no encoder at all. Edits of one row at one site all read the same unedited `x`; several edits of one
feature act on its activation in order.

A transcoder reads at one site and writes at a later one: its edits act where it writes, on what it read earlier in the
same forward pass. Its skip connection does not depend on features and cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from lancet.algebra import Direction, Expression, Ref
from lancet.errors import UsageError
from lancet.units import Amount

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.sae import Sae
    from lancet.site import Site
    from lancet.tokens import Tokens

Operation = Literal["add", "set", "scale", "at_least", "at_most"]
SIGNS: dict[str, Operation] = {"+=": "add", "=": "set", "*=": "scale", ">=": "at_least", "<=": "at_most"}
ROLES = ("assistant", "user", "system")
WORDS = ("all", "prompt", "generated", "last", *ROLES)


@dataclass(frozen=True)
class Span:
    """A set of absolute positions; 0 is the start token.

    Args:
        parts: each a word of WORDS, a position, or a (begin, end) pair, half open, None for an open end. Negative
            positions count from the end of the prompt. A word never means the start token; a number may.
    """

    parts: tuple[str | int | tuple[int | None, int | None], ...] = ("all",)

    def mask(self, prompt: Tokens, length: int) -> Tensor:
        """[length] True where the span covers a position; positions from len(prompt) on are newly generated.

        Raises:
            UsageError: a role in a prompt that is not a chat.
        """
        import torch

        n = len(prompt)
        out = torch.zeros(length, dtype=torch.bool)
        first = 1 if prompt.roles[:1] == ("start",) else 0
        for part in self.parts:
            if isinstance(part, int):
                at = part + n if part < 0 else part
                if 0 <= at < length:
                    out[at] = True
            elif isinstance(part, tuple):
                begin, end = part
                # An open beginning, or one before the text, is the first token; the start token is asked for by `0:`.
                begin = first if begin is None else max(begin + n, first) if begin < 0 else begin
                end = length if end is None else max(end + n, 0) if end < 0 else end
                out[begin:end] = True
            elif part in ROLES:
                if set(prompt.roles) <= {"start", "text"}:
                    raise UsageError(f"@ {part} needs a chat, and the prompt is plain text; use --chat or another span")
                out[:n] |= torch.tensor([role == part for role in prompt.roles])
                if part == "assistant":
                    out[n:] = True
            else:
                begin, end = {
                    "all": (first, length),
                    "prompt": (first, n),
                    "generated": (n - 1, length),
                    "last": (n - 1, n),
                }[part]
                out[max(begin, first) : end] = True
        return out

    def __str__(self) -> str:
        def text(part: str | int | tuple[int | None, int | None]) -> str:
            if isinstance(part, tuple):
                return ":".join("" if end is None else str(end) for end in part)
            return str(part)

        return ", ".join(map(text, self.parts))


@dataclass(frozen=True)
class Edit:
    """One change: what, how, how much, where.

    Attributes:
        target: a feature (`Ref`) or an expression that makes a Direction.
        operation: "add", "set", "scale", "at_least" or "at_most".
        amount: in raw activations, `x` or `rn`; a plain factor for "scale".
        span: the positions it acts on.
    """

    target: Expression
    operation: Operation
    amount: Amount
    span: Span = field(default_factory=Span)

    def __post_init__(self) -> None:
        if self.operation == "scale" and self.amount.unit != "raw":
            raise UsageError(f"*= takes a plain factor, got {self.amount}; write a number without a unit")

    @classmethod
    def parse(cls, text: str | Edit) -> Edit:
        """Reads the grammar: `#12345 += 80`, `bridge = 2x`, `(love - romance) += 0.5rn @ generated`.

        Raises:
            UsageError: with a caret under the character at fault.
        """
        if isinstance(text, Edit):
            return text
        from lancet.grammar import parse_edit

        return parse_edit(text)

    def __str__(self) -> str:
        sign = next(sign for sign, operation in SIGNS.items() if operation == self.operation)
        target = str(self.target) if isinstance(self.target, Ref) else f"({self.target})"
        where = "" if self.span == Span() else f" @ {self.span}"
        return f"{target} {sign} {self.amount}{where}"


@dataclass(frozen=True)
class Step:
    """An edit made ready for one row: everything but the value itself is known.

    Attributes:
        site: where it acts; for a feature the site that its SAE writes.
        target: (Sae, feature index), or a Direction.
        operation, amount: as in Edit; the amount is raw.
        mask: [positions] where it acts.

    Raises:
        UsageError: the SAE's activations can be added to, but not set to anything.
    """

    site: Site
    target: tuple[Sae, int] | Direction
    operation: Operation
    amount: float
    mask: Tensor

    def __post_init__(self) -> None:
        if isinstance(self.target, Direction) or self.operation == "add" or self.target[0].kind.editable:
            return
        sae, index = self.target
        sign = next(sign for sign, operation in SIGNS.items() if operation == self.operation)
        raise UsageError(
            f"#{index} of {sae.name} can be added to (#{index} += ...) and not changed by {sign}: in a "
            f"{sae.architecture} SAE an activation depends on all the others and on {_ELSE[sae.architecture]}"
        )

    @property
    def reads(self) -> Site | None:
        """The other site whose value it needs, None where it needs none."""
        if isinstance(self.target, Direction) or self.operation == "add" or self.target[0].site == self.site:
            return None
        return self.target[0].site

    @property
    def idle(self) -> bool:
        """Whether it can change nothing."""
        nothing = (self.operation == "add" and self.amount == 0) or (self.operation == "scale" and self.amount == 1)
        return nothing or not bool(self.mask.any())


_ELSE = {"matching_pursuit": "the order in which they were chosen", "temporal": "the tokens before"}


def operate(operation: Operation, value: Tensor, amount: float) -> Tensor:
    """The new activation."""
    match operation:
        case "add":
            return value + amount
        case "set":
            return value.new_full(value.shape, amount)
        case "scale":
            return value * amount
        case "at_least":
            return value.clamp(min=amount)
        case "at_most":
            return value.clamp(max=amount)


class RowChange:
    """The change that one row's steps make at one site.

    Args:
        steps: in the order in which they were given.
        keep_error: False replaces the value by the decoded features (the blunt form), where any step acts.

    Raises:
        UsageError: the blunt form of edits that are not of one SAE's features.
    """

    def __init__(self, steps: Sequence[Step], keep_error: bool = True) -> None:
        import torch

        self.steps = [step for step in steps if not step.idle]
        self.keep_error = keep_error
        length = max((len(step.mask) for step in self.steps), default=0)
        self.any = torch.zeros(length, dtype=torch.bool)
        for step in self.steps:
            self.any[: len(step.mask)] |= step.mask
        if self.steps and not keep_error:
            self._check_blunt()
        # One constant vector everywhere the row is edited: the common case, and no encoder.
        self.constant: Tensor | None = None
        if keep_error and self.steps and all(self._constant(step) for step in self.steps):
            same = all(torch.equal(step.mask, self.steps[0].mask) for step in self.steps)
            if same:
                self.constant = torch.stack([step.amount * _unit_of(step) for step in self.steps]).sum(0)

    @staticmethod
    def _constant(step: Step) -> bool:
        plain = isinstance(step.target, Direction) or not step.target[0].normalises_tokens
        return step.operation == "add" and plain

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def reads(self) -> set[Site]:
        """The sites before this one whose values it needs."""
        blunt = set() if self.keep_error else {sae.site for sae, _ in self._by_sae() if sae.site != sae.writes}
        return blunt | {step.reads for step in self.steps if step.reads is not None}

    def new_value(self, x: Tensor, positions: Tensor, read: Mapping[Site, Tensor] | None = None) -> Tensor:
        """The changed values of some tokens of this row.

        Args:
            x: [n, width] their values.
            positions: [n] absolute, all covered by `any`.
            read: site -> [n, width there] for each site in `reads`.

        Returns:
            [n, width].
        """
        if self.constant is not None:
            return (x.float() + self.constant.to(x.device)).to(x.dtype)
        x32 = x.float()
        if not self.keep_error:
            return self._replaced(x32, positions, read or {}).to(x.dtype)
        return (x32 + self._moved(x32, positions, read or {})).to(x.dtype)

    def _moved(self, x: Tensor, positions: Tensor, read: Mapping[Site, Tensor]) -> Tensor:
        import torch

        moved = torch.zeros_like(x)
        for sae, steps in self._by_sae():
            features = _features(steps, x)
            if all(step.operation == "add" for step in steps):
                before, seen = torch.zeros(len(x), len(features), device=x.device), x
            else:
                seen = x if sae.site == sae.writes else read[sae.site]
                before = sae.encode_at(seen, features)
            after = _apply(before, features, steps, positions)
            moved += sae.write(seen, after - before, features)
        for step in self.steps:
            if isinstance(step.target, Direction):
                vector = step.target.vector.to(x.device)
                before = x @ vector / (vector @ vector)
                inside = step.mask.to(x.device)[positions]
                after = torch.where(inside, operate(step.operation, before, step.amount), before)
                moved += (after - before)[:, None] * vector
        return moved

    def _check_blunt(self) -> None:
        groups = self._by_sae()
        if len(groups) != 1 or any(isinstance(step.target, Direction) for step in self.steps):
            raise UsageError("keep_error=False replaces the value by one SAE's decoding; edit features of one SAE only")
        sae = groups[0][0]
        if not sae.kind.editable:
            raise UsageError(
                f"keep_error=False replaces the value by the decoding of changed activations, which {sae.name}, a "
                f"{sae.architecture} SAE, does not have; leave it (--blunt) out"
            )

    def _replaced(self, x: Tensor, positions: Tensor, read: Mapping[Site, Tensor]) -> Tensor:
        ((sae, steps),) = self._by_sae()
        seen = x if sae.site == sae.writes else read[sae.site]
        lit, features = sae.features(seen), _features(steps, x)
        before = lit.columns(features)
        after = _apply(before, features, steps, positions)
        new = sae.decode_features(lit, seen) + sae.write(seen, after - before, features)
        return new + (x - sae.out_basis(x))  # a centred SAE never saw the mean; the model keeps it

    def _by_sae(self) -> list[tuple[Sae, list[Step]]]:
        groups: dict[int, tuple[Sae, list[Step]]] = {}
        for step in self.steps:
            if not isinstance(step.target, Direction):
                groups.setdefault(id(step.target[0]), (step.target[0], []))[1].append(step)
        return list(groups.values())


def _features(steps: Sequence[Step], x: Tensor) -> Tensor:
    """[m] the features that steps of one SAE act on."""
    import torch

    return torch.tensor(sorted({step.target[1] for step in steps}), device=x.device)  # type: ignore[index]


def _apply(f: Tensor, features: Tensor, steps: Sequence[Step], positions: Tensor) -> Tensor:
    """[n, m] activations after all steps, one after another."""
    import torch

    f = f.clone()
    for step in steps:
        column = int((features == step.target[1]).nonzero()[0, 0])  # type: ignore[index]
        inside = step.mask.to(f.device)[positions]
        f[:, column] = torch.where(inside, operate(step.operation, f[:, column], step.amount), f[:, column])
    return f


def _unit_of(step: Step) -> Tensor:
    """[d] what one unit of the step's target adds."""
    import torch

    if isinstance(step.target, Direction):
        return step.target.vector
    sae, index = step.target
    return sae.rows(torch.tensor([index]))[0]


class BatchEdits:
    """All rows' changes at one site, as a function for `Model.at`.

    `place` must be called before every forward pass: it says which absolute positions its columns are. Rows without
    changes, and positions outside every span, keep their bits. What transcoders read is taken on the way (`hooks`).
    """

    def __init__(self, rows: Sequence[RowChange]) -> None:
        self.rows = rows
        self.reads: set[Site] = set().union(*(change.reads for change in rows))
        self._covered: list[tuple[int, Tensor, Tensor]] = []
        self._read: dict[tuple[Site, int], Tensor] = {}

    def place(self, first: Sequence[int], columns: int) -> None:
        """Says that column 0 of the coming pass is absolute position `first[i]` of row i (negative: padding)."""
        import torch

        self._covered, self._read = [], {}
        for i, change in enumerate(self.rows):
            if not change:
                continue
            positions = torch.arange(first[i], first[i] + columns)
            inside = (positions >= 0) & (positions < len(change.any))
            inside &= change.any[positions.clamp(0, len(change.any) - 1)]
            if bool(inside.any()):
                self._covered.append((i, inside.nonzero()[:, 0], positions[inside]))

    def saw(self, site: Site, value: Tensor) -> None:
        """Keeps what the rows' transcoders read of the value at an earlier site in this pass."""
        for i, columns, _ in self._covered:
            if site in self.rows[i].reads:
                self._read[site, i] = value[i, columns.to(value.device)]

    def __call__(self, value: Tensor) -> Tensor | None:
        if not self._covered:
            return None
        value = value.clone()
        for i, columns, positions in self._covered:
            columns = columns.to(value.device)
            read = {site: self._read[site, i].to(value.device) for site in self.rows[i].reads}
            value[i, columns] = self.rows[i].new_value(value[i, columns], positions.to(value.device), read)
        return value


def hooks(edits: Mapping[Site, BatchEdits]) -> Iterator[tuple[Site, Callable[[Tensor], Tensor | None]]]:
    """What is to run at which site in a pass: the edits, and after those of the same site the reading for later ones.

    A transcoder so reads what the model goes on with, earlier edits included, as the MLP does that it stands for.
    """
    yield from edits.items()
    for edit in edits.values():
        for site in edit.reads:
            yield site, partial(edit.saw, site)
