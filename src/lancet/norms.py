"""Norms taken apart: LayerNorm or RMSNorm, and with which gain, told by what the module returns.

Names and classes do not tell: Gemma's gain is 1 + w, and remote code calls its norms what it likes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "layer_norm_epsilon")


@dataclass(frozen=True)
class Norm:
    """A norm taken apart: `out = normalised(x) * gain + bias`.

    Attributes:
        module: the norm itself.
        centred: LayerNorm rather than RMSNorm.
        eps: added to the variance.
        gain: [d_model] float32, as it multiplies (for Gemma 1 + w).
        bias: [d_model] float32, None where there is none.
    """

    module: torch.nn.Module
    centred: bool
    eps: float
    gain: Tensor
    bias: Tensor | None

    def normalised(self, x: Tensor) -> Tensor:
        """[..., d_model] float32, before the gain."""
        x = x.float()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


def take_apart(module: torch.nn.Module, width: int) -> Norm | None:
    """The parts of a norm, read off what it returns; None where it is neither a LayerNorm nor an RMSNorm.

    A vector of +1 and -1 in turn is its own normalisation, centred or not, so the module's outputs for it and for its
    negative give gain and bias. The result is then held against the module on ordinary vectors, small ones included.
    """
    from accelerate.utils import align_module_device

    with align_module_device(module):  # brings weights that accelerate keeps elsewhere
        return _take_apart(module, width)


def _take_apart(module: torch.nn.Module, width: int) -> Norm | None:
    import torch

    eps = next((float(getattr(module, name)) for name in EPS_NAMES if hasattr(module, name)), None)
    weight = getattr(module, "weight", None)
    if eps is None or weight is None or width % 2:
        return None
    probe = torch.ones(1, 1, width, device=weight.device, dtype=torch.float32)
    probe[..., 1::2] = -1
    with torch.no_grad():
        plus, minus = (module((sign * probe).to(weight.dtype))[0, 0].float() for sign in (1, -1))
        gain = (plus - minus) / 2 * (1 + eps) ** 0.5 / probe[0, 0]
        held = weight.detach().float()
        gain = min((held, 1 + held), key=lambda known: float((known - gain).abs().max()))
        bias = getattr(module, "bias", None)
        x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) + 0.5
        x = (x * torch.tensor([1.0, 30.0, 1e-2, 1e-3])[:, None])[None].to(weight)
        real = module(x).float()
    bias = None if bias is None else bias.detach().float()

    def error(norm: Norm) -> float:
        ours, shift = norm.normalised(x) * gain, 0 if bias is None else bias
        room = torch.finfo(weight.dtype).eps * (ours.abs() + gain.abs() + abs(shift))
        return float(((ours + shift - real).abs() / room.clamp_min(1e-30)).max())

    best = min((Norm(module, centred, eps, gain, bias) for centred in (False, True)), key=error)
    return best if error(best) <= 4 else None
