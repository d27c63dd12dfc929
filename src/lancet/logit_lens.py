"""The logit lens of a direction: the cheap classic that stands beside the effect lens.

The final norm's gain times the direction (for LayerNorm centred first), through the unembedding, centred over the
vocabulary; no bias, no division by a norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lancet.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model


def logit_lens(model: Model, vectors: Tensor) -> Tensor:
    """[n, vocab] float32 for directions [n, d_model].

    Raises:
        UsageError: the final norm is neither a LayerNorm nor an RMSNorm.
    """
    import torch

    from lancet.norms import take_apart

    norm = take_apart(model.arch.final_norm, model.d_model)
    if norm is None:
        raise UsageError(f"{model.name}'s final norm is no LayerNorm or RMSNorm; the logit lens is not defined there")
    vectors = vectors.float().to(norm.gain.device)
    if norm.centred:
        vectors = vectors - vectors.mean(-1, keepdim=True)
    head: Any = model.arch.lm_head.weight
    with torch.no_grad():
        logits = ((vectors * norm.gain).to(head.dtype) @ head.t()).float()
    return logits - logits.mean(-1, keepdim=True)
