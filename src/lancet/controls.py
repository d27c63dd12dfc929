"""Controls: as many random features, as active at the same tokens, moved by the same length.

Whether an ablation says anything about its features, or whether any blow of that size would have done the same, shows
only beside such controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lancet.algebra import Direction
from lancet.edit import RowChange, Step
from lancet.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lancet.cut import Cut
    from lancet.forced import Changes
    from lancet.lab import Lab
    from lancet.model import Model
    from lancet.sae import Sae
    from lancet.site import Site
    from lancet.tokens import Tokens

POOL = 20  # a control is drawn from so many features of nearly the same activity


@dataclass(frozen=True)
class Activity:
    """How active each feature of an SAE is over some tokens.

    Attributes:
        mass: [d_sae] sum of activations (their sizes); tokens: over how many tokens.
    """

    mass: Tensor
    tokens: int

    def mean(self, feature: int) -> float:
        """A feature's mean activation over the tokens."""
        return float(self.mass[feature]) / max(1, self.tokens)


def activity(model: Model, sae: Sae, texts: Sequence[Tokens], masks: Sequence[Tensor]) -> Activity:
    """The activity over the tokens of `texts` that `masks` cover, each [positions], longer or shorter than its text."""
    import torch

    mass, tokens = torch.zeros(sae.d_sae), 0
    for first in range(0, len(texts), 32):
        batch = model.batch(texts[first : first + 32])
        x = model.values(batch, [sae.site])[sae.site]
        keep = torch.zeros_like(batch.mask)
        for row, mask in zip(keep, masks[first : first + 32], strict=True):
            most = min(len(mask), len(row))
            row[:most] = mask[:most].to(row.device)
        keep &= batch.mask
        tokens += int(keep.sum())
        for features in sae.features_of(x, keep):
            mass.index_add_(0, features.feature.cpu(), features.value.abs().cpu())
    return Activity(mass, tokens)


def draw(found: Activity, target: int | None, generator: torch.Generator, avoid: Sequence[int] = ()) -> int:
    """A random feature, one of the POOL whose activity is nearest to the target's; without a target any active one.

    Args:
        avoid: features that are not drawn.

    Raises:
        UsageError: there are too few features.
    """
    import torch

    own = found.mass[target] if target is not None else None
    # A feature that is silent there has silent controls, any of them.
    free = found.mass == 0 if own is not None and own == 0 else found.mass > 0
    free[list(avoid)] = False
    fit = free.nonzero()[:, 0]
    if len(fit) == 0:
        raise UsageError("too few features are active there for random ones beside them; use --controls 0")
    if own is not None and own > 0:
        fit = fit[(found.mass[fit].log() - own.log()).abs().argsort(stable=True)[:POOL]]
    return int(fit[int(torch.randint(len(fit), (1,), generator=generator))])


class Matched(RowChange):
    """A control's change at one site: its own direction at every token, with the length of the real change there.

    Args:
        own: the control's steps.
        like: the real change, computed at the control's own values.
    """

    def __init__(self, own: RowChange, like: RowChange) -> None:
        self.own, self.like = own, like
        self.steps, self.keep_error, self.any, self.constant = like.steps, True, like.any, None

    @property
    def reads(self) -> set[Site]:
        return self.own.reads | self.like.reads

    @property
    def watches(self) -> set[Site]:
        return self.own.watches | self.like.watches

    def new_value(
        self,
        x: Tensor,
        positions: Tensor,
        read: Mapping[Site, Tensor] | None = None,
        watched: Mapping[Site, Tensor] | None = None,
    ) -> Tensor:
        """As `RowChange.new_value`. Where the control's features are silent and it would move nothing, it goes against
        their directions."""
        x32 = x.float()
        length = (self.like.new_value(x32, positions, read, watched) - x32).norm(dim=-1, keepdim=True)
        way = self.own.new_value(x32, positions, read, watched) - x32
        own = way.norm(dim=-1, keepdim=True)
        silent = own <= 1e-6 * length
        way = way.where(~silent, -sum(_vector(step) for step in self.own.steps).to(x32))  # type: ignore[union-attr]
        return (x32 + way / way.norm(dim=-1, keepdim=True).clamp_min(1e-30) * length).to(x.dtype)


def matched(own: Changes, like: Changes) -> Changes:
    """A control's changes, each with the length of the real one's at its site."""
    return {site: Matched(own[site], row) for site, row in like.items() if row}


class Pools:
    """From where the controls of one cut are drawn: the features of its SAEs, by how active they are.

    Args:
        texts: where activity is measured, over the positions that `masks` cover.
    """

    def __init__(self, lab: Lab, cut: Cut, texts: Sequence[Tokens], masks: Sequence[Tensor]) -> None:
        self.cut = cut
        self.saes = [self._sae(lab, one) for one in cut.found]
        self.found: dict[Site, Activity] = {}
        for sae in self.saes:
            if sae.site not in self.found:
                self.found[sae.site] = activity(lab.model, sae, texts, masks)

    @staticmethod
    def _sae(lab: Lab, one: tuple[Sae, int] | Direction) -> Sae:
        if not isinstance(one, Direction):
            return one[0]
        return next((sae for sae in lab.saes if sae.writes == one.site), None) or lab.sae(one.site)

    def control(self, seed: int) -> Cut:
        """The same cut of random features; a direction's control is a feature's direction, any that is active there."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        taken = {
            (sae.site, one[1]) for sae, one in zip(self.saes, self.cut.found, strict=True) if isinstance(one, tuple)
        }
        found: list[tuple[Sae, int] | Direction] = []
        names = []
        for sae, one in zip(self.saes, self.cut.found, strict=True):
            target = one[1] if isinstance(one, tuple) else None
            avoid = [feature for site, feature in taken if site == sae.site]
            feature = draw(self.found[sae.site], target, generator, avoid)
            taken.add((sae.site, feature))
            row = sae.rows(torch.tensor([feature]))[0]
            found.append((sae, feature) if isinstance(one, tuple) else Direction(one.site, row, f"#{feature}"))
            names.append(f"#{feature}")
        return self.cut.instead(found, names)

    def activities(self, cut: Cut) -> tuple[float | None, ...]:
        """The mean activation of each of a cut's features over the tokens; None for a direction."""
        return tuple(self.found[one[0].site].mean(one[1]) if isinstance(one, tuple) else None for one in cut.found)


def _vector(step: Step) -> Tensor:
    import torch

    if isinstance(step.target, Direction):
        return step.target.vector
    sae, index = step.target
    return sae.rows(torch.tensor([index]))[0]
