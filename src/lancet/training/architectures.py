"""The six architectures that can be trained, as sae-lens' own training classes with faster steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lancet.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE

ARCHITECTURES = ("standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka")


@dataclass(frozen=True)
class Penalty:
    """The sparsity penalty of an architecture that has one, and so no k of its own.

    Attributes:
        name: of its coefficient in sae-lens' `TrainStepInput.coefficients` and `SAETrainer.coefficient_schedulers`.
        start: a coefficient to start from, for inputs whose mean norm is sqrt(d_in).
        gain: how strongly the coefficient answers an L0 that is not k (`lancet.training.sparsity.Controller`).
    """

    name: str
    start: float
    gain: float


# 5 is what Anthropic gives for L1 and this normalisation (Circuits Updates, April 2024); the gate's penalty has the
# same scale. JumpReLU's is paid for each feature that fires, about 1 where k is 32: of the same order as what a feature
# explains. L0 answers it within a few steps, in which features die, so the coefficient must answer as fast.
PENALTIES = {"standard": Penalty("l1", 5.0, 1.0), "gated": Penalty("l1", 5.0, 1.0), "jumprelu": Penalty("l0", 1.0, 3.0)}


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
    rescale_acts_by_decoder_norm: bool = True,
    device: str = "cpu",
    fast: bool = True,
) -> TrainingSAE[Any]:
    """An untrained SAE that sae-lens' `SAETrainer` trains: float32, inputs scaled to a mean norm of sqrt(d_in).

    Args:
        arch: one of `ARCHITECTURES`. Standard, gated (arXiv 2404.16014), TopK (2406.04093), BatchTopK (2412.06410),
            JumpReLU (2407.14435), Matryoshka BatchTopK (2503.17547).
        d_in: width of the activations.
        d_sae: number of features.
        k: features a token; a whole number for topk. Standard, gated and jumprelu do not know it: their coefficient
            decides (`lancet.training.sparsity.Controller`).
        widths: Matryoshka's levels, rising; d_sae is added where it is missing.
        sparsity: coefficient of the L1 (standard, gated) or L0 (jumprelu) penalty; None takes `PENALTIES`.
        aux: weight of the loss that revives dead features, AuxK, of the TopK families and jumprelu; 0 for none.
            Standard and gated have no such loss.
        warm_up_steps: steps over which the coefficient rises from 0; jumprelu's does where `sparsity` is given.
        rescale_acts_by_decoder_norm: in the TopK families, whether features are chosen by what they write, activation
            times decoder norm.
        device: where it lies.
        fast: our steps, equal to sae-lens' to 1e-5; False leaves sae-lens' own, which have no `aux` for jumprelu.

    Raises:
        UnknownName: no such architecture.
        UsageError: a k, widths or a sparsity that the architecture cannot have.
    """
    if arch not in ARCHITECTURES:
        raise UnknownName("architecture", arch, ARCHITECTURES)
    _refuse(arch, d_sae, k, widths, sparsity)
    common: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": device,
        "normalize_activations": "expected_average_only_in",
    }
    if arch in PENALTIES:
        name = PENALTIES[arch].name
        common[f"{name}_coefficient"] = PENALTIES[arch].start if sparsity is None else float(sparsity)
        # A coefficient that starts at 0 lets L0 run up first: where it answers L0 fast it needs no warm-up.
        common[f"{name}_warm_up_steps"] = 0 if arch == "jumprelu" and sparsity is None else warm_up_steps
    else:
        common.update(aux_loss_coefficient=aux, rescale_acts_by_decoder_norm=rescale_acts_by_decoder_norm)
        common["k"] = int(k) if arch == "topk" else float(k)
    if arch == "jumprelu":
        # Thresholds alone would travel a learning rate at a step: the estimator's gradient moves the encoder too. The
        # quadratic penalty around k (Gemma Scope 2) pushes every token towards k, those with much to tell too: on
        # 250,000 tokens it left 60 % of the features dead and 0.63 of the variance explained, this one (with AuxK) 5 %
        # and 0.70.
        common.update(jumprelu_sparsity_loss_mode="step", jumprelu_ste_to_input=True)
    if arch == "matryoshka":
        common["matryoshka_widths"] = [*widths] if widths[-1] == d_sae else [*widths, d_sae]
    ours, theirs, config = _classes(arch)
    made = (ours if fast else theirs)(config(**common))
    if arch == "jumprelu" and fast:
        made.aux = aux
    return made


def _refuse(arch: str, d_sae: int, k: float, widths: Sequence[int], sparsity: float | None) -> None:
    if not 0 < k <= d_sae:
        raise UsageError(f"k must be above 0 and at most the SAE's {d_sae} features; got {k:g}")
    if arch == "topk" and k != int(k):
        raise UsageError(f"topk keeps the same number of features in every token, so k must be whole; got {k:g}")
    if sparsity is not None and arch not in PENALTIES:
        raise UsageError(f"{arch} has no sparsity penalty: k alone decides; leave sparsity out")
    if sparsity is not None and sparsity <= 0:
        raise UsageError(f"the sparsity coefficient must be above 0; got {sparsity:g}")
    if arch != "matryoshka":
        if widths:
            raise UsageError(f"only matryoshka has levels; leave widths out for {arch}")
        return
    if not widths or list(widths) != sorted(set(widths)) or widths[0] <= 0 or widths[-1] > d_sae:
        told = ", ".join(map(str, widths)) or "none"
        raise UsageError(f"matryoshka needs widths that rise from above 0 to at most {d_sae}; got {told}")


def _classes(arch: str) -> tuple[type, type, type]:
    from sae_lens.saes import batchtopk_sae, gated_sae, jumprelu_sae, matryoshka_batchtopk_sae, standard_sae, topk_sae

    from lancet.training import gated_steps, relu_steps, topk_steps

    return {
        "standard": (
            relu_steps.FastStandard,
            standard_sae.StandardTrainingSAE,
            standard_sae.StandardTrainingSAEConfig,
        ),
        "gated": (gated_steps.FastGated, gated_sae.GatedTrainingSAE, gated_sae.GatedTrainingSAEConfig),
        "topk": (topk_steps.FastTopK, topk_sae.TopKTrainingSAE, topk_sae.TopKTrainingSAEConfig),
        "batchtopk": (
            topk_steps.FastBatchTopK,
            batchtopk_sae.BatchTopKTrainingSAE,
            batchtopk_sae.BatchTopKTrainingSAEConfig,
        ),
        "jumprelu": (
            relu_steps.FastJumpReLU,
            jumprelu_sae.JumpReLUTrainingSAE,
            jumprelu_sae.JumpReLUTrainingSAEConfig,
        ),
        "matryoshka": (
            topk_steps.FastMatryoshka,
            matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE,
            matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig,
        ),
    }[arch]
