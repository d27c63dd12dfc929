"""Reading a direction like a feature: how far each token's value reaches along it.

The projection is `x.v / |v|`; divided by `|v|` it is the coordinate that edits of the direction set, scale and bound.
Where most text lies is not at 0, so each projection is also told against neutral text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lancet.algebra import Direction
from lancet.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.lab import Lab, Prompt
    from lancet.tokens import Tokens

NEUTRAL = 120  # sentences, about 2,400 tokens
BATCH = 32


@dataclass(repr=False, eq=False)
class Projection:
    """A direction, read in one text.

    Attributes:
        tokens: the text as the model sees it.
        direction: what was read, with its recipe.
        values: [tokens] `x.v / |v|`, 0 at the start token.
        mean, deviation: of the same over the tokens of neutral sentences.
    """

    tokens: Tokens
    direction: Direction
    values: Tensor
    mean: float
    deviation: float

    @property
    def standing(self) -> Tensor:
        """[tokens] how far above neutral text each token is, in its standard deviations; 0 at the start token."""
        out = (self.values - self.mean) / self.deviation
        out[[p for p in range(len(self.tokens)) if self.tokens.roles[p] == "start"]] = 0
        return out

    def positions(self) -> list[int]:
        """All positions but the start token's."""
        return [p for p, role in enumerate(self.tokens.roles) if role != "start"]

    def to_json(self) -> dict[str, Any]:
        """{"text", "direction", "site", "norm", "neutral": {"mean", "deviation"}, "tokens": [{"position", "text",
        "projection", "coordinate", "standing"}]}."""
        standing, norm = self.standing, self.direction.norm
        return {
            "text": self.tokens.text,
            "direction": self.direction.recipe,
            "site": str(self.direction.site),
            "norm": round(norm, 5),
            "neutral": {"mean": round(self.mean, 4), "deviation": round(self.deviation, 4)},
            "tokens": [
                {
                    "position": p,
                    "text": self.tokens.piece(p),
                    "projection": round(float(self.values[p]), 4),
                    "coordinate": round(float(self.values[p]) / norm, 6),
                    "standing": round(float(standing[p]), 3),
                }
                for p in self.positions()
            ],
        }

    def to_frame(self) -> Any:
        """A pandas data frame, one row a token."""
        import pandas

        return pandas.DataFrame(self.to_json()["tokens"])

    def __str__(self) -> str:
        lines = [f"{self.direction.recipe} at {self.direction.site}"]
        for token in self.to_json()["tokens"]:
            lines.append(f"{token['text']!r:>16}  {token['projection']:+8.2f}  {token['standing']:+6.2f} deviations")
        return "\n".join(lines)


def project(lab: Lab, text: Prompt, direction: str | Direction) -> Projection:
    """Reads a direction in a text.

    Raises:
        UsageError, UnknownName: the expression cannot be read or is the zero vector; the text is empty or too long.
    """
    import torch

    from lancet.background import neutral_sentences

    found = lab.direction(direction)
    if found.norm == 0:
        raise UsageError(f"{found.recipe} is the zero vector and points nowhere; choose other parts")
    tokens = lab.tokenize(text)
    most = min(lab.model.context, 128)
    rows = sorted((lab.model.tokenize(t, most=most) for t in neutral_sentences(NEUTRAL)), key=len)
    neutral = [v for first in range(0, len(rows), BATCH) for v in along(lab, found, rows[first : first + BATCH])]
    own = torch.zeros(len(tokens))
    own[[p for p, role in enumerate(tokens.roles) if role != "start"]] = along(lab, found, [tokens])[0]
    population = torch.cat(neutral)
    return Projection(tokens, found, own, float(population.mean()), float(population.std()))


def along(lab: Lab, direction: Direction, rows: list[Tokens]) -> list[Tensor]:
    """For each of a batch of texts [tokens but the start] how far they reach along a direction."""
    batch = lab.model.batch(rows)
    x = lab.model.values(batch, [direction.site])[direction.site].float()
    values = x @ direction.unit().vector.to(x.device)
    return [row[keep].cpu() for row, keep in zip(values, batch.content, strict=True)]
