"""A place in a model, under the field's three spellings.

TransformerLens' spelling is the canonical one. `blocks.6.hook_resid_pre`, interp-engine's `resid_pre.6` and Hugging
Face's `model.layers.6.input` (`transformer.h.6.input`, `hidden_states.6`) parse to the same value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lancet.errors import UsageError

Kind = Literal["resid_pre", "resid_post"]
KINDS: tuple[Kind, ...] = ("resid_pre", "resid_post")

_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.hook_(\w+)")
_INTERP_ENGINE = re.compile(r"(\w+)\.(\d+)")
_HIDDEN_STATES = re.compile(r"hidden_states(?:\.(\d+)|\[(\d+)\])")
_MODULE = re.compile(r"(?:[A-Za-z_]\w*\.)*(?:layers|h|blocks)\.(\d+)\.(input|output)")


@dataclass(frozen=True, order=True)
class Site:
    """One place: the residual stream before or after a block.

    Args:
        layer: block index, from 0.
        kind: "resid_pre" (what block `layer` reads) or "resid_post" (what it leaves).
    """

    layer: int
    kind: Kind = "resid_pre"

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Reads any of the three spellings.

        Raises:
            UsageError: no spelling matches, or the kind of site is not supported.
        """
        if isinstance(text, Site):
            return text
        text = text.strip()
        if match := _HIDDEN_STATES.fullmatch(text):
            return cls(int(match[1] or match[2]))
        if match := _MODULE.fullmatch(text):
            return cls(int(match[1]), "resid_pre" if match[2] == "input" else "resid_post")
        if match := _TRANSFORMER_LENS.fullmatch(text):
            layer, kind = int(match[1]), match[2]
        elif match := _INTERP_ENGINE.fullmatch(text):
            layer, kind = int(match[2]), match[1]
        else:
            raise UsageError(
                f"{text!r} is not a site; write one as blocks.6.hook_resid_pre (or resid_pre.6, or "
                f"model.layers.6.input)"
            )
        for known in KINDS:
            if kind == known:
                return cls(layer, known)
        raise UsageError(f"sites of kind {kind!r} are not supported (in {text!r}); supported: {', '.join(KINDS)}")

    @property
    def depth(self) -> int:
        """How many blocks must run before the value at this site exists."""
        return self.layer + (self.kind == "resid_post")

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_{self.kind}"
