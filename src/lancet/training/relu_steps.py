"""sae-lens' standard and JumpReLU training steps, on the entries that are active or near their threshold.

Losses and gradients are those of sae-lens' classes (`tests/test_training_steps.py`). JumpReLU: arXiv 2407.14435.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLU, JumpReLUTrainingSAE, rectangle
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardTrainingSAE
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lancet.training.sparse import DENSE_ABOVE, Decode, Fast, Pattern, dead_loss, entries, squared_error

AUXILIARY = "auxiliary_reconstruction_loss"  # as sae-lens' TopK families log it


def _output(target: Tensor, out: Tensor, acts: Tensor, pre: Tensor, extra: dict[str, Tensor]) -> TrainStepOutput:
    losses = {"mse_loss": squared_error(out, target), **extra}
    loss = torch.stack(list(losses.values())).sum()
    return TrainStepOutput(sae_in=target, sae_out=out, feature_acts=acts, hidden_pre=pre, loss=loss, losses=losses)


class FastStandard(Fast, StandardTrainingSAE):
    """`StandardTrainingSAE`, computed sparsely once few features fire."""

    def training_forward_pass(self: Any, step_input: TrainStepInput) -> TrainStepOutput:
        """sae-lens' step; `feature_acts` may be a sparse COO tensor without a graph."""
        target = step_input.sae_in
        if target.device.type != "cpu" or self.cfg.lp_norm != 1:
            return super().training_forward_pass(step_input)
        x, pre = self.pre_activations(target, self.b_enc)
        lit = pre > 0
        if int(lit.count_nonzero()) > DENSE_ABOVE * lit.numel():
            hidden = self.with_gradient(pre, x, self.b_enc, None)
            acts = hidden.relu()
            out = acts @ self.W_dec + self.b_dec
            return _output(target, out, acts, hidden, self.calculate_aux_loss(step_input, acts, hidden, out))
        pattern = Pattern(*entries(lit), (len(pre), self.cfg.d_sae))
        values = self.with_gradient(pre[pattern.rows, pattern.cols], x, self.b_enc, pattern)
        out = Decode.apply(values, self.W_dec, pattern) + self.b_dec
        weighted = (pattern.column_sums(values) * self.W_dec.norm(dim=1)).sum() / len(pre)
        extra = {"l1_loss": step_input.coefficients["l1"] * weighted}
        return _output(target, out, pattern.coo(values.detach()), pre, extra)


@dataclass(frozen=True)
class _Near:
    """Entries that are active or within half a bandwidth of their threshold, which alone have a gradient.

    Attributes:
        pattern: where they are.
        lit, near: [entries] whether each is active, and within half a bandwidth of its threshold.
        bandwidth: of the straight-through estimator.
        to_input: whether the estimator moves the encoder too, and not the threshold alone.
    """

    pattern: Pattern
    lit: Tensor
    near: Tensor
    bandwidth: float
    to_input: bool


