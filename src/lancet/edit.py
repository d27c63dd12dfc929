"""Edits: target, operation, amount, span; and what they do to the value at a site.

    f = encode(x);  edit gives f';  the model continues with  x + decode(f') - decode(f)

so that what the SAE fails to explain survives. Only the edited features are computed where the architecture allows it,
and an add needs no encoder at all. Edits of one row at one site all read the same unedited `x`; several edits of one
feature act on its activation in order, and conditions (`where #77 > 5`) look at the unedited value of their site too.

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
from lancet.span import Gate, Span
from lancet.units import Amount

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.sae import Sae
    from lancet.site import Site

Operation = Literal["add", "set", "scale", "at_least", "at_most"]
SIGNS: dict[str, Operation] = {"+=": "add", "=": "set", "*=": "scale", ">=": "at_least", "<=": "at_most"}


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
        gate: acts only where this is open; None everywhere.

    Raises:
        UsageError: the SAE's activations can be added to, but not set to anything.
    """

    site: Site
    target: tuple[Sae, int] | Direction
    operation: Operation
    amount: float
    mask: Tensor
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if self.gate is not None:
            self.gate.check(self.site)
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
        return step.operation == "add" and plain and step.gate is None

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def reads(self) -> set[Site]:
        """The sites before this one whose values it needs."""
        blunt = set() if self.keep_error else {sae.site for sae, _ in self._by_sae() if sae.site != sae.writes}
        return blunt | {step.reads for step in self.steps if step.reads is not None}

    @property
    def watches(self) -> set[Site]:
        """The sites before this one whose unedited values its conditions look at."""
        return {step.gate.site for step in self.steps if step.gate is not None and step.gate.site != step.site}

    def new_value(
        self,
        x: Tensor,
        positions: Tensor,
        read: Mapping[Site, Tensor] | None = None,
        watched: Mapping[Site, Tensor] | None = None,
    ) -> Tensor:
        """The changed values of some tokens of this row.

        Args:
            x: [n, width] their values.
            positions: [n] absolute, all covered by `any`.
            read: site -> [n, width there] for each site in `reads`.
            watched: the same for each site in `watches`.

        Returns:
            [n, width].
        """
        if self.constant is not None:
            return (x.float() + self.constant.to(x.device)).to(x.dtype)
        x32 = x.float()
        inside = [_inside(step, x32, positions, watched or {}) for step in self.steps]
        if not self.keep_error:
            return self._replaced(x32, inside, read or {}).to(x.dtype)
        return (x32 + self._moved(x32, inside, read or {})).to(x.dtype)

    def _moved(self, x: Tensor, inside: Sequence[Tensor], read: Mapping[Site, Tensor]) -> Tensor:
        import torch

        moved = torch.zeros_like(x)
        for sae, steps in self._by_sae():
            features = _features(steps, x)
            if all(step.operation == "add" for step in steps):
                before, seen = torch.zeros(len(x), len(features), device=x.device), x
            else:
                seen = x if sae.site == sae.writes else read[sae.site]
                before = sae.encode_at(seen, features)
            after = _apply(before, features, steps, self._of(steps, inside))
            moved += sae.write(seen, after - before, features)
        for step, here in zip(self.steps, inside, strict=True):
            if isinstance(step.target, Direction):
                vector = step.target.vector.to(x.device)
                before = x @ vector / (vector @ vector)
                after = torch.where(here, operate(step.operation, before, step.amount), before)
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

    def _replaced(self, x: Tensor, inside: Sequence[Tensor], read: Mapping[Site, Tensor]) -> Tensor:
        import torch

        ((sae, steps),) = self._by_sae()
        seen = x if sae.site == sae.writes else read[sae.site]
        lit, features = sae.features(seen), _features(steps, x)
        before = lit.columns(features)
        after = _apply(before, features, steps, inside)
        new = sae.decode_features(lit, seen) + sae.write(seen, after - before, features)
        new = new + (x - sae.out_basis(x))  # a centred SAE never saw the mean; the model keeps it
        return torch.where(torch.stack(list(inside)).any(0)[:, None], new, x)  # no condition met: left alone

    def _of(self, steps: Sequence[Step], inside: Sequence[Tensor]) -> list[Tensor]:
        return [here for step, here in zip(self.steps, inside, strict=True) if any(step is other for other in steps)]

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


def _inside(step: Step, x: Tensor, positions: Tensor, watched: Mapping[Site, Tensor]) -> Tensor:
    """[n] whether a step acts on each token."""
    here = step.mask.to(x.device)[positions]
    if step.gate is not None:
        here = here & step.gate.open(x if step.gate.site == step.site else watched[step.gate.site])
    return here


def _apply(f: Tensor, features: Tensor, steps: Sequence[Step], inside: Sequence[Tensor]) -> Tensor:
    """[n, m] activations after all steps, one after another, each on the tokens [n] that it acts on."""
    import torch

    f = f.clone()
    for step, here in zip(steps, inside, strict=True):
        column = int((features == step.target[1]).nonzero()[0, 0])  # type: ignore[index]
        f[:, column] = torch.where(here, operate(step.operation, f[:, column], step.amount), f[:, column])
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
        self.watches: set[Site] = set().union(*(change.watches for change in rows))
        self._covered: list[tuple[int, Tensor, Tensor]] = []
        self._read: dict[tuple[Site, int], Tensor] = {}
        self._watched: dict[tuple[Site, int], Tensor] = {}

    def place(self, first: Sequence[int], columns: int) -> None:
        """Says that column 0 of the coming pass is absolute position `first[i]` of row i (negative: padding)."""
        import torch

        self._covered, self._read, self._watched = [], {}, {}
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

    def watched(self, site: Site, value: Tensor) -> None:
        """Keeps what the rows' conditions look at."""
        for i, columns, _ in self._covered:
            if site in self.rows[i].watches:
                self._watched[site, i] = value[i, columns.to(value.device)]

    def __call__(self, value: Tensor) -> Tensor | None:
        if not self._covered:
            return None
        value = value.clone()
        for i, columns, positions in self._covered:
            columns = columns.to(value.device)
            row = self.rows[i]
            read = {site: self._read[site, i].to(value.device) for site in row.reads}
            watched = {site: self._watched[site, i].to(value.device) for site in row.watches}
            value[i, columns] = row.new_value(value[i, columns], positions.to(value.device), read, watched)
        return value


def hooks(edits: Mapping[Site, BatchEdits]) -> Iterator[tuple[Site, Callable[[Tensor], Tensor | None]]]:
    """What is to run at which site in a pass: conditions look, then the edits, and after those of the same site the
    reading for later ones.

    A transcoder so reads what the model goes on with, earlier edits included, as the MLP does that it stands for.
    """
    for edit in edits.values():
        for site in edit.watches:
            yield site, partial(edit.watched, site)
    yield from edits.items()
    for edit in edits.values():
        for site in edit.reads:
            yield site, partial(edit.saw, site)
