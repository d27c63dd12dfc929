"""Single neurons: coordinates of the value at a site, and the neurons inside the MLP that comes before it.

A neuron's activation is what the MLP's last projection reads: after the nonlinearity, and in a gated MLP after the
product with the other branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lancet.errors import UsageError
from lancet.hooks import Place, hook
from lancet.site import Site

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.tokens import Tokens

BATCH = 32


def layer_before(site: Site) -> int:
    """The block whose MLP is the last one before a site, its own block's where that has run; -1 where there is none."""
    return site.layer if site.kind in ("mlp.hook_out", "mlp_out", "resid_post") else site.layer - 1


def place(model: Model, layer: int) -> Place:
    """Where the activations of a block's MLP neurons pass.

    Raises:
        UsageError: there are none (mixtures of experts, blocks without an MLP); says why.
    """
    points = getattr(model, "points", None)
    if points is not None:  # a TransformerLens model
        name = f"blocks.{layer}.mlp.hook_post"
        if name not in points:
            raise UsageError(f"{model.name} has no hook {name}: its MLP has no single layer of neurons")
        return Place(points[name], "output")
    try:
        return Place(model.arch.mlp_projection(layer, "down"), "input")
    except (AttributeError, ValueError) as error:  # interp-engine explains what an architecture lacks
        raise UsageError(f"no MLP neurons in block {layer} of {model.name}: {str(error).split('. ')[0]}") from error


def passes(
    model: Model, site: Site, neurons: Place | None, rows: Sequence[Tokens]
) -> Iterator[tuple[list[int], Tensor, Tensor | None, Tensor]]:
    """Runs texts through the model, in batches of texts of like length, as far as a site.

    Args:
        neurons: from `place`, of a block before the site.

    Yields:
        which texts; [batch, seq, width] their values at the site; [batch, seq, neurons] the neurons' activations (None
        where none were asked for); [batch, seq] True at their tokens, start left out.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    seen: list[Tensor] = []
    for first in range(0, len(order), BATCH):
        which = order[first : first + BATCH]
        batch = model.batch([rows[i] for i in which])
        seen.clear()
        with ExitStack() as stack:
            if neurons is not None:
                stack.callback(hook(neurons, lambda value: seen.append(value.detach())).remove)
            x = model.values(batch, [site])[site].float()
        lit = None
        if neurons is not None:
            if len(seen) != 1:
                raise UsageError(f"the MLP before {site} of {model.name} ran {len(seen)} times in a pass, not once")
            lit = seen[0].float().reshape(*x.shape[:2], -1)  # some models flatten tokens
        yield which, x, lit, batch.content
