"""sae-lens' standard and JumpReLU training steps, on the entries that are active or near their threshold.

Losses and gradients are those of sae-lens' classes (`tests/test_training_steps.py`). JumpReLU: arXiv 2407.14435.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLU, JumpReLUTrainingSAE, calculate_pre_act_loss, rectangle
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardTrainingSAE
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lancet.training.sparse import DENSE_ABOVE, Decode, Fast, Pattern, entries, squared_error


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


class _DecodeJump(torch.autograd.Function):
    """Active entries times W_dec, with the threshold's gradient by the straight-through estimator.

    `near` are the entries whose pre-activation lies within half a bandwidth of its threshold: they alone move it, and
    those of them that are not active have no part in the product.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        values: Tensor,
        W_dec: Tensor,
        threshold: Tensor,
        active: Pattern,
        near: Pattern,
        bandwidth: float,
    ) -> Tensor:
        ctx.save_for_backward(values, W_dec, threshold)  # type: ignore[attr-defined]
        ctx.patterns, ctx.bandwidth = (active, near), bandwidth  # type: ignore[attr-defined]
        return active.matrix(values) @ W_dec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, W_dec, threshold = ctx.saved_tensors
        active, near = ctx.patterns
        grad_threshold = near.column_sums(near.at(grad, W_dec)) * threshold / -ctx.bandwidth
        return active.at(grad, W_dec), active.transposed(values) @ grad, grad_threshold, None, None, None


class _Count(torch.autograd.Function):
    """How many entries are active, with the threshold's gradient: a rectangle of the bandwidth in place of the step."""

    @staticmethod
    def forward(ctx: FunctionCtx, threshold: Tensor, active: Pattern, near: Pattern, bandwidth: float) -> Tensor:
        ctx.near, ctx.bandwidth = near, bandwidth  # type: ignore[attr-defined]
        return threshold.new_tensor(float(len(active.rows)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        near: Pattern = ctx.near
        return near.column_sums(grad.expand(len(near.rows))) / -ctx.bandwidth, None, None, None


class FastJumpReLU(Fast, JumpReLUTrainingSAE):
    """`JumpReLUTrainingSAE`, computed sparsely once few features fire."""

    def training_forward_pass(self: Any, step_input: TrainStepInput) -> TrainStepOutput:
        """sae-lens' step; `feature_acts` may be a sparse COO tensor without a graph."""
        target = step_input.sae_in
        usual = self.cfg.jumprelu_sparsity_loss_mode == "step" and not self.cfg.jumprelu_ste_to_input
        if target.device.type != "cpu" or not usual:
            return super().training_forward_pass(step_input)
        threshold, bandwidth = self.threshold, self.bandwidth
        threshold.data.clamp_(min=0.0)
        x, pre = self.pre_activations(target, self.b_enc)
        # A little lower than the window's edge: what lies in it is decided entry by entry, with sae-lens' own rounding.
        reached = pre > threshold.detach() - 0.51 * bandwidth
        if int(reached.count_nonzero()) > DENSE_ABOVE * reached.numel():
            hidden = self.with_gradient(pre, x, self.b_enc, None)
            acts: Tensor = JumpReLU.apply(hidden, threshold, bandwidth, False)  # type: ignore[assignment]
            out = acts @ self.W_dec + self.b_dec
            return _output(target, out, acts, hidden, self.calculate_aux_loss(step_input, acts, hidden, out))
        rows, cols = entries(reached)
        kept, at = pre[rows, cols], threshold.detach()[cols]
        lit, close = kept > at, rectangle((kept - at) / bandwidth) > 0
        active, near = (Pattern(rows[part], cols[part], (len(pre), self.cfg.d_sae)) for part in (lit, close))
        values = self.with_gradient(kept[lit], x, self.b_enc, active)
        out = _DecodeJump.apply(values, self.W_dec, threshold, active, near, bandwidth) + self.b_dec
        count = _Count.apply(threshold, active, near, bandwidth)
        extra = {"l0_loss": step_input.coefficients["l0"] * count / len(pre)}
        if self.cfg.pre_act_loss_coefficient is not None:
            extra["pre_act_loss"] = self._dead_loss(step_input, x, pre)
        return _output(target, out, active.coo(values.detach()), pre, extra)

    def _dead_loss(self: Any, step_input: TrainStepInput, x: Tensor, pre: Tensor) -> Tensor:
        mask = step_input.dead_neuron_mask
        dead = torch.empty(0, dtype=torch.long) if mask is None else mask.nonzero()[:, 0]
        if not len(dead):
            return pre.new_tensor(0.0)
        hidden = self.with_gradient(pre[:, dead], x, self.b_enc, None, dead)
        norms = self.W_dec[dead].norm(dim=1)
        everyone = torch.ones(len(dead), dtype=torch.bool)
        return calculate_pre_act_loss(self.cfg.pre_act_loss_coefficient, self.threshold[dead], hidden, everyone, norms)
