"""Of what a model and an SAE are, by samples of their weights: cheap, and another one differs everywhere.

What is measured once and kept (facts, bases, self-tests, an atlas) is kept under these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lancet.site import Site

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.sae import Sae

OF_MODEL, OF_SAE = 64, 4096  # numbers taken of each tensor, at least


def of_model(model: Model) -> str:
    """Of a model's weights, its dtype and its start token."""
    digest = hashlib.sha256(f"{model.dtype} {model.start_plain}".encode())
    _sample(digest, model.parameters_below(Site(model.n_layers - 1, "resid_post")), OF_MODEL)
    return digest.hexdigest()[:24]


def of_sae(sae: Sae) -> str:
    """Of an SAE's weights as they are stored, whatever it is called and wherever it lies."""
    digest = hashlib.sha256(f"{sae.site} {sae.architecture}".encode())
    _sample(digest, (value for _, value in sorted(sae.tensors())), OF_SAE)
    return digest.hexdigest()[:24]


def of_pair(model: Model, sae: Sae) -> str:
    """Of an SAE, and of all in the model that the values at its site depend on."""
    told = (sae.site, sae.writes, sae.architecture, sae.normalize, sae.scalar, sae.centred, sae.k)
    told += (sae.apply_b_dec_to_input, sae.pursuit, sae.temporal and (sae.temporal.heads, sae.temporal.k))
    digest = hashlib.sha256(f"{told} {sae.rescale_by_decoder_norm} {model.dtype} {model.start_plain}".encode())
    _sample(digest, (value for _, value in sorted(sae.tensors())), OF_SAE)
    _sample(digest, model.parameters_below(sae.writes), OF_MODEL)
    return digest.hexdigest()[:24]


def _sample(digest: hashlib._Hash, tensors: Iterable[Tensor], count: int) -> None:
    for tensor in tensors:
        flat = tensor.detach().flatten()
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(flat[:: max(1, len(flat) // count)].float().cpu().numpy().tobytes())
