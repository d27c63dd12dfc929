"""What an evaluation found: figures of several SAEs of one model, as attributes, JSON, a table's rows and a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lancet import fingerprint
from lancet.evaluation.concepts import Bench
from lancet.evaluation.decoder import Similarity

if TYPE_CHECKING:
    from lancet.evaluation.reconstruction import Totals
    from lancet.sae import Sae

EDGES = tuple(float(edge) for edge in np.arange(-6, 0.25, 0.5))  # log10 of the share of tokens, half decades
ENOUGH = 100_000  # tokens on fewer of which a rare feature is easily taken for a dead one


@dataclass(frozen=True)
class Histogram:
    """How many features fire how often.

    Attributes:
        edges: log10 of the share of tokens, [bins + 1]; the first bin also has what is rarer.
        counts: [bins] features; those that never fire are in none.
        dead: how many never fire.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    dead: int

    @classmethod
    def of(cls, fired: np.ndarray, tokens: int) -> Histogram:
        """Of how many tokens each feature fires on, [d_sae]."""
        share = np.log10(fired[fired > 0] / tokens)
        counts, _ = np.histogram(np.clip(share, EDGES[0], EDGES[-1]), EDGES)
        return cls(EDGES, tuple(map(int, counts)), int((fired == 0).sum()))


@dataclass(frozen=True)
class Losses:
    """What the model predicts, in nats a token, the first token of each text left out (a start alone predicts it).

    Attributes:
        plain: of the model as it is.
        spliced: with the SAE's plain reconstruction in the place of the value that it writes, its error left out; a
            transcoder's is in the place of what its MLP (or what it stands for) writes.
        zeros: with zeros there. Start tokens keep their values in both.
        recovered: (zeros - spliced) / (zeros - plain), 1 where nothing is lost; None where zeros cost nothing more.
        kl: mean KL(plain || spliced) of the next token's distributions.
        tokens: that were predicted.
    """

    plain: float
    spliced: float
    zeros: float
    recovered: float | None
    kl: float
    tokens: int

    @classmethod
    def of(cls, total: Totals) -> Losses:
        """The means of sums."""
        count = total.count
        recovered = None if math.isnan(total.recovered) else total.recovered
        costs = (total.plain / count, total.nats / count, total.zeros / count)
        return cls(*costs, recovered, total.kl / count, count)


