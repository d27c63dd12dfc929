"""sae-lens' training classes by the name of the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ARCHITECTURES = ("batchtopk", "topk", "matryoshka", "jumprelu", "standard", "gated")


def training_sae(
    arch: str,
    d_in: int,
    d_sae: int,
    k: float,
    *,
    widths: Sequence[int] = (),
    sparsity: float | None = None,
    aux: float = 1.0,
    warm_up_steps: int = 0,
    device: str = "cpu",
    fast: bool = True,
) -> Any:
    """A training SAE with fresh weights, which expects activations of mean norm sqrt(d_in).

    Args:
        k: active features a token, in the mean.
        widths: inner widths of a matryoshka SAE.
        sparsity: the coefficient of the sparsity loss, where there is one.
        aux: weight of the auxiliary loss.
        warm_up_steps: over which the coefficient rises from 0.
    """
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    common: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "normalize_activations": "expected_average_only_in",
        "dtype": "float32",
        "device": device,
    }
    loss = 1.0 if sparsity is None else sparsity
    if arch == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=int(k), aux_loss_coefficient=aux))
    if arch == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common, k=k, aux_loss_coefficient=aux))
    if arch == "matryoshka":
        inner = [*widths, d_sae]
        return MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**common, k=k, aux_loss_coefficient=aux, matryoshka_widths=inner)
        )
    if arch == "jumprelu":
        return JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(**common, l0_coefficient=loss, l0_warm_up_steps=warm_up_steps)
        )
    if arch == "gated":
        return GatedTrainingSAE(GatedTrainingSAEConfig(**common, l1_coefficient=loss, l1_warm_up_steps=warm_up_steps))
    return StandardTrainingSAE(StandardTrainingSAEConfig(**common, l1_coefficient=loss, l1_warm_up_steps=warm_up_steps))
