"""Reading: which features fire on which token, how strongly, and how much of the vector they explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.errors import UsageError
from lancet.facts import DENSE

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.facts import Facts
    from lancet.model import Model
    from lancet.sae import Features, Sae
    from lancet.tokens import Tokens


@dataclass(frozen=True)
class Lit:
    """A feature that is lit at a token.

    Attributes:
        feature: its index.
        value: its activation.
        share: its share of the reconstruction; over all features of a token they sum to 1.
        position: the token where it is so.
        fires: the tokens that it fires on, over all the text that was measured ("" where it never fired there).
        says: what it makes the model say, strongest first ("" where that was not measured).
        name: what the user calls it, "" where it has no name.
        described: the best description kept of it (`lancet names`), "" where there is none.
    """

    feature: int
    value: float
    share: float
    position: int
    fires: str = ""
    says: str = ""
    name: str = ""
    described: str = ""


@dataclass(frozen=True)
class Spot:
    """One or several tokens of a reading.

    Attributes:
        positions: absolute positions (0 is the start token).
        text: their exact characters.
        lit: per token how many features are lit, hidden ones included.
        explained: per token how much of the vector the SAE explains, `1 - |x - x^|^2 / |x - b_dec|^2`.
    """

    reading: Reading = field(repr=False)
    positions: tuple[int, ...]
    text: str
    lit: tuple[int, ...]
    explained: tuple[float, ...]

    def top(self, count: int = 5, dense: bool = False) -> list[Lit]:
        """The strongest features over these tokens, each at the token where it is strongest."""
        return self.reading._top(self.positions, count, dense)

    def value(self, feature: int) -> float:
        """The largest activation of one feature over these tokens."""
        return float(self.reading.features.of_feature(feature)[list(self.positions)].max())


@dataclass(repr=False, eq=False)
class Reading:
    """What one SAE reads in one text. Rows of `features` are absolute positions; the start token's row is empty.

    Attributes:
        tokens: the text as the model sees it.
        sae: which SAE.
        features: every active feature of every token.
        shares: [nnz] each one's share of the reconstruction.
        explained: [tokens] `1 - |x - x^|^2 / |x - b_dec|^2`, 0 at the start token; x is the value that the SAE writes,
            which for a transcoder is the MLP's output.
        norms: [tokens] length of the vector.
        facts: maxima, densities, effects.
        labels: feature -> (the tokens that it fires on, the words that it makes likelier), where measured.
        names: feature -> what the user calls it; described: feature -> the best description kept of it.
        notes: precision and device, in words.
    """

    tokens: Tokens
    sae: Sae
    features: Features
    shares: Tensor
    explained: Tensor
    norms: Tensor
    facts: Facts
    labels: dict[int, tuple[str, str]]
    notes: list[str]
    top: int = 5
    dense: bool = False
    names: dict[int, str] = field(default_factory=dict)
    described: dict[int, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Reading({self.sae.name!r}, {_short(self.tokens.text)!r}, {len(self.features.value)} active)"

    def at(self, text: str, occurrence: int = 0) -> Spot:
        """The tokens that hold `text`, however the tokenizer cut it.

        Raises:
            UsageError: the text does not occur (so often); nearest words are named.
        """
        return self.spot(self.tokens.holding(text, occurrence))

    def spot(self, positions: Sequence[int]) -> Spot:
        """The tokens at absolute positions.

        Raises:
            UsageError: out of range, or none given.
        """
        if not positions:
            raise UsageError("no position given; name at least one token")
        for position in positions:
            if not 0 <= position < len(self.tokens):
                raise UsageError(f"no token {position}; the text has 0 (start) to {len(self.tokens) - 1}")
        spans = [self.tokens.spans[p] for p in positions]
        l0 = self.features.l0()
        return Spot(
            reading=self,
            positions=tuple(positions),
            text=self.tokens.text[min(a for a, _ in spans) : max(b for _, b in spans)],
            lit=tuple(int(l0[p]) for p in positions),
            explained=tuple(float(self.explained[p]) for p in positions),
        )

    def __iter__(self) -> Any:
        return (self.spot([p]) for p in self.read_positions())

    def __len__(self) -> int:
        return len(self.tokens)

    def read_positions(self) -> list[int]:
        """All positions but the start token's."""
        return [p for p, role in enumerate(self.tokens.roles) if role != "start"]

    def is_dense(self, feature: int) -> bool:
        """Whether the feature fires on more than a tenth of all tokens, which says little about any one of them."""
        return float(self.facts.density[feature]) > DENSE

    def hidden(self) -> int:
        """How many features of this text are left out of lists because they fire on more than a tenth of all tokens."""
        return sum(self.is_dense(f) for f in self.features.feature.unique().tolist())

    def _top(self, positions: Sequence[int], count: int, dense: bool) -> list[Lit]:
        best: dict[int, Lit] = {}
        for position in positions:
            inside = (self.features.token == position).nonzero()[:, 0]
            for i in inside.tolist():
                feature, value = int(self.features.feature[i]), float(self.features.value[i])
                stronger = feature not in best or abs(value) > abs(best[feature].value)  # AbsTopK's may be negative
                if (dense or not self.is_dense(feature)) and stronger:
                    label = self.labels.get(feature, ("", ""))
                    called = self.names.get(feature, ""), self.described.get(feature, "")
                    best[feature] = Lit(feature, value, float(self.shares[i]), position, *label, *called)
        return sorted(best.values(), key=lambda lit: -abs(lit.value))[:count]

    def to_json(self) -> dict[str, Any]:
        """{"text", "sae", "site", "precision", "hidden_dense", "tokens": [{"position", "text", "lit",
        "explained", "norm", "top": [{"feature", "value", "share", "fires", "says", "name", "described", "url"}]}]}; url
        only where the SAE has a public page."""
        return {
            "text": self.tokens.text,
            "sae": self.sae.name,
            "site": str(self.sae.site),
            "precision": "; ".join(self.notes),
            "hidden_dense": 0 if self.dense else self.hidden(),
            "tokens": [
                {
                    "position": spot.positions[0],
                    "text": spot.text,
                    "lit": spot.lit[0],
                    "explained": round(spot.explained[0], 4),
                    "norm": round(float(self.norms[spot.positions[0]]), 3),
                    "top": [
                        {
                            "feature": x.feature,
                            "value": round(x.value, 4),
                            "share": round(x.share, 4),
                            "fires": x.fires,
                            "says": x.says,
                            "name": x.name,
                            "described": x.described,
                        }
                        | ({"url": f"{self.sae.page}/{x.feature}"} if self.sae.page else {})
                        for x in spot.top(self.top, self.dense)
                    ],
                }
                for spot in self
            ],
        }

    def to_frame(self) -> Any:
        """A pandas data frame, one row for each token and listed feature."""
        import pandas

        rows = [
            {"position": t["position"], "token": t["text"], "lit": t["lit"], "explained": t["explained"], **lit}
            for t in self.to_json()["tokens"]
            for lit in t["top"]
        ]
        return pandas.DataFrame(rows)

    def plot(self, path: str | Path, at: str | None = None) -> Path:
        """Draws the score (features by tokens) or, with `at`, the spectrum of those tokens."""
        from lancet import figures

        return figures.spectrum(self.at(at), Path(path)) if at else figures.score(self, Path(path))

    def __str__(self) -> str:
        lines = [f"{self.sae.name} reads {len(self.read_positions())} tokens at {self.sae.site}"]
        for spot in self:
            told = "  ".join(f"#{x.feature} {x.value:.1f}" for x in spot.top(self.top, self.dense))
            lines.append(f"{spot.text!r:>16}  lit {spot.lit[0]:3}  explained {spot.explained[0]:4.0%}  {told}")
        return "\n".join(lines)