@dataclass(frozen=True)
class Scores:
    """One SAE's figures.

    Attributes:
        name: as tables call it; sae: the SAE's own name; fingerprint: of its weights.
        site, writes: where it reads, and where its reconstruction belongs.
        architecture, d_sae: what it is.
        tokens: that it was read on, start tokens left out.
        explained_variance: 1 - sum |y - y^|^2 / sum |y - mean|^2 over tokens, in the SAE's own basis, massive tokens
            left out; explained_all: with them in.
        massive: tokens left out of it.
        l0: features lit at a token, mean.
        cosine: between value and reconstruction, mean over tokens.
        density: how many features fire how often.
        losses: None where no text was long enough to predict anything.
        decoder: how alike decoder rows are.
        bench: against the concepts, None where not measured.
    """

    name: str
    sae: str
    fingerprint: str
    site: str
    writes: str
    architecture: str
    d_sae: int
    tokens: int
    explained_variance: float
    explained_all: float
    massive: int
    l0: float
    cosine: float
    density: Histogram
    losses: Losses | None
    decoder: Similarity
    bench: Bench | None = None

    @classmethod
    def of(cls, name: str, sae: Sae, total: Totals, decoder: Similarity, bench: Bench | None) -> Scores:
        """The figures behind sums."""
        tokens = total.tokens
        return cls(
            name=name,
            sae=sae.name,
            fingerprint=fingerprint.of_sae(sae),
            site=str(sae.site),
            writes=str(sae.writes),
            architecture=sae.architecture,
            d_sae=sae.d_sae,
            tokens=tokens,
            explained_variance=1 - total.left.share,
            explained_all=1 - total.all.share,
            massive=total.massive,
            l0=total.lit / tokens,
            cosine=total.cosine / tokens,
            density=Histogram.of(total.fired.numpy(), tokens),
            losses=Losses.of(total) if total.count else None,
            decoder=decoder,
            bench=bench,
        )

    @property
    def dead(self) -> float:
        """Share of features that fired on none of the tokens."""
        return self.density.dead / self.d_sae

    @property
    def recovered(self) -> float | None:
        """Loss recovered, None where that is not defined."""
        return self.losses.recovered if self.losses else None

    def to_json(self) -> dict[str, Any]:
        """Its figures, as docs/json.md has them; what is not finite or not defined becomes null."""
        losses, empty = self.losses, dict.fromkeys(("loss", "loss_spliced", "loss_zeros", "loss_recovered", "kl"))
        told = empty | {"loss_tokens": 0}
        if losses:
            told = {
                "loss": losses.plain,
                "loss_spliced": losses.spliced,
                "loss_zeros": losses.zeros,
                "loss_recovered": losses.recovered,
                "kl": losses.kl,
                "loss_tokens": losses.tokens,
            }
        out: dict[str, Any] = {
            "name": self.name,
            "sae": self.sae,
            "fingerprint": self.fingerprint,
            "site": self.site,
            "writes": self.writes,
            "architecture": self.architecture,
            "d_sae": self.d_sae,
            "tokens": self.tokens,
            "explained_variance": self.explained_variance,
            "explained_all": self.explained_all,
            "massive": self.massive,
            "l0": self.l0,
            "cosine": self.cosine,
            **told,
            "dead_share": self.dead,
            "density": {"log10_edges": list(self.density.edges), "features": list(self.density.counts)},
            "decoder": {
                "median_highest_cosine": self.decoder.median,
                "above_0.7": self.decoder.near,
                "above_0.9": self.decoder.twin,
                "features_asked": self.decoder.asked,
            },
            "bench": self.bench.to_json() if self.bench else None,
        }
        return _finite(out)


def _finite(value: Any) -> Any:
    """JSON without NaN and infinities, which are no JSON."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Evaluation:
    """Several SAEs of one model on the same text.

    Attributes:
        model: its name.
        text: what was read, in words.
        tokens: how many, start tokens left out.
        saes: the figures of each.
        notes: what must be known.
    """

    model: str
    text: str
    tokens: int
    saes: tuple[Scores, ...]
    notes: tuple[str, ...] = ()

    @property
    def front(self) -> tuple[Scores, ...]:
        """The Pareto front, the sparsest first: those than which no other is as sparse and recovers more of the loss.
        SAEs whose loss recovered is not defined are on no front."""
        found: list[Scores] = []
        known = [each for each in self.saes if each.recovered is not None]
        for each in sorted(known, key=lambda s: (s.l0, -(s.recovered or 0))):
            if not found or (each.recovered or 0) > (found[-1].recovered or 0):
                found.append(each)
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """{"model", "text", "tokens", "saes": [...], "front": [names], "notes"}."""
        return {
            "model": self.model,
            "text": self.text,
            "tokens": self.tokens,
            "saes": [each.to_json() for each in self.saes],
            "front": [each.name for each in self.front],
            "notes": list(self.notes),
        }

    def plot(self, path: str | Path) -> Path:
        """Draws L0 against loss recovered, a point for each SAE, and the Pareto front.

        Raises:
            UsageError: the path cannot be written, or no SAE has a loss recovered.
        """
        from lancet import pareto

        return pareto.front(self, Path(path))

    def __str__(self) -> str:
        lines = [f"{self.model} on {self.tokens:,} tokens of {self.text}"]
        for each in self.saes:
            recovered = "" if each.recovered is None else f", loss recovered {each.recovered:.3f}"
            lines.append(
                f"  {each.name}: explained variance {each.explained_variance:.3f}, L0 {each.l0:.1f}, dead "
                f"{each.dead:.1%}{recovered}"
            )
        return "\n".join([*lines, *self.notes])
