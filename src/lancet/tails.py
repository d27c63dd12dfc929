"""Values of every feature over a population in which most are zero, sorted, so that the question "how rarely is this
value reached" is a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sorted:
    """Sizes of activations, sorted within each feature; what is not listed is zero.

    Attributes:
        begin: [d_sae + 1] where each feature's values begin; value: [entries] positive, ascending within a feature.
        population: of how many values each feature's would be one, zeros included.
        member: [entries] whose value it is, None where it is not kept.
    """

    begin: Tensor
    value: Tensor
    population: int
    member: Tensor | None = None

    @classmethod
    def of(cls, feature: Tensor, value: Tensor, d_sae: int, population: int, member: Tensor | None = None) -> Sorted:
        """Sorts entries."""
        import torch

        order = value.argsort(stable=True)
        order = order[feature[order].argsort(stable=True)]
        begin = torch.zeros(d_sae + 1, dtype=torch.long)
        begin[1:] = torch.bincount(feature, minlength=d_sae).cumsum(0)
        return cls(begin, value[order].contiguous(), population, None if member is None else member[order].int())

    @property
    def d_sae(self) -> int:
        return len(self.begin) - 1

    def feature(self) -> Tensor:
        """[entries] whose activation each value is."""
        import torch

        return torch.repeat_interleave(torch.arange(self.d_sae), self.begin.diff())

    def dense(self, features: Tensor) -> Tensor:
        """[population, m] the values of some features."""
        import torch

        assert self.member is not None
        out = torch.zeros(self.population, len(features))
        for column, feature in enumerate(features.tolist()):
            part = slice(int(self.begin[feature]), int(self.begin[feature + 1]))
            out[self.member[part].long(), column] = self.value[part]
        return out

    def at_least(self, feature: Tensor, value: Tensor, above: bool = False) -> Tensor:
        """[n] how many members reach (or, `above`, exceed) each feature's value: a binary search in each feature's own
        stretch, exact and without a pass over all entries."""
        import torch

        low, high = self.begin[feature], self.begin[feature + 1]
        end, last = high, max(0, len(self.value) - 1)
        longest = int((high - low).max()) if len(feature) else 0
        for _ in range(longest.bit_length()):
            middle = (low + high) // 2
            here = self.value[middle.clamp_max(last)]
            under = (here <= value if above else here < value) & (low < high)
            low, high = torch.where(under, middle + 1, low), torch.where(under, high, middle)
        everything = value < 0 if above else value <= 0
        return torch.where(everything, self.population, end - low)

    def surprise(self, feature: Tensor, value: Tensor) -> Tensor:
        """[n] -log of the empirical p-value of each feature's value, in nats: 0 where nothing fires."""
        return -((self.at_least(feature, value) + 1) / (self.population + 1)).log()

    def auroc(self, scores: Tensor, features: Tensor) -> Tensor:
        """[m] how well each feature separates positives, scores [n, m], from the members; ties counted half."""
        n, m = scores.shape
        which, flat = features.repeat(n), scores.flatten()
        reach, exceed = self.at_least(which, flat), self.at_least(which, flat, above=True)
        below = (self.population - reach).double() + 0.5 * (reach - exceed).double()
        return (below / self.population).view(n, m).mean(0).float()