def read(
    model: Model, sae: Sae, facts: Facts, tokens: Tokens, labels: dict[int, tuple[str, str]] | None = None
) -> Reading:
    """Reads one text with one SAE: one forward pass that stops at the last site, one encode.

    Args:
        labels: feature -> what it fires on and makes the model say; looked up for the active features alone.
    """
    import torch

    batch = model.batch([tokens])
    values = model.values(batch, [sae.site, sae.writes])
    x, y = values[sae.site][0], values[sae.writes][0]
    keep = batch.content[0]
    features = sae.features(x, keep)
    where = keep.nonzero()[:, 0]
    rebuilt = sae.decode_features(features, x, keep)
    own = sae.out_basis(y[keep])
    origin = sae.bias if not sae.normalises_tokens else own.mean(-1, keepdim=True)
    explained = torch.zeros(len(tokens), device=x.device)
    explained[keep] = 1 - (own - rebuilt).pow(2).sum(-1) / (own - origin).pow(2).sum(-1).clamp_min(1e-30)
    placed = type(features)(where[features.token], features.feature, features.value, (len(tokens), sae.d_sae))
    return Reading(
        tokens=tokens,
        sae=sae,
        features=placed,
        shares=sae.shares(x[keep], features),
        explained=explained,
        norms=x.float().norm(dim=-1) * keep,
        facts=facts,
        labels=labels or {},
        notes=list(model.notes),
    )


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
