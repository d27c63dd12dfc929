"""What an SAE is made of: its weights and settings, where they lie, and how they are had piece by piece.

Arithmetic is float32 whatever the weights' dtype is. Small matrices are kept in float32; large ones stay as they are in
their file, mapped, and only the rows and columns that are needed are converted (and, where the whole would not fit a
card, brought there).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from lancet.architectures import ARCHITECTURES as KINDS
from lancet.architectures import Architecture as Kind
from lancet.architectures import Pursuit, Temporal
from lancet.errors import MismatchError, UsageError
from lancet.site import Site

Architecture = Literal[
    "standard",
    "jumprelu",
    "gated",
    "topk",
    "abstopk",
    "matching_pursuit",
    "temporal",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
]
# Of these, expected_average_only_in and covariance_whitening are folded into the weights and do nothing at run time.
Normalisation = Literal[
    "none",
    "expected_average_only_in",
    "covariance_whitening",
    "layer_norm",
    "constant_norm_rescale",
    "constant_scalar_rescale",
]

ARCHITECTURES: tuple[Architecture, ...] = Architecture.__args__  # type: ignore[attr-defined]
NORMALISATIONS: tuple[Normalisation, ...] = Normalisation.__args__  # type: ignore[attr-defined]
COPY_BYTES = 512 << 20  # matrices that take no more than this in float32 are kept so: no conversion at each use
PIECE_BYTES = 64 << 20  # of a larger matrix so much is in float32 at once
MATRICES = ("W_enc", "W_dec")


def share_of(device: torch.device | str) -> int | None:
    """The bytes that SAEs may take on a device when nobody says: half of what is free on a card, all on a processor.

    The other half is for the keys, values and activations that are still to come.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    if kind == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()) // 2
    return None


