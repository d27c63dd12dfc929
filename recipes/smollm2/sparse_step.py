"""sae-lens' BatchTopK training step, computed only where it is not zero.

Of a step's six large matrix products only one, the encoder's forward pass, needs every feature. Reconstruction, the
gradient of the activations and both weight gradients touch the k features of each token alone; as products with a
sparse matrix they cost a twentieth of the dense ones on a processor. Loss, selection and gradients are those of
`MatryoshkaBatchTopKTrainingSAE` and `BatchTopKTrainingSAE` (`tests/test_recipe.py` holds them equal to 1e-5).
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def csr(rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR matrix from entries that are already sorted by row."""
    starts = torch.searchsorted(rows.contiguous(), torch.arange(shape[0] + 1))
    return torch.sparse_csr_tensor(starts, cols.contiguous(), values, shape, check_invariants=False)


def transposed(rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    order = torch.argsort(cols, stable=True)
    return csr(cols[order], rows[order], values[order], (shape[1], shape[0]))


def at_entries(rows: Tensor, cols: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(left @ right.T)[rows, cols], nothing else of it computed. left [n, d], right [m, d]."""
    pattern = csr(rows, cols, torch.zeros(len(rows), dtype=left.dtype), (len(left), len(right)))
    return torch.sparse.sampled_addmm(pattern, left.contiguous(), right.t()).values()


class EncodeAt(torch.autograd.Function):
    """(x @ W_enc + b_enc)[rows, cols]; W_enc_t is [d_sae, d_in]."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, W_enc_t: Tensor, b_enc: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        ctx.save_for_backward(x, W_enc_t, rows, cols)  # type: ignore[attr-defined]
        return at_entries(rows, cols, x, W_enc_t) + b_enc[cols]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc_t, rows, cols = ctx.saved_tensors
        shape = (len(x), len(W_enc_t))
        grad_x = csr(rows, cols, grad, shape) @ W_enc_t
        grad_W = transposed(rows, cols, grad, shape) @ x
        grad_b = torch.zeros(shape[1]).index_add_(0, cols, grad)
        return grad_x, grad_W, grad_b, None, None


class DecodeFrom(torch.autograd.Function):
    """Sparse activations [n, d_sae] times W_dec [d_sae, d_in]."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, W_dec: Tensor, rows: Tensor, cols: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(values, W_dec, rows, cols)  # type: ignore[attr-defined]
        return csr(rows, cols, values, (n, len(W_dec))) @ W_dec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec, rows, cols = ctx.saved_tensors
        grad_values = at_entries(rows, cols, grad, W_dec)
        grad_W = transposed(rows, cols, values, (len(grad), len(W_dec))) @ grad
        return grad_values, grad_W, None, None, None


class _SparseStep:
    """Overrides of a BatchTopK training SAE; `widths` are the Matryoshka levels, the last one d_sae."""

    def training_forward_pass(self: Any, step_input: TrainStepInput) -> TrainStepOutput:
        target = step_input.sae_in
        x = self.process_sae_in(target)
        W_enc_t = self.W_enc.t()
        with torch.no_grad():
            norms = self.W_dec.norm(dim=1)
            scored = torch.addmm(self.b_enc, x, self.W_enc).mul_(norms)
            rows, cols = self.select(scored)
        values = EncodeAt.apply(x, W_enc_t, self.b_enc, rows, cols)
        # hidden_pre * |d| / |d| * d: the decoder norm decides what is selected and cancels from the rest.
        widths = [*getattr(self.cfg, "matryoshka_widths", []), self.cfg.d_sae]
        decoded, losses, before = self.b_dec.expand_as(target), {}, 0
        for width in sorted(set(widths)):
            inside = (cols >= before) & (cols < width) if len(set(widths)) > 1 else slice(None)
            decoded = decoded + DecodeFrom.apply(values[inside], self.W_dec, rows[inside], cols[inside], len(target))
            name = "mse_loss" if width == self.cfg.d_sae else f"inner_mse_loss_{width}"
            losses[name] = (decoded - target).pow(2).sum(dim=-1).mean()
            before = width
        losses["auxiliary_reconstruction_loss"] = self.dead_loss(step_input, x, decoded, scored)
        acts = torch.sparse_coo_tensor(
            torch.stack([rows, cols]), values.detach() * norms[cols], scored.shape, is_coalesced=True
        )
        self.update_topk_threshold(acts.values())
        return TrainStepOutput(
            sae_in=target,
            sae_out=decoded,
            feature_acts=acts,
            hidden_pre=scored,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )

    def select(self: Any, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of the k * n largest positive entries, in row order."""
        wanted = int(self.cfg.k * len(scored))
        # A bound a little under the running threshold leaves few candidates; it is lowered until it leaves enough.
        bound = float(self.topk_threshold) * 0.8
        while True:
            candidates = (scored > bound).nonzero()
            if len(candidates) >= wanted or bound <= 0:
                break
            bound = bound / 2 if bound > 1e-3 else 0.0
        if len(candidates) > wanted:
            chosen = scored[candidates[:, 0], candidates[:, 1]].topk(wanted, sorted=False).indices
            candidates = candidates[chosen.sort().values]
        return candidates[:, 0].contiguous(), candidates[:, 1].contiguous()

    def dead_loss(self: Any, step_input: TrainStepInput, x: Tensor, decoded: Tensor, scored: Tensor) -> Tensor:
        """sae-lens' auxiliary loss (dead features rebuild the residual), on the dead columns alone."""
        mask = step_input.dead_neuron_mask
        dead = mask.nonzero()[:, 0] if mask is not None else torch.empty(0)
        if len(dead) == 0:
            return decoded.new_tensor(0.0)
        most = x.shape[-1] // 2
        scale, k = min(len(dead) / most, 1.0), min(most, len(dead))
        pre = torch.addmm(self.b_enc[dead], x, self.W_enc[:, dead])
        chosen = scored[:, dead].topk(k, sorted=False).indices
        kept = torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen))
        rebuilt = kept @ self.W_dec[dead]
        residual = (step_input.sae_in - decoded).detach()
        return self.cfg.aux_loss_coefficient * scale * (rebuilt - residual).pow(2).sum(dim=-1).mean()


class SparseMatryoshka(_SparseStep, MatryoshkaBatchTopKTrainingSAE):
    pass


class SparseBatchTopK(_SparseStep, BatchTopKTrainingSAE):
    pass
