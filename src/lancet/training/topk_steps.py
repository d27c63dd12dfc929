"""sae-lens' TopK, BatchTopK and Matryoshka training steps, on the chosen entries alone.

Loss, selection and gradients are those of sae-lens' classes (`tests/test_training_steps.py`). TopK: arXiv 2406.04093;
BatchTopK: arXiv 2412.06410; Matryoshka: arXiv 2503.17547.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor

from lancet.training.sparse import Decode, Fast, Pattern, dead_loss, entries, squared_error

SAMPLED = 61  # one entry of so many is looked at for a first bound; a prime, so that it goes through all columns


class _TopKStep(Fast):
    """Overrides of a TopK training SAE; `select` says which entries of the scores are kept."""

    def training_forward_pass(self: Any, step_input: TrainStepInput) -> TrainStepOutput:
        """sae-lens' step; `feature_acts` is a sparse COO tensor without a graph."""
        target = step_input.sae_in
        if target.device.type != "cpu":
            return super().training_forward_pass(step_input)  # type: ignore
        x, scored = self.pre_activations(target, self.b_enc)
        norms = None
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = self.W_dec.detach().norm(dim=1)
            scored.mul_(norms)
        rows, cols = self.select(scored)
        pattern = Pattern(rows, cols, (len(scored), self.cfg.d_sae))
        kept = scored[pattern.rows, pattern.cols]
        # The decoder norm decides what is selected and cancels from all the rest: pre * |d| / |d| * d.
        pre = kept if norms is None else kept / norms[pattern.cols]
        values = self.with_gradient(pre, x, self.b_enc, pattern)
        out, losses = self.reconstruct(target, values, pattern)
        losses["auxiliary_reconstruction_loss"] = self.auxiliary(step_input, x, out, scored, norms)
        acts = pattern.coo(kept)
        return TrainStepOutput(
            sae_in=target,
            sae_out=out,
            feature_acts=acts,
            hidden_pre=scored,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            metrics=self.after(kept),
        )

    def select(self: Any, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of each token's k largest entries that are positive, in row order."""
        cols = scored.topk(int(self.cfg.k), dim=1, sorted=False).indices.sort(dim=1).values
        kept = scored.gather(1, cols) > 0
        return kept.nonzero()[:, 0], cols[kept]

    def reconstruct(self: Any, target: Tensor, values: Tensor, pattern: Pattern) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction [n, d_in] and its losses."""
        out = Decode.apply(values, self.W_dec, pattern) + self.b_dec
        return out, {"mse_loss": squared_error(out, target)}

    def after(self: Any, kept: Tensor) -> dict[str, Any]:
        """Keeps what the class keeps between steps; gives what it logs."""
        return {}

    def auxiliary(
        self: Any, step_input: TrainStepInput, x: Tensor, out: Tensor, scored: Tensor, norms: Tensor | None
    ) -> Tensor:
        """sae-lens' auxiliary loss, on the dead columns alone."""
        mask = step_input.dead_neuron_mask
        if mask is None or not bool(mask.any()):
            return out.new_tensor(0.0)
        dead = mask.nonzero()[:, 0]
        scores = scored[:, dead]
        pre = self.with_gradient(scores if norms is None else scores / norms[dead], x, self.b_enc, None, dead)
        residual = (step_input.sae_in - out).detach()
        return self.cfg.aux_loss_coefficient * dead_loss(pre, scores, self.W_dec[dead], residual)


class _BatchTopKStep(_TopKStep):
    def select(self: Any, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of the batch's k * n largest positive entries, in row order."""
        wanted = int(self.cfg.k * len(scored))
        sample = scored.view(-1)[::SAMPLED]
        share = 1.2 * wanted / scored.numel()
        while True:
            # A bound under which few of the largest lie leaves few candidates; it is lowered until it leaves enough.
            place = int(share * len(sample)) + 8
            bound = float(sample.topk(place, sorted=False).values.min()) if place < len(sample) else 0.0
            rows, cols = entries(scored > max(bound, 0.0))
            if len(rows) >= wanted or bound <= 0:
                break
            share *= 2
        if len(rows) > wanted:
            chosen = scored[rows, cols].topk(wanted, sorted=False).indices.sort().values
            rows, cols = rows[chosen], cols[chosen]
        return rows, cols

    def after(self: Any, kept: Tensor) -> dict[str, Any]:
        """Moves the running threshold."""
        self.update_topk_threshold(kept)
        return {"topk_threshold": self.topk_threshold}


class FastTopK(_TopKStep, TopKTrainingSAE):
    """`TopKTrainingSAE`, computed sparsely."""


class FastBatchTopK(_BatchTopKStep, BatchTopKTrainingSAE):
    """`BatchTopKTrainingSAE`, computed sparsely."""


class FastMatryoshka(_BatchTopKStep, MatryoshkaBatchTopKTrainingSAE):
    """`MatryoshkaBatchTopKTrainingSAE`, computed sparsely."""

    def reconstruct(self: Any, target: Tensor, values: Tensor, pattern: Pattern) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction [n, d_in] of all levels, and the loss of each."""
        out, losses, before = self.b_dec, {}, 0
        for width in self.cfg.matryoshka_widths:
            inside = ((pattern.cols >= before) & (pattern.cols < width)).nonzero()[:, 0]
            level = Pattern(pattern.rows[inside], pattern.cols[inside], pattern.shape)
            out = Decode.apply(values.index_select(0, inside), self.W_dec, level) + out
            name = "mse_loss" if width == self.cfg.d_sae else f"inner_mse_loss_{width}"
            losses[name] = squared_error(out, target)
            before = width
        return out, losses
