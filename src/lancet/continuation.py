"""What generation returns: a text with everything that makes it again, and several of them beside each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lancet.generate import Sampling

if TYPE_CHECKING:
    from lancet.tokens import Tokens


@dataclass
class Continuation:
    """What the model wrote.

    Attributes:
        name: what the row was called in a comparison.
        prompt: the tokens it went on from.
        ids: the new tokens.
        text: the new text.
        edits: in the notation, "" for a plain row.
        sampling: how tokens were chosen; its seed is this row's.
        ended: "length", "end of text" or "interrupted".
        recipe: what makes the same text again: model, SAEs, precision, device, versions.
    """

    name: str
    prompt: Tokens
    ids: tuple[int, ...]
    text: str
    edits: tuple[str, ...]
    sampling: Sampling
    ended: str
    recipe: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """{"name", "prompt", "text", "tokens", "edits", "ended", "sampling", "recipe"}."""
        return {
            "name": self.name,
            "prompt": self.prompt.text,
            "text": self.text,
            "tokens": list(self.ids),
            "edits": list(self.edits),
            "ended": self.ended,
            "sampling": vars(self.sampling),
            "recipe": self.recipe,
        }

    def __str__(self) -> str:
        return self.prompt.text + self.text


class Comparison(dict[str, Continuation]):
    """Continuations of one prompt by name, made in one batch with the same random draws."""

    def to_json(self) -> list[dict[str, Any]]:
        """A list of `Continuation.to_json`."""
        return [row.to_json() for row in self.values()]

    def to_frame(self) -> Any:
        """A pandas data frame, one row a continuation."""
        import pandas

        return pandas.DataFrame([{"name": r.name, "edits": "; ".join(r.edits), "text": r.text} for r in self.values()])

    def __str__(self) -> str:
        return "\n".join(f"[{name}] {row}" for name, row in self.items())
