"""Where an edit acts: a set of absolute positions, and perhaps a condition that the value there must meet.

Positions are known before a text is written, so that a cached generation equals an uncached one. A condition
(`where #77 > 5`) is decided by each token's own value in the forward pass that computes it, which the cached pass and
the uncached one have in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lancet.algebra import Direction, Expression, Ref
from lancet.errors import UsageError
from lancet.units import Amount

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.sae import Sae
    from lancet.site import Site
    from lancet.tokens import Tokens

ROLES = ("assistant", "user", "system")
WORDS = ("all", "prompt", "generated", "last", *ROLES)


@dataclass(frozen=True)
class Condition:
    """`#77 > 5`: what the activation of a feature, or the coordinate along a direction, must be.

    Attributes:
        target: a feature (`Ref`) or an expression that makes a Direction.
        above: True for `>`, False for `<`.
        amount: in raw activations, `x` or `rn`.
    """

    target: Expression
    above: bool
    amount: Amount

    def __str__(self) -> str:
        target = str(self.target) if isinstance(self.target, Ref) else f"({self.target})"
        return f"{target} {'>' if self.above else '<'} {self.amount}"


@dataclass(frozen=True)
class Gate:
    """A condition made ready.

    Attributes:
        target: (Sae, feature index), or a Direction, whose coordinate is `x.v / |v|^2`.
        amount: raw; above: as in Condition.

    Raises:
        UsageError: the activation cannot be had from a token alone.
    """

    target: tuple[Sae, int] | Direction
    amount: float
    above: bool

    def __post_init__(self) -> None:
        if not isinstance(self.target, Direction) and self.target[0].kind.contextual:
            sae, index = self.target
            raise UsageError(
                f"where #{index}: an activation of {sae.name}, a {sae.architecture} SAE, depends on the tokens before; "
                f"take a feature of another SAE"
            )

    @property
    def site(self) -> Site:
        """The site whose unedited value decides."""
        return self.target.site if isinstance(self.target, Direction) else self.target[0].site

    def check(self, site: Site) -> None:
        """Raises UsageError where what decides is computed after the site that it decides about."""
        if site < self.site:
            raise UsageError(
                f"where: an edit at {site} cannot wait for a value at {self.site}, which is computed after it; take a "
                f"feature of an SAE at {site} or before"
            )

    def open(self, x: Tensor) -> Tensor:
        """[n] whether the condition holds at values x [n, width] of its site."""
        import torch

        if isinstance(self.target, Direction):
            vector = self.target.vector.to(x.device)
            value = x.float() @ vector / (vector @ vector)
        else:
            sae, index = self.target
            value = sae.encode_at(x, torch.tensor([index], device=x.device))[:, 0]
        return value > self.amount if self.above else value < self.amount


@dataclass(frozen=True)
class Span:
    """A set of absolute positions; 0 is the start token.

    Args:
        parts: each a word of WORDS, a position, or a (begin, end) pair, half open, None for an open end. Negative
            positions count from the end of the prompt. A word never means the start token; a number may.
        where: of those positions only the ones at which this holds; None takes them all.
    """

    parts: tuple[str | int | tuple[int | None, int | None], ...] = ("all",)
    where: Condition | None = None

    def mask(self, prompt: Tokens, length: int) -> Tensor:
        """[length] True where the span covers a position; positions from len(prompt) on are newly generated.

        A condition is not part of it: whether it holds is known only in the forward pass (`Gate`).

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

        said = ", ".join(map(text, self.parts))
        if self.where is None:
            return said
        return f"where {self.where}" if self.parts == ("all",) else f"{said} where {self.where}"
