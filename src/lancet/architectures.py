"""How each kind of SAE turns its input into activations: one function and one entry of the table each.

All of them get the encoder's input `x^` [n, d_in] (basis, normalisation and bias are done, see sae.py) and ask the SAE
for its encoder piece by piece, so that a million features never need a float32 copy of the whole matrix. The arithmetic
is that of sae-lens' inference classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from lancet.sae import Sae

# Token, feature and value of what is lit, sorted by token, then by feature.
Entries = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Architecture:
    """What an SAE of one kind needs and how it encodes.

    Attributes:
        find: the active features of `x^`.
        parts: the tensors that it needs beside the encoder, the decoder and `b_dec`.
        one: (sae, x^ W_enc[:, which], which) -> the activations of some features from their own encoder columns; None
            where a feature's activation depends on the others.
        transcoder: whether it reads at one site and writes at another.
        contextual: whether a token's activations depend on the tokens before it, so that `x^` must be one text.
        editable: whether its activations can be changed other than by an add.
    """

    find: Callable[[Sae, Tensor], Entries]
    parts: tuple[str, ...] = ()
    one: Callable[[Sae, Tensor, Tensor | slice], Tensor] | None = None
    transcoder: bool = False
    contextual: bool = False
    editable: bool = True


@dataclass(frozen=True)
class Pursuit:
    """When matching pursuit stops choosing features for a token.

    Attributes:
        residual_threshold: once what is left is shorter than this; 0 never does.
        max_iterations: after so many choices; None stands for d_in.
        stop_on_duplicate_support: once a choice brings no new feature.
    """

    residual_threshold: float = 1e-2
    max_iterations: int | None = None
    stop_on_duplicate_support: bool = True


@dataclass(frozen=True, eq=False)
class Temporal:
    """The attention over earlier tokens' codes that predicts what a temporal SAE (arXiv 2511.01836) leaves out.

    Attributes:
        heads: attention heads.
        k: features of what is new that are kept a token; None keeps all that are positive.
        layers: for each attention layer its weights under sae-lens' names, such as "k_ctx.weight".
    """

    heads: int
    k: int | None
    layers: tuple[dict[str, Tensor], ...]


# ---- each feature by itself ------------------------------------------------------------------------------------------


def _standard(sae: Sae, product: Tensor, which: Tensor | slice) -> Tensor:
    assert sae.b_enc is not None
    return product.add_(sae.b_enc[which]).relu_()


def _jumprelu(sae: Sae, product: Tensor, which: Tensor | slice) -> Tensor:
    assert sae.b_enc is not None
    assert sae.threshold is not None
    pre = product.add_(sae.b_enc[which])
    return pre.mul_(pre > sae.threshold[which]).relu_()


def _gated(sae: Sae, product: Tensor, which: Tensor | slice) -> Tensor:
    assert sae.r_mag is not None
    assert sae.b_gate is not None
    assert sae.b_mag is not None
    magnitude = (product * sae.r_mag[which].exp()).add_(sae.b_mag[which]).relu_()
    return magnitude.mul_(product.add_(sae.b_gate[which]) > 0)


def _each(sae: Sae, x: Tensor) -> Entries:
    one = ARCHITECTURES[sae.architecture].one
    assert one is not None
    found = _Found(x.device)
    for which, product in sae.products(x):
        dense = one(sae, product, which)
        token, feature = dense.nonzero().unbind(1)
        found.add(token, feature + which.start, dense[token, feature])
    token, feature, value = found.entries()
    if len(sae.encoder_parts()) == 1:
        return token, feature, value
    order = (token * sae.d_sae + feature).argsort()
    return token[order], feature[order], value[order]


class _Found:
    """Entries as they are found, in room that doubles when it is full.

    Small tensors kept between large short-lived ones would cut the allocator's heap to pieces: of a million features
    read in 138 pieces, 33 MB were lost at each.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self.room = (
            torch.empty(1 << 14, dtype=torch.long, device=device),
            torch.empty(1 << 14, dtype=torch.long, device=device),
            torch.empty(1 << 14, dtype=torch.float32, device=device),
        )

    def add(self, token: Tensor, feature: Tensor, value: Tensor) -> None:
        end = self.count + len(value)
        if end > len(self.room[0]):
            longer = tuple(held.new_empty(max(end, 2 * len(held))) for held in self.room)
            for new, held in zip(longer, self.room, strict=True):
                new[: self.count] = held[: self.count]
            self.room = longer  # type: ignore[assignment]
        for held, new in zip(self.room, (token, feature, value), strict=True):
            held[self.count : end] = new
        self.count = end

    def entries(self) -> Entries:
        token, feature, value = (held[: self.count].clone() for held in self.room)
        return token, feature, value


# ---- the k strongest -------------------------------------------------------------------------------------------------


def _strongest(sae: Sae, x: Tensor) -> Entries:
    """TopK keeps the k largest and then only what is positive; AbsTopK (arXiv 2510.00404) the k largest either way."""
    assert sae.b_enc is not None
    by_size, n, k = sae.architecture == "abstopk", len(x), sae.k
    # The best so far, and behind them the best of the next piece.
    value, feature = x.new_zeros(n, 2 * k), torch.zeros(n, 2 * k, dtype=torch.long, device=x.device)
    filled = 0
    for which, pre in sae.products(x):
        pre.add_(sae.b_enc[which])
        if sae.rescale_by_decoder_norm:
            pre.mul_(sae.decoder_norm[which])
        best = (pre.abs() if by_size else pre).topk(min(k, pre.shape[1]), dim=1, sorted=False).indices
        end = filled + best.shape[1]
        value[:, filled:end] = pre.gather(1, best)
        feature[:, filled:end] = best + which.start
        if end > k:
            held = value[:, :end]
            best = (held.abs() if by_size else held).topk(k, dim=1, sorted=False).indices
            value[:, :k], feature[:, :k] = held.gather(1, best), feature[:, :end].gather(1, best)
        filled = min(end, k)
    feature, order = feature[:, :filled].sort(dim=1)
    value = value.gather(1, order)
    lit = (value != 0) if by_size else (value > 0)
    return lit.nonzero()[:, 0], feature[lit], value[lit]


