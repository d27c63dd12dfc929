"""A training step's matrix products, computed only where activations are not zero.

Of a dense step's six large products (encoder and decoder: forward, gradient of the weights, gradient of the input) only
the encoder's forward pass needs every feature. The others touch the features that fire on each token; as products with
a sparse matrix they cost a tenth of the dense ones and less on a processor, as long as few features fire.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

# Where more than this share of all entries is not zero, dense products are taken. On one thread, with d_in 576, d_sae
# 8192 and 2,048 tokens, a step's four sparse products took 0.40 s of processor time at a share of 4%, and 0.19 s at 2%;
# the four dense ones took 0.58 s whatever the share. 6% is read off that line.
DENSE_ABOVE = 0.06


class Pattern:
    """Where a matrix [n, d_sae] has its entries: `rows` and `cols` [entries], sorted by row, then by column."""

    def __init__(self, rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> None:
        self.rows, self.cols, self.shape = rows.contiguous(), cols.contiguous(), shape

    @cached_property
    def _starts(self) -> Tensor:
        return torch.searchsorted(self.rows, torch.arange(self.shape[0] + 1, device=self.rows.device))

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        cols, order = self.cols.sort(stable=True)
        starts = torch.searchsorted(cols, torch.arange(self.shape[1] + 1, device=cols.device))
        return order, starts, self.rows[order]

    def matrix(self, values: Tensor) -> Tensor:
        """The CSR matrix [n, d_sae] with these values [entries]."""
        return _csr(self._starts, self.cols, values, self.shape)

    def transposed(self, values: Tensor) -> Tensor:
        """Its transpose [d_sae, n], CSR too."""
        order, starts, rows = self._by_column
        return _csr(starts, rows, values[order], self.shape[::-1])

    def at(self, left: Tensor, right: Tensor) -> Tensor:
        """(left @ right.T) at the entries, nothing else of it computed; left [n, d], right [d_sae, d]."""
        empty = self.matrix(torch.zeros(len(self.rows), dtype=left.dtype, device=left.device))
        return torch.sparse.sampled_addmm(empty, left.contiguous(), right.t()).values()

    def column_sums(self, values: Tensor) -> Tensor:
        """[d_sae] sums of values [entries]."""
        return values.new_zeros(self.shape[1]).index_add(0, self.cols, values)

    def coo(self, values: Tensor) -> Tensor:
        """The COO matrix with these values, which is how sae-lens' trainer takes sparse activations."""
        return torch.sparse_coo_tensor(
            torch.stack([self.rows, self.cols]), values, self.shape, is_coalesced=True, check_invariants=False
        )


def _csr(starts: Tensor, inner: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are in beta
        return torch.sparse_csr_tensor(starts, inner, values, shape, check_invariants=False)


def entries(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns where a mask [n, d_sae] is set, in row order.

    Eight entries are looked at as one number first: `nonzero` of a mask that is nearly empty takes a third of the time
    of the encoder's product otherwise.
    """
    flat = mask.contiguous().view(-1)
    if len(flat) % 8:
        where = flat.nonzero()[:, 0]
    else:
        words = flat.view(torch.int64).nonzero()[:, 0]
        word, place = flat.view(-1, 8)[words].nonzero().unbind(1)
        where = words[word] * 8 + place
    rows = where.div(mask.shape[1], rounding_mode="floor")
    return rows, where - rows * mask.shape[1]


class Encode(torch.autograd.Function):
    """Gives pre-activations that are already known their gradient: pre = (target - b_dec) @ W_enc + b_enc.

    `b_dec` is subtracted from every token, so that its gradient needs the sum over tokens alone, a product with one
    vector and not with a matrix. `pattern` tells at which entries `pre` [entries] was kept; without one it is dense.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        pre: Tensor,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None,
        pattern: Pattern | None,
    ) -> Tensor:
        """The values at the entries."""
        ctx.save_for_backward(x, W_enc)  # type: ignore[attr-defined]
        ctx.pattern, ctx.biases = pattern, (b_enc is not None, b_dec is not None)  # type: ignore[attr-defined]
        return pre.view_as(pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients of what `forward` takes."""
        x, W_enc = ctx.saved_tensors
        pattern: Pattern | None = ctx.pattern
        grad_W = grad.t() @ x if pattern is None else pattern.transposed(grad) @ x
        sums = grad.sum(0) if pattern is None else pattern.column_sums(grad)
        has_b_enc, has_b_dec = ctx.biases
        return None, None, grad_W.t(), sums if has_b_enc else None, -(W_enc @ sums) if has_b_dec else None, None


class Decode(torch.autograd.Function):
    """Activations `values` [entries] of a pattern times W_dec [d_sae, d_in]."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, W_dec: Tensor, pattern: Pattern) -> Tensor:
        """The decoded rows [n, d_in]."""
        ctx.save_for_backward(values, W_dec)  # type: ignore[attr-defined]
        ctx.pattern = pattern  # type: ignore[attr-defined]
        return pattern.matrix(values) @ W_dec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients of what `forward` takes."""
        values, W_dec = ctx.saved_tensors
        return ctx.pattern.at(grad, W_dec), ctx.pattern.transposed(values) @ grad, None


class Fast:
    """What the fast training SAEs share; goes before sae-lens' class among the bases."""

    def initialize_weights(self: Any) -> None:
        """sae-lens' own, with the encoder laid out as its gradient comes: a feature's weights lie together."""
        super().initialize_weights()  # type: ignore[misc]
        self.W_enc = nn.Parameter(self.W_enc.data.t().contiguous().t())

    def process_state_dict_for_saving(self: Any, state_dict: dict[str, Any]) -> None:
        """Safetensors takes only tensors whose rows lie in order."""
        super().process_state_dict_for_saving(state_dict)  # type: ignore[misc]
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def pre_activations(self: Any, target: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The encoder's input [n, d_in] and all its pre-activations [n, d_sae], neither with a graph."""
        with torch.no_grad():
            x = self.process_sae_in(target)
            return x, x @ self.W_enc if bias is None else torch.addmm(bias, x, self.W_enc)

    def with_gradient(
        self: Any, pre: Tensor, x: Tensor, bias: Tensor | None, pattern: Pattern | None, columns: Tensor | None = None
    ) -> Tensor:
        """The same pre-activations with a graph to the encoder; `columns` where they are of some features alone."""
        W_enc = self.W_enc if columns is None else self.W_enc[:, columns]
        bias = bias if bias is None or columns is None else bias[columns]
        b_dec = self.b_dec if self.cfg.apply_b_dec_to_input else None
        return Encode.apply(pre, x, W_enc, bias, b_dec, pattern)


def squared_error(out: Tensor, target: Tensor) -> Tensor:
    """The squared distance [n, d_in] to [n, d_in], averaged over tokens."""
    return (out - target).pow(2).sum(dim=-1).mean()


def dead_loss(pre: Tensor, scores: Tensor, W_dec: Tensor, residual: Tensor) -> Tensor:
    """AuxK (arXiv 2406.04093, A.2) as sae-lens has it: dead features rebuild what the others left of the input.

    Args:
        pre: [n, dead] what dead features write with; scores: the same shape, by which the d_in / 2 highest are chosen.
        W_dec: [dead, d_in] their rows.
        residual: [n, d_in] without a graph.
    """
    dead, most = len(W_dec), residual.shape[-1] // 2
    chosen = scores.topk(min(most, dead), sorted=False).indices
    kept = torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen))
    return min(dead / most, 1.0) * squared_error(kept @ W_dec, residual)
