"""A sparse batch of activations: which features are lit at which tokens, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Features:
    """A sparse batch of activations, sorted by token, then by feature.

    Attributes:
        token: [nnz] row of each entry.
        feature: [nnz] feature of each entry.
        value: [nnz] activation, float32; zero is never stored.
        shape: (tokens, d_sae).
    """

    token: Tensor
    feature: Tensor
    value: Tensor
    shape: tuple[int, int]

    def __repr__(self) -> str:
        return f"Features({self.shape[0]} tokens, {len(self.value)} active of {self.shape[1]} features)"

    def of_token(self, token: int) -> tuple[Tensor, Tensor]:
        """(features, values) of one token, strongest first."""
        begin, end = torch.searchsorted(self.token, torch.tensor([token, token + 1], device=self.token.device)).tolist()
        order = self.value[begin:end].abs().argsort(descending=True)
        return self.feature[begin:end][order], self.value[begin:end][order]

    def of_feature(self, feature: int) -> Tensor:
        """[tokens] activation of one feature at every token."""
        out = torch.zeros(self.shape[0], device=self.value.device)
        chosen = self.feature == feature
        out[self.token[chosen]] = self.value[chosen]
        return out

    def columns(self, features: Tensor) -> Tensor:
        """[tokens, m] activations of a few features, [m] indices, at every token."""
        distinct, place = features.unique(return_inverse=True)  # sorted
        at = torch.searchsorted(distinct, self.feature).clamp_max(len(distinct) - 1)
        chosen = distinct[at] == self.feature
        out = torch.zeros(self.shape[0], len(distinct), device=self.value.device)
        out[self.token[chosen], at[chosen]] = self.value[chosen]
        return out[:, place]

    def l0(self) -> Tensor:
        """[tokens] how many features are lit."""
        return torch.bincount(self.token, minlength=self.shape[0])

    def dense(self) -> Tensor:
        """[tokens, d_sae]; for small batches and tests."""
        out = torch.zeros(self.shape, device=self.value.device)
        out[self.token, self.feature] = self.value
        return out

    def to_scipy(self) -> Any:
        """The same as a scipy CSR matrix."""
        from scipy.sparse import csr_matrix

        entry: tuple[np.ndarray, tuple[np.ndarray, np.ndarray]] = (
            self.value.cpu().numpy(),
            (self.token.cpu().numpy(), self.feature.cpu().numpy()),
        )
        return csr_matrix(entry, shape=self.shape)