# ---- one after another -----------------------------------------------------------------------------------------------


def _pursue(sae: Sae, x: Tensor) -> Entries:
    """Matching pursuit: the feature that fits best is taken off, and so on with what is left of the token."""
    stop = sae.pursuit
    n, left, room = len(x), x.clone(), sae.room(x)
    done = torch.zeros(n, dtype=torch.bool, device=x.device)
    most = sae.d_in if stop.max_iterations is None else stop.max_iterations
    chosen = torch.zeros(n, most, dtype=torch.long, device=x.device)
    values = x.new_zeros(n, most)
    for i in range(most):
        if not n or bool(done.all()):
            break
        fit = x.new_full((n,), -torch.inf)
        best = torch.zeros(n, dtype=torch.long, device=x.device)
        for which, product in sae.products(left, room):
            found = product.max(1)
            better = found.values > fit
            fit = torch.where(better, found.values, fit)
            best = torch.where(better, found.indices + which.start, best)
        rows = sae.decoder(best)
        value = (left * rows).sum(-1).relu() * ~done
        left -= value[:, None] * rows
        if stop.stop_on_duplicate_support:
            known = ((chosen[:, :i] == best[:, None]) & (values[:, :i] > 0)).any(1)
            done |= known | (value == 0)
        chosen[:, i], values[:, i] = best, value
        if stop.residual_threshold > 0:
            done |= left.norm(dim=-1) < stop.residual_threshold
    token = torch.arange(n, device=x.device)[:, None].expand_as(chosen)
    lit = values > 0
    keys, place = (token[lit] * sae.d_sae + chosen[lit]).unique(return_inverse=True)
    total = x.new_zeros(len(keys)).index_add_(0, place, values[lit])
    return keys // sae.d_sae, keys % sae.d_sae, total


# ---- what the tokens before do not predict ---------------------------------------------------------------------------


def temporal_codes(sae: Sae, x: Tensor) -> tuple[Tensor, Tensor]:
    """The new and the predicted codes of one text.

    Args:
        x: [tokens, d_in] the encoder's input.

    Returns:
        [tokens, d_sae] each. Features are the new ones; a reconstruction decodes the sum of both.
    """
    assert sae.temporal is not None
    encoder, decoder = sae.encoder(slice(None)), sae.decoder(slice(None))
    small, tiny = 1 / (4 * sae.d_in), 1e-6
    left = x
    predicted = x.new_zeros(len(x), sae.d_sae)
    for layer in sae.temporal.layers:
        code = (left * small @ encoder).relu()
        before = torch.cat([torch.zeros_like(code[:1]), code[:-1]])
        guess = _attend(layer, sae.temporal.heads, before, code).relu()
        written = guess @ decoder
        size = written.norm(dim=-1, keepdim=True) + tiny
        part = (written * left).sum(-1, keepdim=True) / size.pow(2)
        predicted = predicted + guess * part
        left = left - part * written
    new = (left * small @ encoder).relu()
    if sae.temporal.k is not None:
        best = new.topk(sae.temporal.k, dim=-1)
        new = torch.zeros_like(new).scatter_(-1, best.indices, best.values)
    return new, predicted


def _attend(layer: dict[str, Tensor], heads: int, before: Tensor, now: Tensor) -> Tensor:
    def linear(name: str, value: Tensor) -> Tensor:
        return functional.linear(value, layer[f"{name}.weight"].float(), layer[f"{name}.bias"].float())

    def by_head(value: Tensor) -> Tensor:
        return value.view(len(value), heads, -1).transpose(0, 1)[None]

    k, v, q = linear("k_ctx", before), linear("v_ctx", before), linear("q_target", now)
    out = functional.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v), is_causal=True)
    return linear("c_proj", out[0].transpose(0, 1).reshape(len(now), -1))


def _temporal(sae: Sae, x: Tensor) -> Entries:
    new, _ = temporal_codes(sae, x)
    token, feature = new.nonzero().unbind(1)
    return token, feature, new[token, feature]


ARCHITECTURES: dict[str, Architecture] = {
    "standard": Architecture(_each, ("b_enc",), _standard),
    "jumprelu": Architecture(_each, ("b_enc", "threshold"), _jumprelu),
    "gated": Architecture(_each, ("b_gate", "r_mag", "b_mag"), _gated),
    "topk": Architecture(_strongest, ("b_enc",)),
    "abstopk": Architecture(_strongest, ("b_enc",)),
    "matching_pursuit": Architecture(_pursue, editable=False),
    "temporal": Architecture(_temporal, contextual=True, editable=False),
    "transcoder": Architecture(_each, ("b_enc",), _standard, transcoder=True),
    "skip_transcoder": Architecture(_each, ("b_enc", "W_skip"), _standard, transcoder=True),
    "jumprelu_transcoder": Architecture(_each, ("b_enc", "threshold"), _jumprelu, transcoder=True),
    "jumprelu_skip_transcoder": Architecture(_each, ("b_enc", "threshold", "W_skip"), _jumprelu, transcoder=True),
}
