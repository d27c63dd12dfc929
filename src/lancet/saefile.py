"""From what sae-lens keeps of an SAE (a config of its version 6 and named tensors) to what `Sae` is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lancet.architectures import ARCHITECTURES, Pursuit, Temporal
from lancet.errors import DamagedError, UsageError
from lancet.weights import KINDS

TENSORS = ("W_enc", "W_dec", "b_dec", *sorted({part for kind in ARCHITECTURES.values() for part in kind.parts}))
_ATTENTION = ("k_ctx", "q_target", "v_ctx", "c_proj")


def parts(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `Sae` that say how it computes: weights and settings, but neither name nor sites.

    Args:
        name: what errors call it.
        config: sae-lens 6's.
        tensors: of the state that sae-lens saves. None is copied.

    Raises:
        UsageError: an architecture, or a setting of one, that has no exact arithmetic here.
        DamagedError: tensors are missing.
    """
    architecture = config.get("architecture", "unnamed")
    if architecture not in KINDS:
        raise UsageError(f"{name} is a {architecture!r} SAE; supported: {', '.join(KINDS)}")
    if (config.get("metadata") or {}).get("hook_head_index") is not None:
        raise UsageError(f"{name} reads a single attention head, which is not supported; choose another SAE")
    found: dict[str, Any] = {part: tensors[part] for part in TENSORS if part in tensors}
    if lacking := [part for part in ("W_dec", "b_dec") if part not in found]:
        raise DamagedError(f"{name} lacks {', '.join(lacking)}; it is not an SAE in sae-lens' layout")
    tied = architecture == "matching_pursuit" or (architecture == "temporal" and config.get("tied_weights", True))
    if tied:
        found["W_enc"] = found["W_dec"].t()
    elif "W_enc" not in found:
        raise DamagedError(f"{name} lacks W_enc; it is not an SAE in sae-lens' layout")
    found |= {
        "architecture": architecture,
        "tied": tied,
        "k": int(config.get("k", 0)) if architecture in ("topk", "abstopk") else 0,
        "normalize": config.get("normalize_activations") or "none",
        "scalar": float(config.get("activation_normalization_factor", 1.0)),
        "apply_b_dec_to_input": bool(config.get("apply_b_dec_to_input", not KINDS[architecture].transcoder)),
        "rescale_by_decoder_norm": bool(config.get("rescale_acts_by_decoder_norm", False)),
    }
    if architecture == "matching_pursuit":
        said = {key: config[key] for key in vars(Pursuit()) if key in config}
        found["pursuit"] = Pursuit(**said)
    if architecture == "temporal":
        found["temporal"] = _temporal(name, config, tensors)
    return found


def _temporal(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Temporal:
    layers = []
    for i in range(int(config.get("n_attn_layers", 1))):
        wanted = [f"{part}.{end}" for part in _ATTENTION for end in ("weight", "bias")]
        if lacking := [key for key in wanted if f"attn_layers.{i}.{key}" not in tensors]:
            raise DamagedError(f"{name} lacks attn_layers.{i}.{lacking[0]}; it is not a whole temporal SAE")
        layers.append({key: tensors[f"attn_layers.{i}.{key}"] for key in wanted})
    ranked = config.get("sae_diff_type", "topk") == "topk"
    return Temporal(int(config.get("n_heads", 8)), config.get("kval_topk") if ranked else None, tuple(layers))
