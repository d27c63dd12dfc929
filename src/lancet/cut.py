"""What is cut out: features and directions at their own sites, or directions out of every block's output.

Directional ablation at every layer is that of arXiv 2406.11717, here on the output of every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lancet.algebra import Direction, Expression, Ref
from lancet.edit import Edit, RowChange, Step
from lancet.errors import UsageError
from lancet.site import STREAM, Site
from lancet.span import Gate, Span
from lancet.units import Amount

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.forced import Changes
    from lancet.lab import Lab
    from lancet.sae import Sae
    from lancet.tokens import Tokens

Target = int | str | Direction


@dataclass(frozen=True, eq=False)
class Cut:
    """An ablation made ready for one text.

    Attributes:
        found: each target, (Sae, feature) or a Direction; to: the raw amount that each is set to.
        names: each target as written in edits.
        told, span: the amount and the span as they were given.
        mask: [positions] where it acts; gate: only where this is open.
        blocks: 0, or of how many blocks the output loses the targets' directions.
    """

    found: tuple[tuple[Sae, int] | Direction, ...]
    to: tuple[float, ...]
    names: tuple[str, ...]
    told: Amount
    span: Span
    mask: Tensor
    gate: Gate | None = None
    blocks: int = 0

    @classmethod
    def of(
        cls,
        lab: Lab,
        targets: Sequence[Target],
        prompt: Tokens,
        length: int,
        to: str | float = 0,
        span: str | Span = "all",
        everywhere: bool = False,
    ) -> Cut:
        """Finds targets, amount and span for a prompt; `length` positions in all. See `ablate`.

        Raises:
            UsageError: nothing to cut, or a direction that cannot be cut at every layer.
        """
        if not targets:
            raise UsageError("nothing to cut: name at least one feature, such as 123, a name or (love - romance)")
        if isinstance(span, str):
            from lancet.grammar import parse_span

            span = parse_span(span)
        amount = Amount.parse(to)
        if everywhere and amount.value:
            raise UsageError(f"a removal at every layer leaves nothing of a direction; leave out the amount {amount}")
        if everywhere and span.where:
            raise UsageError("a removal at every layer has no condition; leave `where` out")
        found, raw, names = [], [], []
        for target in targets:
            if isinstance(target, Direction):
                target.unit()  # refuses the zero vector
                one, value, name = target, amount.raw(None, None, target.norm), target.recipe
            else:
                expression = _expression(target)
                one, value = lab.ready(expression, amount)
                name = str(expression) if isinstance(expression, Ref) else f"({expression})"
            found.append(one)
            raw.append(value)
            names.append(name)
        gate = Gate(*lab.ready(span.where.target, span.where.amount), span.where.above) if span.where else None
        mask = span.mask(prompt, length)
        blocks = lab.model.n_layers if everywhere else 0
        cut = cls(tuple(found), tuple(raw), tuple(names), amount, span, mask, gate, blocks)
        cut.steps()  # refuses what cannot be cut
        return cut

    def instead(self, found: Sequence[tuple[Sae, int] | Direction], names: Sequence[str]) -> Cut:
        """The same done to other features."""
        return replace(self, found=tuple(found), names=tuple(names))

    def steps(self) -> list[Step]:
        """The cut as steps.

        Raises:
            UsageError: an SAE whose activations cannot be set, or a direction outside the stream for every block.
        """
        if self.blocks:
            return self._at_every_block()
        return [
            Step(one.site if isinstance(one, Direction) else one[0].writes, one, "set", to, self.mask, self.gate)
            for one, to in zip(self.found, self.to, strict=True)
        ]

    def _at_every_block(self) -> list[Step]:
        # Moves at one site add up: only those of an orthonormal basis remove all of what several directions span.
        import torch

        directions = [vector_of(one) for one in self.found]
        for direction in directions:
            if direction.site.kind not in (*STREAM, "attn_out", "mlp_out"):
                raise UsageError(f"{direction.recipe} lives at {direction.site}, not in the stream of every block")
        matrix = torch.stack([direction.unit().vector.double() for direction in directions], 1)
        if int(torch.linalg.matrix_rank(matrix, rtol=1e-6)) < len(directions):
            raise UsageError("the directions to remove depend on each other; name each only once")
        basis = torch.linalg.qr(matrix).Q.float().t()
        return [
            Step(site, Direction(site, vector.contiguous(), name), "set", 0.0, self.mask)
            for site in (Site(layer, "resid_post") for layer in range(self.blocks))
            for vector, name in zip(basis, self.names, strict=True)
        ]

    def changes(self) -> Changes:
        """For each site the change that is made there."""
        by_site: dict[Site, list[Step]] = {}
        for step in self.steps():
            by_site.setdefault(step.site, []).append(step)
        return {site: RowChange(steps) for site, steps in by_site.items()}

    def notation(self) -> tuple[str, ...]:
        """The edits in their notation, or in words where there is none."""
        where = "" if self.span == Span() else f" @ {self.span}"
        if self.blocks:
            return tuple(f"{name} out of every block's output{where}" for name in self.names)
        return tuple(f"{name} = {self.told}{where}" for name in self.names)


def _expression(target: int | str) -> Expression:
    if isinstance(target, int) or target.strip().isdigit():
        return Ref(index=int(target))
    from lancet.grammar import parse_expression

    return parse_expression(target)


def listed(targets: Target | Sequence[Target]) -> list[Target]:
    """One target or several, as a list."""
    return [targets] if isinstance(targets, (int, str, Direction)) else list(targets)


def vector_of(found: tuple[Sae, int] | Direction) -> Direction:
    """A feature's direction where its SAE writes, or the direction itself."""
    import torch

    if isinstance(found, Direction):
        return found
    sae, index = found
    return Direction(sae.writes, sae.rows(torch.tensor([index]))[0], f"#{index}")


def one_feature(
    lab: Lab, sae: Sae, feature: int, text: Tokens, positions: Sequence[int], to: str | float = 0
) -> Changes:
    """One feature set at some positions."""
    cut = Edit(Ref(index=feature, site=sae.site), "set", Amount.parse(to), Span(tuple(positions)))
    return lab.changes(cut, text, len(text))
