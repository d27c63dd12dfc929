"""The logit lens of a direction: the cheap classic that stands beside the effect lens.

The final norm's gain times the direction (for LayerNorm centred first), through the unembedding, centred over the
vocabulary; no bias, no division by a norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lancet.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model


def logit_lens(model: Model, vectors: Tensor) -> Tensor:
    """[n, vocab] float32 for directions [n, d_model].

    Raises:
        UsageError: the final norm is neither a LayerNorm nor an RMSNorm, or the directions are not of the stream.
    """
    import torch

    normed, head = _normed(model, vectors)
    with torch.no_grad():
        logits = (normed.to(head.dtype) @ head.t()).float()
    return logits - logits.mean(-1, keepdim=True)


def toward(model: Model, vectors: Tensor, ids: Sequence[int]) -> Tensor:
    """[n, ids] the logit lens of directions [n, d_model] at a few tokens: cheap for any number of directions.

    Raises:
        UsageError: as `logit_lens`.
    """
    import torch

    normed, head = _normed(model, vectors)
    with torch.no_grad():
        return normed @ (head[list(ids)].float() - head.float().mean(0)).t()


def _normed(model: Model, vectors: Tensor) -> tuple[Tensor, Tensor]:
    from lancet.norms import take_apart

    norm = take_apart(model.arch.final_norm, model.d_model)
    if norm is None:
        raise UsageError(f"{model.name}'s final norm is no LayerNorm or RMSNorm; the logit lens is not defined there")
    if vectors.shape[-1] != model.d_model:
        raise UsageError(
            f"the logit lens is of directions of the stream, {model.d_model} wide, not {vectors.shape[-1]}"
        )
    head: Any = model.arch.lm_head.weight
    vectors = vectors.float().to(head.device)
    if norm.centred:
        vectors = vectors - vectors.mean(-1, keepdim=True)
    return vectors * norm.gain.to(head.device), head.detach()
