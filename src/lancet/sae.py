"""One sparse autoencoder: its weights and its exact arithmetic.

    x^ = norm_in(x) - b_dec            (the subtraction only where apply_b_dec_to_input)
    f  = activation(x^ W_enc + b_enc)
    y  = norm_out(f W_dec + b_dec)

`norm_in`/`norm_out` are the run-time normalisations of sae-lens (none, layer_norm, constant_norm_rescale); what an SAE
writes is therefore `scale(x) * f d`, with scale 1 unless it normalises each token. Arithmetic is float32 whatever the
model's dtype is. The file knows weights and tokens' values; it knows neither models nor text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lancet.errors import MismatchError, UsageError
from lancet.site import Site

if TYPE_CHECKING:
    import numpy as np

Architecture = Literal["standard", "jumprelu", "gated", "topk"]
Normalisation = Literal["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"]
Basis = Literal["plain", "centred"]

ARCHITECTURES: tuple[Architecture, ...] = ("standard", "jumprelu", "gated", "topk")
NORMALISATIONS: tuple[Normalisation, ...] = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale")
LAYER_NORM_EPS = 1e-5  # sae-lens adds it to the standard deviation, not to the variance
DENSE_BYTES = 256 << 20  # the largest dense block of activations that is ever held


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


@dataclass(repr=False, eq=False)
class Sae:
    """Weights and arithmetic of one SAE.

    Attributes:
        name: how it was opened.
        site: where it reads and writes.
        architecture: one of ARCHITECTURES.
        W_enc: [d_in, d_sae]; W_dec: [d_sae, d_in]; b_enc: [d_sae]; b_dec: [d_in].
        threshold: [d_sae], JumpReLU only.
        b_gate, r_mag, b_mag: [d_sae], gated only (b_enc is unused there).
        k: active features a token, TopK only.
        normalize: run-time normalisation of the input.
        apply_b_dec_to_input: whether b_dec is subtracted before encoding.
        rescale_by_decoder_norm: TopK only; activations are in units of the decoder's norm.
        basis: "centred" where it was trained on a model whose writing weights were centred, so that its input is
            x - mean(x).

    Raises:
        MismatchError: shapes that do not fit one another, or a part that the architecture needs is missing.
        UsageError: an architecture or normalisation that has no exact arithmetic here.
    """

    name: str
    site: Site
    architecture: Architecture
    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    b_enc: Tensor | None = None
    threshold: Tensor | None = None
    b_gate: Tensor | None = None
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None
    k: int = 0
    normalize: Normalisation = "none"
    apply_b_dec_to_input: bool = True
    rescale_by_decoder_norm: bool = False
    basis: Basis = "plain"

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise UsageError(f"{self.name} is a {self.architecture!r} SAE; supported: {', '.join(ARCHITECTURES)}")
        if self.normalize not in NORMALISATIONS:
            raise UsageError(f"{self.name} normalises by {self.normalize!r}; supported: {', '.join(NORMALISATIONS)}")
        needed = {
            "standard": ["b_enc"],
            "jumprelu": ["b_enc", "threshold"],
            "gated": ["b_gate", "r_mag", "b_mag"],
            "topk": ["b_enc"],
        }[self.architecture]
        shapes = {"W_enc": (self.d_in, self.d_sae), "W_dec": (self.d_sae, self.d_in), "b_dec": (self.d_in,)}
        for name in ("W_enc", "W_dec", "b_dec", *needed):
            tensor = getattr(self, name)
            wanted = shapes.get(name, (self.d_sae,))
            if tensor is None or tuple(tensor.shape) != wanted:
                got = "nothing" if tensor is None else tuple(tensor.shape)
                raise MismatchError(
                    f"{self.name}: {name} must have shape {wanted}, got {got}; the file is not this SAE's"
                )
            setattr(self, name, tensor.float())
        if self.architecture == "topk" and not 0 < self.k <= self.d_sae:
            raise MismatchError(f"{self.name}: k must be between 1 and {self.d_sae}, got {self.k}")
        if self.rescale_by_decoder_norm and self.architecture != "topk":
            raise UsageError(
                f"{self.name}: rescaling by the decoder's norm is defined for TopK SAEs, and this is a "
                f"{self.architecture} one; fold the norm into its weights first"
            )
        self.decoder_norm = self.W_dec.norm(dim=1)

    def __repr__(self) -> str:
        return f"Sae({self.name!r}, {self.site}, {self.architecture}, {self.d_in} -> {self.d_sae})"

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def normalises_tokens(self) -> bool:
        """Whether what is written depends on the token's own scale."""
        return self.normalize in ("layer_norm", "constant_norm_rescale")

    @property
    def column_wise(self) -> bool:
        """Whether one feature's activation can be had from its own encoder column alone."""
        return self.architecture != "topk"

    def check_feature(self, index: int) -> int:
        """Raises UsageError for an index that the SAE does not have."""
        if not 0 <= index < self.d_sae:
            raise UsageError(f"no feature #{index} in {self.name}; it has #0 to #{self.d_sae - 1}")
        return index

    def to(self, device: torch.device | str) -> Sae:
        """Moves the weights; returns itself."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    # ---- values in, activations out ----------------------------------------------------------------------------

    def _normalised(self, x: Tensor) -> Tensor:
        """[..., d_in] the encoder's input: basis, normalisation, b_dec."""
        x = x.float()
        if self.basis == "centred":
            x = x - x.mean(-1, keepdim=True)
        if self.normalize == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.std(-1, keepdim=True) + LAYER_NORM_EPS)
        elif self.normalize == "constant_norm_rescale":
            x = x / self.scale(x)
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def scale(self, x: Tensor) -> Tensor:
        """[..., 1] what one unit of decoder output is worth at `x`: 1 unless the SAE normalises each token."""
        x = x.float()
        if self.normalize == "layer_norm":
            return x.std(-1, keepdim=True)
        if self.normalize == "constant_norm_rescale":
            if self.basis == "centred":
                x = x - x.mean(-1, keepdim=True)
            return x.norm(dim=-1, keepdim=True) / self.d_in**0.5
        return torch.ones_like(x[..., :1])

    def encode(self, x: Tensor) -> Tensor:
        """Activations of all features.

        Args:
            x: [..., d_in] values at the site, in the model's own basis.

        Returns:
            [..., d_sae] dense; use `features` for anything large.
        """
        x = self._normalised(x)
        if self.architecture == "gated":
            gate = x @ self.W_enc
            return self._gated(gate, slice(None))
        assert self.b_enc is not None
        pre = (x @ self.W_enc).add_(self.b_enc)
        if self.architecture == "topk":
            return self._topk(pre)
        return self._pointwise(pre, slice(None))

    def encode_at(self, x: Tensor, features: Tensor) -> Tensor:
        """Activations of a few features: only their encoder columns are multiplied, where the architecture allows.

        Args:
            x: [..., d_in]; features: [m] indices.

        Returns:
            [..., m].
        """
        if not self.column_wise:
            return self.encode(x)[..., features]
        x = self._normalised(x)
        pre = x @ self.W_enc[:, features]
        if self.architecture == "gated":
            return self._gated(pre, features)
        assert self.b_enc is not None
        return self._pointwise(pre.add_(self.b_enc[features]), features)

    def features(self, x: Tensor) -> Features:
        """The active features of a list of tokens, computed in chunks of bounded size.

        Args:
            x: [tokens, d_in].
        """
        chunk = max(1, DENSE_BYTES // (4 * self.d_sae))
        parts = []
        for first in range(0, len(x), chunk):
            dense = self.encode(x[first : first + chunk])
            index = dense.nonzero()
            parts.append((index[:, 0] + first, index[:, 1], dense[index[:, 0], index[:, 1]]))
        empty = torch.zeros(0, dtype=torch.long, device=x.device)
        token, feature, value = (
            (torch.cat(p) for p in zip(*parts, strict=True)) if parts else (empty, empty, empty.float())
        )
        return Features(token, feature, value, (len(x), self.d_sae))

    def _pointwise(self, pre: Tensor, which: Tensor | slice) -> Tensor:
        if self.architecture == "jumprelu":
            assert self.threshold is not None
            return pre.relu() * (pre > self.threshold[which])
        return pre.relu_()

    def _gated(self, gate: Tensor, which: Tensor | slice) -> Tensor:
        # The constructor saw to it that a gated SAE has all three.
        assert self.r_mag is not None
        assert self.b_gate is not None
        assert self.b_mag is not None
        magnitude = (gate * self.r_mag[which].exp() + self.b_mag[which]).relu_()
        return magnitude * (gate + self.b_gate[which] > 0)

    def _topk(self, pre: Tensor) -> Tensor:
        if self.rescale_by_decoder_norm:
            pre = pre * self.decoder_norm
        top = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())

    # ---- activations in, values out ----------------------------------------------------------------------------

    def rows(self, features: Tensor) -> Tensor:
        """[m, d_in] what one unit of each feature's activation writes, before `scale`."""
        rows = self.W_dec[features]
        return rows / self.decoder_norm[features, None] if self.rescale_by_decoder_norm else rows

    def write(self, x: Tensor, change: Tensor, features: Tensor) -> Tensor:
        """How the value moves when activations change: decode(f + change) - decode(f).

        Args:
            x: [..., d_in] the value (only its scale matters, and only for SAEs that normalise each token).
            change: [..., m] change of each feature's activation; features: [m].

        Returns:
            [..., d_in] float32.
        """
        moved = change @ self.rows(features)
        return moved * self.scale(x) if self.normalises_tokens else moved

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        """The reconstruction, [..., d_in], of dense activations [..., d_sae] taken at `x` [..., d_in].

        It lies in the SAE's own basis; for a centred SAE the model's mean, which it never saw, is not in it.
        """
        if self.rescale_by_decoder_norm:
            f = f / self.decoder_norm
        out = f @ self.W_dec + self.b_dec
        return self._restored(out, x)

    def decode_features(self, features: Features, x: Tensor) -> Tensor:
        """The reconstruction of sparse activations: [tokens, d_in]."""
        out = self.b_dec.expand(features.shape[0], self.d_in).clone()
        chunk = max(1, DENSE_BYTES // (4 * self.d_in))
        for first in range(0, len(features.token), chunk):
            part = slice(first, first + chunk)
            out.index_add_(0, features.token[part], features.value[part, None] * self.rows(features.feature[part]))
        return self._restored(out, x)

    def in_basis(self, x: Tensor) -> Tensor:
        """`x` as the SAE sees it: what `decode` is to be compared with."""
        x = x.float()
        return x - x.mean(-1, keepdim=True) if self.basis == "centred" else x

    def _restored(self, out: Tensor, x: Tensor) -> Tensor:
        if self.normalises_tokens:
            out = out * self.scale(x)
        if self.normalize == "layer_norm":
            out = out + self.in_basis(x).mean(-1, keepdim=True)
        return out

    def shares(self, x: Tensor, features: Features) -> Tensor:
        """[nnz] each active feature's share of the reconstruction: `f d . (x^ - b) / |x^ - b|^2`.

        Over the active features of a token the shares sum to 1. Negative where a feature points away from the rest.
        """
        scale = self.scale(x)
        whole = torch.zeros(features.shape[0], self.d_in, device=x.device)
        chunk = max(1, DENSE_BYTES // (4 * self.d_in))
        pieces: Sequence[slice] = [slice(i, i + chunk) for i in range(0, len(features.token), chunk)]

        def written(part: slice) -> Tensor:
            token = features.token[part]
            return features.value[part, None] * self.rows(features.feature[part]) * scale[token]

        for part in pieces:
            whole.index_add_(0, features.token[part], written(part))
        size = whole.pow(2).sum(-1).clamp_min(1e-30)
        out = torch.empty_like(features.value)
        for part in pieces:
            token = features.token[part]
            out[part] = (written(part) * whole[token]).sum(-1) / size[token]
        return out


def random_sae(
    d_in: int,
    d_sae: int,
    architecture: Architecture = "standard",
    *,
    seed: int = 0,
    site: Site | None = None,
    **kwargs: Any,
) -> Sae:
    """An SAE of random weights, for tests and benchmarks of speed; it means nothing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, by: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * by

    W_dec = normal(d_sae, d_in)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True) * (1 + 0.3 * torch.rand(d_sae, 1, generator=generator))
    parts: dict[str, Tensor] = {"b_enc": normal(d_sae, by=0.1)}
    if architecture == "jumprelu":
        parts["threshold"] = torch.rand(d_sae, generator=generator) * 0.5
    if architecture == "gated":
        parts = {"b_gate": normal(d_sae, by=0.1), "r_mag": normal(d_sae, by=0.2), "b_mag": normal(d_sae, by=0.1)}
    kwargs.setdefault("k", min(8, d_sae) if architecture == "topk" else 0)
    return Sae(
        name=f"random-{architecture}",
        site=site or Site(0),
        architecture=architecture,
        W_enc=W_dec.t().clone() + normal(d_in, d_sae, by=0.02),
        W_dec=W_dec,
        b_dec=normal(d_in, by=0.1),
        **parts,
        **kwargs,
    )
