"""The effect lens: what a feature or direction makes the model say, measured.

It is added at the last position of a few neutral prompts, and the mean change of next-token log-probability is taken.
This is the TokenChange of arXiv 2501.08319, made cheap: the prompts' prefixes are computed once, and many features
share a batch. Any vector of that length makes some unlikely tokens likelier; where it is known what the SAE's average
feature does, tokens are ranked by how much more than that is seen, in standard deviations over features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.site import Site

PROMPTS = (
    "I think that",
    "My friend told me that",
    "Yesterday we saw",
    "It was a day of",
    "She wanted to talk about",
    "The book is about",
    "He looked at the picture and said:",
    "There was something about the",
)
STRENGTH = 0.35  # of the site's typical norm
BATCH = 512
SAMPLE = 1024  # features that a baseline is taken from
FLOOR = 0.2  # nats added to a token's standard deviation, so that tokens which hardly ever move do not lead every list


@dataclass(frozen=True, eq=False)
class Baseline:
    """What an SAE's average feature does: mean and standard deviation of the change of each token, [vocab] nats."""

    mean: Tensor
    deviation: Tensor

    def rank(self, change: Tensor) -> Tensor:
        """[..., vocab] how far a change is from the average feature's, in standard deviations (`FLOOR` added)."""
        return (change - self.mean.to(change.device)) / (self.deviation.to(change.device) + FLOOR)


@dataclass(frozen=True)
class Effect:
    """What one feature or direction does to the next token.

    Attributes:
        target: the feature or direction, as written in edits.
        strength: what was added, in units of the site's typical norm.
        promotes, suppresses: (token, mean change of log-probability in nats), strongest first.
    """

    target: str
    strength: float
    promotes: tuple[tuple[str, float], ...]
    suppresses: tuple[tuple[str, float], ...]

    def label(self, count: int = 3) -> str:
        """The first words that it promotes."""
        return words([token for token, _ in self.promotes], count)

    def to_json(self) -> dict[str, Any]:
        """{"target", "strength_rn", "promotes": [[token, nats]], "suppresses": ...}."""
        return {
            "target": self.target,
            "strength_rn": self.strength,
            "promotes": [[token, round(nats, 3)] for token, nats in self.promotes],
            "suppresses": [[token, round(nats, 3)] for token, nats in self.suppresses],
        }

    def to_frame(self) -> Any:
        """A pandas data frame of token and nats."""
        import pandas

        return pandas.DataFrame([*self.promotes, *self.suppresses], columns=["token", "nats"])

    def __str__(self) -> str:
        up = ", ".join(f"{token.strip()!r} +{nats:.1f}" for token, nats in self.promotes[:10])
        down = ", ".join(f"{token.strip()!r} {nats:.1f}" for token, nats in self.suppresses[:10])
        return f"{self.target} at {self.strength:g}rn\n  says:   {up}\n  avoids: {down}"


def words(tokens: Iterable[str], count: int = 3) -> str:
    """The first distinct words that begin among tokens: `melody, song, chorus`; pieces of words say nothing."""
    seen: dict[str, str] = {}
    for token in tokens:
        word = token.strip()
        if token.startswith(" ") and len(word) > 1 and word.isalpha():
            seen.setdefault(word.lower(), word)
        if len(seen) == count:
            break
    return ", ".join(seen.values())


def changes(model: Model, site: Site, vectors: Tensor, batch: int = BATCH) -> Iterator[Tensor]:
    """Mean change of next-token log-probability, over PROMPTS, when each vector is added at the last position.

    Args:
        vectors: [n, width of the site], of the length at which they are to be added.

    Yields:
        [<= batch, vocab] float32, in order.
    """
    import torch

    prefixes = [_Prefix(model, site, text) for text in PROMPTS]
    for first in range(0, len(vectors), batch):
        part = vectors[first : first + batch].to(model.device)
        total = None
        for prefix in prefixes:
            change = prefix.change(part)
            total = change if total is None else total.add_(change)
        assert isinstance(total, torch.Tensor)
        yield total.div_(len(PROMPTS))


class _Prefix:
    """A prompt whose keys and values up to its last token are computed once."""

    def __init__(self, model: Model, site: Site, text: str) -> None:
        import torch

        self.model, self.site = model, site
        self.ids = torch.tensor([model.tokenize(text).ids], device=model.device)
        self.cache = model.new_cache(1)
        with torch.inference_mode():
            model.forward(self.ids[:, :-1], cache=self.cache, last=True)
            # What enters there is the same for all vectors: the blocks below run once, here.
            entry = model.values(model.batch([self.ids[0].tolist()]), [site.entry])[site.entry]
            self.entry = entry[:, -1:]
            self.plain = self._logits(torch.zeros(1, model.d_site(site), device=model.device)).log_softmax(-1)

    def _logits(self, vectors: Tensor) -> Tensor:
        import torch

        n, length = len(vectors), self.ids.shape[1]
        cache = self.model.repeated(self.cache, n)

        def enter(value: Tensor) -> Tensor:
            return self.entry.expand(n, -1, -1).to(value.dtype)

        def add(value: Tensor) -> Tensor:
            return (value.float() + vectors[:, None]).to(value.dtype)

        at, site = self.model.at, self.site
        with torch.inference_mode(), self.model.from_site(site), at(site.entry, enter), at(site, add):
            out = self.model.forward(
                self.ids[:, -1:].expand(n, 1),
                positions=torch.full((n, 1), length - 1, device=self.ids.device),
                cache=cache,
                last=True,
            )
        return out[:, -1].float()

    def change(self, vectors: Tensor) -> Tensor:
        """[n, vocab] change of log-probability."""
        return self._logits(vectors).log_softmax(-1).sub_(self.plain)


def baseline(model: Model, site: Site, vectors: Tensor) -> Baseline:
    """The baseline of an SAE out of a sample of its features' vectors [n, d_model]."""
    import torch

    total = squares = torch.zeros((), dtype=torch.double)
    for change in changes(model, site, vectors):
        double = change.double().cpu()
        total, squares = total + double.sum(0), squares + double.square().sum(0)
    mean = total / len(vectors)
    return Baseline(mean.float(), (squares / len(vectors) - mean.square()).clamp_min(0).sqrt().float())


def strongest(
    change: Tensor, count: int, against: Baseline | None = None, largest: bool = True
) -> tuple[Tensor, Tensor]:
    """The tokens that stand out in changes [n, vocab], most first: ids [n, count] and nats [n, count].

    Args:
        against: rank by how far a change is from the average feature's instead of by its size.
        largest: False for the tokens that become less likely.
    """
    ids = (against.rank(change) if against else change).topk(count, dim=-1, largest=largest).indices
    return ids, change.gather(-1, ids)


def top(
    model: Model, site: Site, vectors: Tensor, count: int = 20, against: Baseline | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that each vector promotes most: ids [n, count] and nats [n, count]."""
    import torch

    found = [strongest(change, count, against) for change in changes(model, site, vectors)]
    return torch.cat([ids for ids, _ in found]), torch.cat([nats for _, nats in found])