@dataclass(repr=False, eq=False)
class Weights:
    """The weights of one SAE.

    Attributes:
        name: how it was opened.
        site: where it reads.
        architecture: one of ARCHITECTURES.
        W_enc: [d_in, d_sae]; W_dec: [d_sae, d_out]; b_enc: [d_sae]; b_dec: [d_out]; d_out is d_in but for transcoders.
        threshold: [d_sae], JumpReLU only.
        b_gate, r_mag, b_mag: [d_sae], gated only (b_enc is unused there).
        W_skip: [d_out, d_in], skip transcoders only.
        k: active features a token, TopK and AbsTopK only.
        normalize: run-time normalisation of the input.
        scalar: what constant_scalar_rescale multiplies the input by.
        apply_b_dec_to_input: whether b_dec is subtracted before encoding.
        rescale_by_decoder_norm: TopK and AbsTopK only; activations are in units of the decoder's norm.
        tied: whether W_enc is a view of W_dec's transpose (matching pursuit always, temporal SAEs mostly).
        pursuit, temporal: settings of those two architectures.
        writes: where its decoding goes: the site it reads, but for transcoders.
        offset: [d_in] subtracted from the model's value before anything else, where the SAE was trained on a model that
            had it folded into other weights.
        centred: whether it was trained on values less their mean over the vector (writing weights centred).
        centred_out: the same of the value that a transcoder writes.
        page: the address of its public page, None where it has none; a feature's own is `page`/index.
        trained_on: the fingerprint of the model that `lancet train` trained these very weights on, None where no record
            tells.
        stated: what its release states: "l0", "explained"; what is not stated is not in it.

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
    W_skip: Tensor | None = None
    k: int = 0
    normalize: Normalisation = "none"
    scalar: float = 1.0
    apply_b_dec_to_input: bool = True
    rescale_by_decoder_norm: bool = False
    tied: bool = False
    pursuit: Pursuit = field(default_factory=Pursuit)
    temporal: Temporal | None = None
    writes: Site = None  # type: ignore[assignment]  # the constructor sets it to `site`
    offset: Tensor | None = None
    centred: bool = False
    centred_out: bool = False
    page: str | None = None
    trained_on: str | None = None
    stated: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.architecture not in KINDS:
            raise UsageError(f"{self.name} is a {self.architecture!r} SAE; supported: {', '.join(KINDS)}")
        if self.normalize not in NORMALISATIONS:
            raise UsageError(f"{self.name} normalises by {self.normalize!r}; supported: {', '.join(NORMALISATIONS)}")
        self._check_shapes()
        self._check_settings()
        self._small = 4 * (self.W_enc.numel() * (not self.tied) + self.W_dec.numel()) <= COPY_BYTES
        for name, tensor in self.tensors():
            if "." not in name and (self._small or name not in MATRICES):
                setattr(self, name, tensor.detach().float())
        if self.tied:
            self.W_enc = self.W_dec.t()

    def _check_shapes(self) -> None:
        d_in, d_sae, d_out = self.d_in, self.d_sae, self.d_out
        if not self.kind.transcoder:
            d_out = d_in
        shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
        for name in ("W_enc", "W_dec", "b_dec", *self.kind.parts):
            tensor = getattr(self, name)
            wanted = shapes.get(name, (d_sae,))
            if tensor is None or tuple(tensor.shape) != wanted:
                got = "nothing" if tensor is None else tuple(tensor.shape)
                raise MismatchError(
                    f"{self.name}: {name} must have shape {wanted}, got {got}; the file is not this SAE's"
                )
        if self.offset is not None and tuple(self.offset.shape) != (d_in,):
            raise MismatchError(f"{self.name}: offset must have shape {(d_in,)}, got {tuple(self.offset.shape)}")

    def _check_settings(self) -> None:
        ranked = self.architecture in ("topk", "abstopk")
        if ranked and not 0 < self.k <= self.d_sae:
            raise MismatchError(f"{self.name}: k must be between 1 and {self.d_sae}, got {self.k}")
        if self.rescale_by_decoder_norm and not ranked:
            raise UsageError(
                f"{self.name}: rescaling by the decoder's norm is defined for TopK SAEs, and this is a "
                f"{self.architecture} one; fold the norm into its weights first"
            )
        if self.normalize == "constant_scalar_rescale" and self.architecture != "temporal":
            raise UsageError(f"{self.name}: constant_scalar_rescale is defined for temporal SAEs alone")
        if self.architecture == "temporal" and self.temporal is None:
            raise MismatchError(f"{self.name}: a temporal SAE needs its attention layers, and has none")
        if self.kind.transcoder and self.apply_b_dec_to_input:
            raise UsageError(f"{self.name}: a transcoder's b_dec belongs to what it writes; it cannot be subtracted")
        self.writes = self.writes or self.site
        if self.kind.transcoder != (self.writes != self.site):
            raise UsageError(
                f"{self.name} is a {self.architecture} SAE that reads {self.site} and writes {self.writes}; "
                f"transcoders write elsewhere than they read, and other SAEs do not"
            )
        if self.writes < self.site:
            raise UsageError(f"{self.name} writes {self.writes}, which is computed before {self.site}, which it reads")

    def __repr__(self) -> str:
        where = f"{self.site} -> {self.writes}" if self.kind.transcoder else f"{self.site}"
        return f"Sae({self.name!r}, {where}, {self.architecture}, {self.d_in} -> {self.d_sae})"

    # ---- facts -------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> Kind:
        """What its architecture can do."""
        return KINDS[self.architecture]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it computes; large matrices may lie elsewhere (`place`)."""
        return self.b_dec.device

    @property
    def normalises_tokens(self) -> bool:
        """Whether what is written depends on the token's own scale."""
        return self.normalize in ("layer_norm", "constant_norm_rescale") and not self.kind.transcoder

    @property
    def column_wise(self) -> bool:
        """Whether one feature's activation can be had from its own encoder column alone."""
        return self.kind.one is not None

    @cached_property
    def decoder_norm(self) -> Tensor:
        """[d_sae] length of each decoder row."""
        return torch.cat([self.decoder(part).norm(dim=1) for part in self.pieces(self.d_out)])

    def check_feature(self, index: int) -> int:
        """Raises UsageError for an index that the SAE does not have."""
        if not 0 <= index < self.d_sae:
            raise UsageError(f"no feature #{index} in {self.name}; it has #0 to #{self.d_sae - 1}")
        return index

    # ---- weights -----------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every weight; a tied encoder is the decoder and is left out."""
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor) and name != "decoder_norm" and not (self.tied and name == "W_enc"):
                yield name, value
        for i, layer in enumerate(self.temporal.layers if self.temporal else ()):
            yield from ((f"attn_layers.{i}.{name}", value) for name, value in layer.items())

    def place(self, device: torch.device | str, limit: int | None = None) -> Self:
        """Makes it compute on a device, and returns itself.

        Args:
            device: where values will come from.
            limit: the most bytes that it may take there. Where its matrices take more, they stay where they are, and
                only the rows and pieces that are needed go over.
        """
        held = sum(tensor.nbytes for name, tensor in self.tensors() if name in MATRICES)
        stay = limit is not None and held > limit
        for name, tensor in self.tensors():
            if "." not in name and not (stay and name in MATRICES):
                setattr(self, name, tensor.to(device))
        if self.temporal is not None:
            layers = tuple({name: value.to(device) for name, value in layer.items()} for layer in self.temporal.layers)
            self.temporal = Temporal(self.temporal.heads, self.temporal.k, layers)
        if self.tied:
            self.W_enc = self.W_dec.t()
        self.__dict__.pop("decoder_norm", None)
        return self

    def bytes_on(self, device: torch.device | str) -> int:
        """How many bytes of its weights lie on a device."""
        kind = torch.device(device).type
        return sum(tensor.nbytes for _, tensor in self.tensors() if tensor.device.type == kind)

    @property
    def one_piece(self) -> bool:
        """Whether a matrix can be had whole at no cost."""
        return self._small and self.W_dec.device == self.device

    def encoder_parts(self) -> list[slice]:
        """Ranges of features whose encoder columns are small enough to be converted at once."""
        return self.pieces(self.d_in)

    def room(self, x: Tensor) -> Tensor:
        """Room for the largest of the `products` of `x` [n, d_in]."""
        widest = max(part.stop - part.start for part in self.encoder_parts())
        return torch.empty(len(x) * widest, device=x.device)

    def products(self, x: Tensor, room: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """`x W_enc` piece by piece: a range of features and [n, its length], which the next piece overwrites.

        Args:
            x: [n, d_in] float32; room: from `room`, where the same is to be done often.
        """
        room = self.room(x) if room is None else room
        for which in self.encoder_parts():
            width = which.stop - which.start
            yield which, torch.mm(x, self.encoder(which), out=room[: len(x) * width].view(len(x), width))

    def pieces(self, width: int) -> list[slice]:
        """Ranges of features of which `width` numbers each are small enough to be held in float32."""
        if self.one_piece:
            return [slice(0, self.d_sae)]
        step = max(1, PIECE_BYTES // (4 * width))
        return [slice(first, min(first + step, self.d_sae)) for first in range(0, self.d_sae, step)]

    def encoder(self, which: Tensor | slice) -> Tensor:
        """[d_in, m] float32 encoder columns of some features."""
        if isinstance(which, Tensor):
            which = which.to(self.W_enc.device)
        return self.W_enc[:, which].to(self.device).float()

    def decoder(self, which: Tensor | slice) -> Tensor:
        """[m, d_out] float32 decoder rows of some features, as they stand in the file; see `rows`."""
        if isinstance(which, Tensor):
            which = which.to(self.W_dec.device)
        return self.W_dec[which].to(self.device).float()
