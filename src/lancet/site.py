"""A place in a model, under the field's spellings.

TransformerLens' spelling is the canonical one. `blocks.6.hook_resid_pre`, interp-engine's `resid_pre.6` and Hugging
Face's `model.layers.6.input` (`transformer.h.6.input`, `hidden_states.6`) parse to the same value. A spelling that two
tools give two meanings is refused, not guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import Literal, cast

from lancet.errors import UsageError

Kind = Literal[
    "resid_pre",
    "z",
    "attn_out",
    "resid_mid",
    "ln2.hook_normalized",
    "mlp.hook_in",
    "mlp.hook_out",
    "mlp_out",
    "resid_post",
]
# In the order in which a block computes them.
KINDS: tuple[Kind, ...] = (
    "resid_pre",
    "z",
    "attn_out",
    "resid_mid",
    "ln2.hook_normalized",
    "mlp.hook_in",
    "mlp.hook_out",
    "mlp_out",
    "resid_post",
)
STREAM: tuple[Kind, ...] = ("resid_pre", "resid_mid", "resid_post")

_HOOKS = {
    "attn.hook_z": "z",
    "ln2.hook_normalized": "ln2.hook_normalized",
    "mlp.hook_in": "mlp.hook_in",
    "mlp.hook_out": "mlp.hook_out",
} | {f"hook_{kind}": kind for kind in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")}
_POINTS = {
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
    "resid_post": "resid_post",
    "z": "z",
    "attn_out_post": "attn_out",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "mlp.hook_out",
    "mlp_out_post": "mlp_out",
}
_ENDS = {
    "input": "resid_pre",
    "output": "resid_post",
    "self_attn.o_proj.input": "z",
    "attn.c_proj.input": "z",
    "attention.dense.input": "z",
    "self_attn.dense.input": "z",
    "mlp.input": "mlp.hook_in",
    "mlp.output": "mlp.hook_out",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "mlp_out",
}
_AMBIGUOUS = {
    "hook_mlp_in": (
        "TransformerLens means the stream before the MLP's norm (blocks.{0}.hook_resid_mid), the lists of published "
        "transcoders mean what the MLP reads (blocks.{0}.mlp.hook_in)"
    ),
    "attn_out": (
        "interp-engine means what attention returns before a post-norm, TransformerLens what is added to the stream "
        "(blocks.{0}.hook_attn_out, attn_out_post.{0})"
    ),
    "post_attention_layernorm.output": (
        "in Gemma 2 and 3 that is blocks.{0}.hook_attn_out, in Llama and its kin blocks.{0}.mlp.hook_in"
    ),
}

_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.((?:\w+\.)?hook_\w+)")
_INTERP_ENGINE = re.compile(r"(\w+)\.(\d+)")
_HIDDEN_STATES = re.compile(r"hidden_states(?:\.(\d+)|\[(\d+)\])")
_MODULE = re.compile(r"(?:[A-Za-z_]\w*\.)*?(?:layers|h|blocks)\.(\d+)\.((?:\w+\.){0,2}(?:input|output))")


@total_ordering
@dataclass(frozen=True)
class Site:
    """One place in one block. Sites sort in the order in which a model computes them.

    Args:
        layer: block index, from 0.
        kind: one of KINDS.
            resid_pre, resid_mid, resid_post: the residual stream before the block, between attention and MLP, after it.
            attn_out, mlp_out: what is added to the stream, after a post-norm where there is one (Gemma 2 and 3).
            z: the heads' outputs before the output projection, [heads * d_head], head after head.
            ln2.hook_normalized: the MLP's input, normalised, before the norm's gain and bias.
            mlp.hook_in: what the MLP reads, after them. mlp.hook_out: what it returns, before a post-norm.
    """

    layer: int
    kind: Kind = "resid_pre"

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Reads any of the spellings.

        Raises:
            UsageError: no spelling matches, the kind of site is not supported, or it means different things to
                different tools.
        """
        if isinstance(text, Site):
            return text
        text = text.strip()
        if match := _HIDDEN_STATES.fullmatch(text):
            return cls(int(match[1] or match[2]))
        if match := _TRANSFORMER_LENS.fullmatch(text):
            layer, kind, known = int(match[1]), match[2], _HOOKS
        elif match := _MODULE.fullmatch(text):
            layer, kind, known = int(match[1]), match[2], _ENDS
        elif match := _INTERP_ENGINE.fullmatch(text):
            layer, kind, known = int(match[2]), match[1], _POINTS
        else:
            raise UsageError(
                f"{text!r} is not a site; write one as blocks.6.hook_resid_pre (or resid_pre.6, or "
                f"model.layers.6.input)"
            )
        if kind in known:
            return cls(layer, cast(Kind, known[kind]))
        if kind in _AMBIGUOUS:
            raise UsageError(
                f"{text!r} has two meanings: {_AMBIGUOUS[kind].format(layer)}; write the one that is meant"
            )
        raise UsageError(
            f"sites of kind {kind!r} are not supported (in {text!r}); supported: "
            + ", ".join(str(cls(layer, kind)) for kind in KINDS)
        )

    @property
    def depth(self) -> int:
        """How many blocks have a part in the value at this site."""
        return self.layer + (self.kind != "resid_pre")

    @property
    def entry(self) -> Site:
        """The stream from which the model can be run on once the value at this site is known.

        The site itself where it is all that passes to the rest of the model, else the input of its block.
        """
        return self if self.kind in ("resid_pre", "resid_post") else Site(self.layer)

    def __lt__(self, other: Site) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        return (self.layer, KINDS.index(self.kind)) < (other.layer, KINDS.index(other.kind))

    def __str__(self) -> str:
        hook = next(hook for hook, kind in _HOOKS.items() if kind == self.kind)
        return f"blocks.{self.layer}.{hook}"
