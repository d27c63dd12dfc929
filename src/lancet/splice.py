"""Passes over single texts for the self-test: what the model predicts, alone and with other values at a site.

One text a pass, without padding, so that nothing but the text decides. Knows models and sites, no SAEs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lancet.site import Site

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model, SiteFunction


@dataclass(frozen=True)
class Passed:
    """One text, passed through the model.

    Attributes:
        ids: [1, seq] its tokens.
        content: [seq] True at every token but the start token.
        nats: what its tokens cost together; the first token of the content, which a start alone predicts, is left out.
        count: how many that are.
        values: site -> [seq, width] in the model's dtype.
    """

    ids: Tensor
    content: Tensor
    nats: float
    count: int
    values: dict[Site, Tensor]


def cost(model: Model, ids: Tensor, first: int) -> float:
    """Nats of the tokens from position `first` on, given those before; `ids` is [1, seq]."""
    import torch

    with torch.inference_mode():
        scores = model.forward(ids)[0, first - 1 : -1].float()
        return float(torch.nn.functional.cross_entropy(scores, ids[0, first:], reduction="sum"))


def through(model: Model, row: Sequence[int], sites: Sequence[Site]) -> Passed:
    """Passes a text of at least three tokens through the model and keeps the values at some sites."""
    import torch

    batch = model.batch([row])
    content = batch.content[0]
    values: dict[Site, Tensor] = {}

    def keep(site: Site) -> SiteFunction:
        def function(value: Tensor) -> None:
            values[site] = value[0].clone()  # some models go on in the same memory

        return function

    first = int(content.nonzero()[0, 0]) + 1
    with ExitStack() as stack:
        for site in sorted(set(sites)):
            stack.enter_context(model.at(site, keep(site)))
        nats = cost(model, batch.ids, first)
    # Copied out of inference mode, whose tensors torch does not let be changed later.
    with torch.no_grad():
        return Passed(batch.ids, content, nats, len(row) - first, {site: v.clone() for site, v in values.items()})


def replaced(model: Model, passed: Passed, site: Site, new: Tensor) -> float:
    """Nats of the same text with other values at `site` (one of those kept, and so is `site.entry`).

    Args:
        new: [content tokens, width]; the start token's value stays.
    """
    entry = passed.values[site.entry]

    def put(value: Tensor) -> Tensor:
        out = value.clone()
        out[0, passed.content] = new.to(value.dtype)
        return out

    with ExitStack() as stack:
        stack.enter_context(model.from_site(site))  # what lies below is as it was
        stack.enter_context(model.at(site.entry, lambda _value: entry[None]))
        stack.enter_context(model.at(site, put))
        return cost(model, passed.ids, len(passed.content) - passed.count)
