"""sae-lens' gated training step, on the entries whose gate is open.

Losses and gradients are those of `GatedTrainingSAE` (`tests/test_training_steps.py`); gated SAEs: arXiv 2404.16014.
Both paths share the encoder's one product, where sae-lens computes three.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.gated_sae import GatedTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from lancet.training.sparse import DENSE_ABOVE, Decode, Fast, Pattern, entries, squared_error


class FastGated(Fast, GatedTrainingSAE):
    """`GatedTrainingSAE`, computed sparsely once few gates are open."""

    def training_forward_pass(self: Any, step_input: TrainStepInput) -> TrainStepOutput:
        """sae-lens' step; `feature_acts` may be a sparse COO tensor without a graph."""
        target = step_input.sae_in
        if target.device.type != "cpu":
            return super().training_forward_pass(step_input)
        x, pre = self.pre_activations(target, None)
        opened = pre > -self.b_gate.detach()
        pattern = None
        if int(opened.count_nonzero()) <= DENSE_ABOVE * opened.numel():
            pattern = Pattern(*entries(opened), (len(pre), self.cfg.d_sae))
            pre_kept = pre[pattern.rows, pattern.cols]
        else:
            pre_kept = pre

        def each(parameter: Tensor) -> Tensor:
            return parameter if pattern is None else parameter.index_select(0, pattern.cols)

        def decode(acts: Tensor) -> Tensor:
            return (acts @ self.W_dec if pattern is None else Decode.apply(acts, self.W_dec, pattern)) + self.b_dec

        product = self.with_gradient(pre_kept, x, None, pattern)
        gate = (product + each(self.b_gate)).relu()
        magnitude = product * each(self.r_mag.exp()) + each(self.b_mag)
        acts = magnitude.relu() * (gate > 0)
        out, by_gate = decode(acts), decode(gate)
        sums = gate.sum(0) if pattern is None else pattern.column_sums(gate)
        losses = {
            "mse_loss": squared_error(out, target),
            "l1_loss": step_input.coefficients["l1"] * (sums * self.W_dec.norm(dim=1)).sum() / len(pre),
            "auxiliary_reconstruction_loss": squared_error(by_gate, target),
        }
        found = acts.detach()
        if pattern is not None:
            lit = found > 0
            found = Pattern(pattern.rows[lit], pattern.cols[lit], pattern.shape).coo(found[lit])
            magnitude = pre.mul_(self.r_mag.detach().exp()).add_(self.b_mag.detach())
        return TrainStepOutput(
            sae_in=target,
            sae_out=out,
            feature_acts=found,
            hidden_pre=magnitude,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )
