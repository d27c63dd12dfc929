"""Passes that tell what the model predicts, alone and with other values at a site: the self-test's and evaluation's.

Texts are padded, never packed. Knows models and sites, no SAEs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lancet.site import Site

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model, SiteFunction
    from lancet.tokens import Batch


@dataclass(frozen=True)
class Passed:
    """Texts, passed through the model.

    Attributes:
        batch: the texts, padded on the right.
        scores: [count, vocab] logits in the model's dtype, one row for each token that is `asked`.
        values: site -> [batch, seq, width] in the model's dtype.
    """

    batch: Batch
    scores: Tensor
    values: dict[Site, Tensor]

    @property
    def content(self) -> Tensor:
        """[batch, seq] True at every token but the start token."""
        return self.batch.content

    @cached_property
    def asked(self) -> Tensor:
        """[batch, seq] True at the tokens that are to be predicted: the content but the first token of each text, which
        a start alone predicts."""
        return _asked(self.batch)

    @property
    def count(self) -> int:
        """How many tokens are to be predicted."""
        return len(self.scores)

    @cached_property
    def nats(self) -> float:
        """What they cost together."""
        return self.cost(self.scores)

    def cost(self, scores: Tensor) -> float:
        """What the same tokens cost under other scores [count, vocab], in nats."""
        import torch

        return float(torch.nn.functional.cross_entropy(scores.float(), self.batch.ids[self.asked], reduction="sum"))


def _asked(batch: Batch) -> Tensor:
    content = batch.content
    return content & (content.cumsum(1) > 1)


def _scores(model: Model, batch: Batch) -> Tensor:
    import torch

    with torch.inference_mode():
        mask = None if bool(batch.mask.all()) else batch.mask.long()
        return model.forward(batch.ids, mask)[:, :-1][_asked(batch)[:, 1:]]


def through(model: Model, batch: Batch, sites: Sequence[Site]) -> Passed:
    """Passes texts through the model and keeps the values at some sites."""
    import torch

    values: dict[Site, Tensor] = {}

    def keep(site: Site) -> SiteFunction:
        def function(value: Tensor) -> None:
            values[site] = value.clone()  # some models go on in the same memory

        return function

    with ExitStack() as stack:
        for site in sorted(set(sites)):
            stack.enter_context(model.at(site, keep(site)))
        scores = _scores(model, batch)
    # Copied out of inference mode, whose tensors torch does not let be changed later.
    with torch.no_grad():
        return Passed(batch, scores, {site: v.clone() for site, v in values.items()})


def replaced(model: Model, passed: Passed, site: Site, new: Tensor) -> Tensor:
    """[count, vocab] the scores of the same texts with other values at `site` (one of those kept, and so is
    `site.entry`).

    Args:
        new: [content tokens, width]; the start token's value stays.
    """
    entry = passed.values[site.entry]

    def put(value: Tensor) -> Tensor:
        out = value.clone()
        out[passed.content] = new.to(value.dtype)
        return out

    with ExitStack() as stack:
        stack.enter_context(model.from_site(site))  # what lies below is as it was
        stack.enter_context(model.at(site.entry, lambda _value: entry))
        stack.enter_context(model.at(site, put))
        return _scores(model, passed.batch)
