"""One sparse autoencoder or transcoder: its exact arithmetic.

    x^ = norm_in(x) - b_dec            (the subtraction only where apply_b_dec_to_input)
    f  = activation(x^ W_enc)          (architectures.py)
    y  = norm_out(f W_dec + b_dec) + beside(x)

`norm_in`/`norm_out` are the run-time normalisations of sae-lens; what an SAE writes is therefore `scale(x) * f d`, with
scale 1 unless it normalises each token. `beside` is what a reconstruction holds that no feature makes: a transcoder's
skip connection, a temporal SAE's prediction. A transcoder's y belongs to another site than its x. The file knows
weights (weights.py) and tokens' values; it knows neither models nor text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lancet import weights
from lancet.architectures import Temporal, temporal_codes
from lancet.features import Features
from lancet.site import Site
from lancet.weights import ARCHITECTURES, KINDS, NORMALISATIONS, Architecture, Normalisation, Weights

__all__ = ["ARCHITECTURES", "NORMALISATIONS", "Architecture", "Features", "Normalisation", "Sae", "random_sae"]
LAYER_NORM_EPS = 1e-5  # sae-lens adds it to the standard deviation, not to the variance
DENSE_BYTES = 256 << 20  # the largest dense block of activations that is ever held


@dataclass(repr=False, eq=False)
class Sae(Weights):
    """The arithmetic of one SAE; its attributes are those of `Weights`."""

    # ---- values in, activations out ----------------------------------------------------------------------------

    def in_basis(self, x: Tensor) -> Tensor:
        """The model's value at `site` as the SAE sees it."""
        x = x.float()
        if self.offset is not None:
            x = x - self.offset
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def out_basis(self, y: Tensor) -> Tensor:
        """The model's value at `writes` as the SAE would have it: what `decode` is to be compared with."""
        if not self.kind.transcoder:
            return self.in_basis(y)
        y = y.float()
        return y - y.mean(-1, keepdim=True) if self.centred_out else y

    def _normalised(self, x: Tensor) -> Tensor:
        """[..., d_in] the encoder's input: basis, normalisation, b_dec."""
        x = self.in_basis(x)
        if self.normalize == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.std(-1, keepdim=True) + LAYER_NORM_EPS)
        elif self.normalize == "constant_norm_rescale":
            x = x / (x.norm(dim=-1, keepdim=True) / self.d_in**0.5)
        elif self.normalize == "constant_scalar_rescale":
            x = x * self.scalar
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def scale(self, x: Tensor) -> Tensor:
        """[..., 1] what one unit of decoder output is worth at `x`: 1 unless the SAE normalises each token."""
        if self.normalises_tokens and self.normalize == "layer_norm":
            return self.in_basis(x).std(-1, keepdim=True)
        if self.normalises_tokens:
            return self.in_basis(x).norm(dim=-1, keepdim=True) / self.d_in**0.5
        return torch.ones_like(x[..., :1], dtype=torch.float32)

    def encode(self, x: Tensor) -> Tensor:
        """Activations of all features.

        Args:
            x: [..., d_in] values at the site, in the model's own basis; for a temporal SAE [..., tokens, d_in].

        Returns:
            [..., d_sae] dense; use `features` for anything large.
        """
        if self.kind.one is not None and self.one_piece:
            every = slice(0, self.d_sae)
            return self.kind.one(self, self._normalised(x) @ self.encoder(every), every)
        texts = x.reshape(-1, *x.shape[-2:]) if self.kind.contextual else [x.reshape(-1, self.d_in)]
        dense = [self.features(text).dense() for text in texts]
        return torch.stack(dense).view(*x.shape[:-1], self.d_sae)

    def encode_at(self, x: Tensor, features: Tensor) -> Tensor:
        """Activations of a few features: only their encoder columns are multiplied, where the architecture allows.

        Args:
            x: [..., d_in]; features: [m] indices.

        Returns:
            [..., m].
        """
        if self.kind.one is not None:
            return self.kind.one(self, self._normalised(x) @ self.encoder(features), features)
        if self.kind.contextual:
            return self.encode(x)[..., features]
        return self.features(x.reshape(-1, self.d_in)).columns(features).view(*x.shape[:-1], len(features))

    @property
    def tokens_at_once(self) -> int:
        """How many tokens are encoded together: what a dense block of activations has room for."""
        widest = max(self.d_in, *(part.stop - part.start for part in self.encoder_parts()))
        return max(1, DENSE_BYTES // (4 * widest))

    @torch.no_grad()
    def features(self, x: Tensor, keep: Tensor | None = None) -> Features:
        """The active features of a list of tokens, computed in pieces of bounded size.

        Args:
            x: [tokens, d_in]; for a temporal SAE one text from its beginning.
            keep: [tokens] True at the tokens that are wanted, which become the rows; None wants all.
        """
        wanted = torch.ones(len(x), dtype=torch.bool, device=x.device) if keep is None else keep
        if self.kind.contextual:
            token, feature, value = self.kind.find(self, self._normalised(x))
            inside = wanted[token]
            row = (wanted.cumsum(0) - 1)[token[inside]]
            return Features(row, feature[inside], value[inside], (int(wanted.sum()), self.d_sae))
        if keep is not None:
            x = x[keep]
        step = self.tokens_at_once
        parts = []
        for first in range(0, len(x), step):
            token, feature, value = self.kind.find(self, self._normalised(x[first : first + step]))
            parts.append((token + first, feature, value))
        empty = torch.zeros(0, dtype=torch.long, device=x.device)
        token, feature, value = (
            (torch.cat(p) for p in zip(*parts, strict=True)) if parts else (empty, empty, empty.float())
        )
        return Features(token, feature, value, (len(x), self.d_sae))

    def features_of(self, x: Tensor, keep: Tensor) -> Iterator[Features]:
        """The active features of padded texts, in one batch where the SAE allows and else text by text.

        Args:
            x: [batch, seq, d_in], padded on the right; keep: [batch, seq] True at the tokens that are wanted.
        """
        if self.kind.contextual:
            yield from (self.features(text, wanted) for text, wanted in zip(x, keep, strict=True))
        else:
            yield self.features(x[keep])

    # ---- activations in, values out ----------------------------------------------------------------------------

    def rows(self, features: Tensor | slice) -> Tensor:
        """[m, d_out] what one unit of each feature's activation writes, before `scale`."""
        rows = self.decoder(features)
        if self.rescale_by_decoder_norm:
            rows = rows / rows.norm(dim=1, keepdim=True)
        return rows / self.scalar if self.normalize == "constant_scalar_rescale" else rows

    def write(self, x: Tensor, change: Tensor, features: Tensor | slice) -> Tensor:
        """How the written value moves when activations change: decode(f + change) - decode(f).

        Args:
            x: [..., d_in] the value read (only its scale matters, and only for SAEs that normalise each token).
            change: [..., m] change of each feature's activation; features: [m].

        Returns:
            [..., d_out] float32.
        """
        moved = change @ self.rows(features)
        return moved * self.scale(x) if self.normalises_tokens else moved

    @property
    def bias(self) -> Tensor:
        """[d_out] what is decoded where no feature is lit, before `scale`."""
        added = not self.tied or self.apply_b_dec_to_input  # sae-lens' tied SAEs add what they subtracted, or nothing
        bias = self.b_dec if added else torch.zeros_like(self.b_dec)
        return bias / self.scalar if self.normalize == "constant_scalar_rescale" else bias

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        """The reconstruction, [..., d_out], of dense activations [..., d_sae] taken at `x` [..., d_in].

        It lies in the SAE's own basis; for a centred SAE the model's mean, which it never saw, is not in it.
        """
        out = self.bias + sum(f[..., part] @ self.rows(part) for part in self.pieces(self.d_out))
        return self._restored(out, x, self.beside(x))

    def decode_features(self, features: Features, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The reconstruction of sparse activations, [rows, d_out]; `x` and `keep` as `features` had them."""
        beside = self.beside(x)
        if keep is not None:
            x, beside = x[keep], None if beside is None else beside[keep]
        out = self.bias.expand(features.shape[0], self.d_out).clone()
        for part in self._entries(features):
            out.index_add_(0, features.token[part], features.value[part, None] * self.rows(features.feature[part]))
        return self._restored(out, x, beside)

    def beside(self, x: Tensor) -> Tensor | None:
        """[..., d_out] what a reconstruction holds that no feature makes, None where there is no such thing."""
        if self.W_skip is not None:
            return self.in_basis(x) @ self.W_skip.t()
        if self.temporal is None:
            return None
        texts = self._normalised(x).reshape(-1, *x.shape[-2:])
        predicted = torch.stack([temporal_codes(self, text)[1] for text in texts]).view(*x.shape[:-1], self.d_sae)
        return self.write(x, predicted, slice(None))

    def _restored(self, out: Tensor, x: Tensor, beside: Tensor | None) -> Tensor:
        if self.normalises_tokens:
            out = out * self.scale(x)
            if self.normalize == "layer_norm":
                out = out + self.in_basis(x).mean(-1, keepdim=True)
        return out if beside is None else out + beside

    def _entries(self, features: Features) -> Sequence[slice]:
        """Ranges of entries whose decoder rows are small enough to be held at once."""
        step = max(1, (DENSE_BYTES if self.one_piece else weights.PIECE_BYTES) // (4 * self.d_out))
        return [slice(first, first + step) for first in range(0, len(features.token), step)]

    def shares(self, x: Tensor, features: Features) -> Tensor:
        """[nnz] each active feature's share of what they make together: `f d . (x^ - b) / |x^ - b|^2`.

        Over the active features of a token the shares sum to 1. Negative where a feature points away from the rest.
        """
        scale = self.scale(x)
        whole = torch.zeros(features.shape[0], self.d_out, device=x.device)
        pieces = self._entries(features)

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
    d_out: int | None = None,
    **kwargs: Any,
) -> Sae:
    """An SAE of random weights, for tests and benchmarks of speed; it means nothing.

    A transcoder writes the `resid_post` of the block it reads unless `writes` says otherwise.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, by: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * by

    kind, site = KINDS[architecture], site or Site(0)
    d_out = d_out or d_in
    W_dec = normal(d_sae, d_out)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    if architecture != "matching_pursuit":  # which takes too much off where a row is longer than 1
        W_dec = W_dec * (1 + 0.3 * torch.rand(d_sae, 1, generator=generator))
    makers = {
        "b_enc": lambda: normal(d_sae, by=0.1),
        "threshold": lambda: torch.rand(d_sae, generator=generator) * 0.5,
        "b_gate": lambda: normal(d_sae, by=0.1),
        "r_mag": lambda: normal(d_sae, by=0.2),
        "b_mag": lambda: normal(d_sae, by=0.1),
        "W_skip": lambda: normal(d_out, d_in, by=0.2 / d_in**0.5),
    }
    parts: dict[str, Any] = {name: makers[name]() for name in kind.parts}
    W_enc = W_dec.t() + normal(d_in, d_sae, by=0.02) if d_out == d_in else normal(d_in, d_sae, by=1 / d_in**0.5)
    if kind.transcoder:
        kwargs.setdefault("writes", Site(site.layer, "resid_post"))
        kwargs["apply_b_dec_to_input"] = False
    if architecture == "matching_pursuit":
        kwargs["tied"] = True
    if architecture == "temporal" and "temporal" not in kwargs:
        heads = 2 if d_sae % 2 == 0 else 1
        kwargs.setdefault("tied", True)
        sizes = {"k_ctx": 2 * heads, "q_target": 2 * heads, "v_ctx": d_sae, "c_proj": d_sae}
        layer = {f"{name}.weight": normal(size, d_sae, by=d_sae**-0.5) for name, size in sizes.items()}
        layer |= {f"{name}.bias": normal(size, by=0.01) for name, size in sizes.items()}
        kwargs["temporal"] = Temporal(heads, min(8, d_sae), (layer,))
    kwargs.setdefault("k", min(8, d_sae) if architecture in ("topk", "abstopk") else 0)
    return Sae(
        name=f"random-{architecture}",
        site=site,
        architecture=architecture,
        W_enc=W_dec.t() if kwargs.get("tied") else W_enc.contiguous(),
        W_dec=W_dec,
        b_dec=normal(d_out, by=0.1),
        **parts,
        **kwargs,
    )