class _DecodeJump(torch.autograd.Function):
    """JumpReLU of pre-activations [entries], times W_dec, with the straight-through estimator's gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, pre: Tensor, W_dec: Tensor, threshold: Tensor, at: _Near) -> Tensor:
        acts = pre * at.lit
        ctx.save_for_backward(acts, W_dec, threshold)  # type: ignore[attr-defined]
        ctx.at = at  # type: ignore[attr-defined]
        return at.pattern.matrix(acts) @ W_dec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        acts, W_dec, threshold = ctx.saved_tensors
        at: _Near = ctx.at
        grad_acts = at.pattern.at(grad, W_dec)
        moved = threshold[at.pattern.cols] / at.bandwidth * at.near * grad_acts
        grad_pre = at.lit * grad_acts + moved if at.to_input else at.lit * grad_acts
        return grad_pre, at.pattern.transposed(acts) @ grad, -at.pattern.column_sums(moved), None


class _Count(torch.autograd.Function):
    """Active entries of each token [n]; in the gradient a rectangle of the bandwidth stands for the step."""

    @staticmethod
    def forward(ctx: FunctionCtx, pre: Tensor, threshold: Tensor, at: _Near) -> Tensor:
        ctx.at = at  # type: ignore[attr-defined]
        return pre.new_zeros(at.pattern.shape[0]).index_add_(0, at.pattern.rows, at.lit.to(pre.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        at: _Near = ctx.at
        moved = grad[at.pattern.rows] * at.near / at.bandwidth
        return moved if at.to_input else None, -at.pattern.column_sums(moved), None


class FastJumpReLU(Fast, JumpReLUTrainingSAE):
    """`JumpReLUTrainingSAE`, computed sparsely once few features fire, with the TopK families' loss for dead features.

    sae-lens' own for them, Anthropic's pre-activation loss, pushes them all the same way, towards the mean of the
    tokens; in the few steps of a training at home it woke none (`docs/training.md`).

    Attributes:
        aux: weight of the loss for dead features.
    """

    aux: float = 0.0

    def training_forward_pass(self: Any, step_input: TrainStepInput) -> TrainStepOutput:
        """sae-lens' step; `feature_acts` may be a sparse COO tensor without a graph."""
        target, mode = step_input.sae_in, self.cfg.jumprelu_sparsity_loss_mode
        if target.device.type != "cpu" or mode != "step" or self.cfg.pre_act_loss_coefficient is not None:
            return super().training_forward_pass(step_input)
        threshold, bandwidth, to_input = self.threshold, self.bandwidth, self.cfg.jumprelu_ste_to_input
        threshold.data.clamp_(min=0.0)
        x, pre = self.pre_activations(target, self.b_enc)
        # A little lower than the window's edge: what lies in it is decided entry by entry, with sae-lens' own rounding.
        reached = pre > threshold.detach() - 0.51 * bandwidth
        if int(reached.count_nonzero()) > DENSE_ABOVE * reached.numel():
            hidden = self.with_gradient(pre, x, self.b_enc, None)
            acts: Tensor = JumpReLU.apply(hidden, threshold, bandwidth, to_input)  # type: ignore[assignment]
            out = acts @ self.W_dec + self.b_dec
            return _output(target, out, acts, hidden, self.calculate_aux_loss(step_input, acts, hidden, out))
        rows, cols = entries(reached)
        kept, limit = pre[rows, cols], threshold.detach()[cols]
        pattern = Pattern(rows, cols, (len(pre), self.cfg.d_sae))
        at = _Near(pattern, kept > limit, rectangle((kept - limit) / bandwidth) > 0, bandwidth, to_input)
        hidden = self.with_gradient(kept, x, self.b_enc, pattern)
        out = _DecodeJump.apply(hidden, self.W_dec, threshold, at) + self.b_dec
        count: Tensor = _Count.apply(hidden, threshold, at)  # type: ignore[assignment]
        extra = {"l0_loss": (step_input.coefficients["l0"] * count).mean()}
        if self.aux > 0:
            dead = self._dead(step_input)
            extra[AUXILIARY] = self._auxiliary(
                self.with_gradient(pre[:, dead], x, self.b_enc, None, dead), dead, target, out
            )
        acts = Pattern(rows[at.lit], cols[at.lit], pattern.shape).coo(kept[at.lit])
        return _output(target, out, acts, pre, extra)

    def calculate_aux_loss(
        self: Any, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """sae-lens' losses, and the one for dead features."""
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)  # type: ignore[misc]
        if self.aux > 0:
            dead = self._dead(step_input)
            losses[AUXILIARY] = self._auxiliary(hidden_pre[:, dead], dead, step_input.sae_in, sae_out)
        return losses

    def _dead(self: Any, step_input: TrainStepInput) -> Tensor:
        mask = step_input.dead_neuron_mask
        return torch.empty(0, dtype=torch.long) if mask is None else mask.nonzero()[:, 0]

    def _auxiliary(self: Any, pre: Tensor, dead: Tensor, target: Tensor, out: Tensor) -> Tensor:
        if not len(dead):
            return out.new_tensor(0.0)
        # Without the ReLU a feature would be asked to rebuild with a negative activation, which it can never have.
        return self.aux * dead_loss(pre.relu(), pre.detach(), self.W_dec[dead], (target - out).detach())
