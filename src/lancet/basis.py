"""The basis that an SAE was trained in: what TransformerLens had done to the model's weights.

TransformerLens can rewrite a model so that it computes the same and some values inside it differ: writing weights
centred (the stream less its mean), value biases folded into the output bias (z less a constant), norms' gains folded
into the weights that follow (the MLP reads the normalised value). What that does to a value is undone by arithmetic on
the SAE's side, so that the model stays as it is. Held against TransformerLens' own processing in tests/test_basis.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lancet.errors import MismatchError, UsageError
from lancet.site import Site

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.sae import Sae

# The stream and what is added to it.
WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp.hook_out")


@dataclass(frozen=True)
class Basis:
    """TransformerLens' processing of a model, as far as it moves values; nothing of it by default.

    Attributes:
        center_writing_weights: the stream and all that is added to it lack their mean (models with LayerNorm only).
        fold_value_biases: z lacks the value bias.
        fold_ln: gains and biases of norms are in the weights that follow.
        refactor_factored_attn_matrices: each head's values are rotated.
    """

    center_writing_weights: bool = False
    fold_value_biases: bool = False
    fold_ln: bool = False
    refactor_factored_attn_matrices: bool = False

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> Basis:
        """The basis that sae-lens' `model_from_pretrained_kwargs` state.

        sae-lens trains on `HookedTransformer.from_pretrained_no_processing(name, **kwargs)`, so that what a stated
        set leaves out was not done. No set at all states nothing: SAEs older than that rule were trained otherwise.

        Raises:
            UsageError: nothing is stated.
        """
        if not kwargs:
            raise UsageError("nothing states how the SAE's model was loaded; say --basis plain or --basis centred")
        return cls(**{name: bool(kwargs.get(name, False)) for name in cls.__dataclass_fields__})


def put_in_basis(sae: Sae, model: Model, basis: Basis) -> Sae:
    """The SAE set to read values of `model` as it was trained to; a shallow copy.

    Args:
        sae: with its site and, for a transcoder, the site that it writes.
        basis: what had been done to the model that it was trained on.

    Raises:
        MismatchError: the open model was processed itself, and what the SAE needs is gone from it.
        UsageError: the basis cannot be had exactly at that site.
    """
    out = copy.copy(sae)
    own = model.processed
    if sae.site.kind == "mlp.hook_in":
        if basis.fold_ln:  # with the gain in its weights the MLP reads the normalised value
            out.site = Site(sae.site.layer, "ln2.hook_normalized")
        elif own.fold_ln:
            raise MismatchError(_gone(sae, model, "fold_ln"))
    out.centred = _centred(sae, sae.site, model, basis)
    out.centred_out = _centred(sae, sae.writes, model, basis)
    out.offset = _offset(sae, model, basis)
    if out.writes == sae.site:
        out.writes = out.site
    return out


def _centred(sae: Sae, site: Site, model: Model, basis: Basis) -> bool:
    if site.kind not in WRITTEN or not model.is_layer_norm:
        return False  # TransformerLens centres no model with RMSNorm, which would notice
    if basis.center_writing_weights:
        model.check_centring()
    elif model.processed.center_writing_weights:
        raise MismatchError(_gone(sae, model, "center_writing_weights"))
    return basis.center_writing_weights


def _offset(sae: Sae, model: Model, basis: Basis) -> Tensor | None:
    if sae.site.kind != "z":
        return None
    if basis.refactor_factored_attn_matrices or model.processed.refactor_factored_attn_matrices:
        raise UsageError(f"{sae.name} was trained on heads whose values were rotated, which cannot be undone exactly")
    if basis.fold_value_biases:
        bias = model.value_bias(sae.site.layer, basis.fold_ln)
        return None if bias is None else bias.to(sae.device)
    if model.processed.fold_value_biases:
        raise MismatchError(_gone(sae, model, "fold_value_biases"))
    return None


def _gone(sae: Sae, model: Model, flag: str) -> str:
    return (
        f"{sae.name} was trained on a model without {flag}, and {model.name} was loaded with it: what it would read is "
        f"gone. Load the model with from_pretrained_no_processing, or open it by name"
    )
