"""Which modules of a transformers model a site lies between, found from its structure and proved by running it.

interp-engine's `resolve_arch` names the modules of an architecture. What names cannot promise is tested once for each
block in which a site inside the block is used, on a pass of a few tokens: that attention and MLP are added to the
stream as they are (no scaling, one stream), that a change of the stream between them reaches both the MLP and the sum,
and that the norm before the MLP is a LayerNorm or an RMSNorm whose gain is known. What fails is refused, with the
reason.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lancet.errors import UsageError
from lancet.hooks import Place, hook
from lancet.norms import Norm, take_apart
from lancet.site import KINDS, Kind, Site

if TYPE_CHECKING:
    import torch
    from interp_engine.arch import ArchSpec
    from torch import Tensor


@dataclass
class Block:
    """What the test of one block found.

    Attributes:
        norm: the norm whose output the MLP reads, None where there is none or it is neither a LayerNorm nor an RMSNorm.
        attn_norm: the same of attention.
        refused: kind of site -> why it cannot be had exactly in this block.
    """

    norm: Norm | None = None
    attn_norm: Norm | None = None
    refused: dict[Kind, str] = field(default_factory=dict)


class Anatomy:
    """The places of one transformers model.

    Args:
        arch: what interp-engine resolved of it.
        dtype: what it computes in.
        run: makes one pass over a few tokens, with no hook of Lancet's in effect.
    """

    def __init__(self, arch: ArchSpec, dtype: torch.dtype, run: Callable[[], None]) -> None:
        self.arch, self.dtype = arch, dtype
        self._run = run
        self._blocks: dict[int, Block] = {}

    # ---- places ------------------------------------------------------------------------------------------------

    def check(self, site: Site) -> None:
        """Refuses a site that this architecture does not have or whose value would not be exact.

        Raises:
            UsageError: with the reason.
        """
        arch = self.arch
        why = None
        if arch.slot_for(site.layer).of > 1:
            why = "a block of it holds several attention and MLP layers"
        elif arch.quirks.n_residual_streams > 1:
            why = f"it carries {arch.quirks.n_residual_streams} residual streams, and no single value lies there"
        elif site.kind not in ("resid_pre", "resid_post"):
            why = self.block(site.layer).refused.get(site.kind)
        if why:
            raise UsageError(f"no site {site} in {arch.architecture}: {why}; choose {_others(site, arch)}")

    def width(self, site: Site) -> int:
        """The width of the value at a site: d_model, or heads * d_head for z."""
        if site.kind == "z":
            return self.arch.n_heads * self.arch.value_head_dim_for_layer(site.layer)
        return self.arch.d_model

    def place(self, site: Site) -> Place:
        """Where a site's value passes from module to module; for `ln2.hook_normalized` where the MLP reads it."""
        arch, layer = self.arch, site.layer
        match site.kind:
            case "resid_pre":
                return Place(arch.block(layer), "input")
            case "resid_post":
                return Place(arch.block(layer), "output")
            case "z":
                return Place(arch.attn_out_proj(layer), "input")
            case "attn_out":
                post = arch.post_attn_norm(layer)
                return Place(post, "output") if post is not None else _place(arch.attn_boundary(layer, "out"))
            case "resid_mid":
                norm = arch.pre_mlp_norm(layer)
                return Place(norm, "input") if norm is not None else _place(arch.mlp_boundary(layer, "in"))
            case "ln2.hook_normalized" | "mlp.hook_in":
                return _place(arch.mlp_boundary(layer, "in"))
            case "mlp.hook_out":
                return _place(arch.mlp_boundary(layer, "out"))
            case "mlp_out":
                post = arch.post_mlp_norm(layer)
                return Place(post, "output") if post is not None else _place(arch.mlp_boundary(layer, "out"))

    def norm(self, layer: int) -> Norm:
        """The norm before a block's MLP; `check` has seen to it that there is one."""
        norm = self.block(layer).norm
        assert norm is not None
        return norm

    @cached_property
    def is_layer_norm(self) -> bool:
        """Whether the stream is read through LayerNorms, which take no notice of its mean."""
        norm = take_apart(self.arch.final_norm, self.arch.d_model)
        return norm is not None and norm.centred

    def value_bias(self, layer: int, norm_bias: bool) -> Tensor | None:
        """The constant that the value projection's bias puts into `z`, since attention weights sum to 1.

        Args:
            norm_bias: with what the bias of attention's own norm adds to it: where TransformerLens folds both.

        Returns:
            [heads * d_head] float32, None where it is zero.

        Raises:
            UsageError: attention weights do not sum to 1 here, or the values are not what is projected.
        """
        import torch
        from interp_engine import facts

        arch = self.arch
        norm = self.block(layer).attn_norm
        shift = norm.bias if norm_bias and norm is not None else None
        fused = arch.fused_qkv_module(layer)
        project = fused or arch.v_proj(layer)
        if project is None:
            raise UsageError(f"no value projection was found in block {layer} of {arch.architecture}")
        like = next(iter(project.parameters()))
        x = torch.zeros(1, 1, arch.d_model, device=like.device)
        if shift is not None:
            x = x + shift.to(x)
        with torch.no_grad():
            out = project(x.to(self.dtype))[0, 0].float()
        heads, width = arch.n_heads, arch.value_head_dim_for_layer(layer)
        groups = arch.kv_heads_for_layer(layer)
        if fused is not None:
            layout = arch.quirks.qkv_layout
            out = facts.split_qkv_slab(out, layout=layout, n_heads=heads, n_kv_heads=groups, head_dim=width)["v"]
        if not bool(out.any()):
            return None
        if arch.quirks.attn_sinks or arch.quirks.gated_attn_out or arch.value_module(layer) is not None:
            raise UsageError(f"the value bias of {arch.architecture} puts no constant into {Site(layer, 'z')}")
        return out.reshape(groups, width).repeat_interleave(heads // groups, 0).flatten()

    # ---- the test ----------------------------------------------------------------------------------------------

    def block(self, layer: int) -> Block:
        """What is known of a block; tested when first asked for."""
        if layer not in self._blocks:
            self._blocks[layer] = self._test(layer)
        return self._blocks[layer]

    def _test(self, layer: int) -> Block:
        found = Block()
        places: dict[str, Place] = {}
        for kind in ("z", "attn_out", "resid_mid", "mlp.hook_in", "mlp.hook_out", "mlp_out"):
            try:
                places[kind] = self.place(Site(layer, kind))
            except (AttributeError, ValueError) as error:  # interp-engine explains what an architecture lacks
                found.refused[kind] = str(error).split(". ")[0]
        quirks = self.arch.quirks
        if quirks.parallel_attn_mlp:
            places.pop("resid_mid", None)
            found.refused["resid_mid"] = "attention and MLP run in parallel, and nothing lies between them"
        if tuple(quirks.residual_multipliers) != (1.0, 1.0):
            for kind in ("attn_out", "resid_mid", "mlp_out"):
                found.refused[kind] = f"what is added to the stream is scaled by {quirks.residual_multipliers}"
        if self.arch.mlp_is_half_the_feed_forward(layer):
            for kind in ("ln2.hook_normalized", "mlp.hook_in", "mlp.hook_out"):
                found.refused[kind] = "experts run beside the MLP, each with an input of its own"
        with suppress(AttributeError, ValueError):  # a block without attention
            places["attn_in"] = _place(self.arch.attn_boundary(layer, "in"))
        seen = _Probe(self.arch.block(layer), places).watch(self._run)
        for kind in KINDS:
            if kind in places and kind not in found.refused and kind not in seen.values:
                found.refused[kind] = "the model never calls the module that would hold it"
        self._test_sums(seen, found)
        self._test_norm(layer, seen, found)
        return found

    def _test_sums(self, probe: _Probe, found: Block) -> None:
        """Refuses what does not add up, to the rounding of the numbers that were added."""
        import torch

        seen = probe.values
        pre, post = seen["resid_pre"], seen["resid_post"]
        attn, mid, mlp, changed = (seen.get(kind) for kind in ("attn_out", "resid_mid", "mlp_out", "changed"))
        why = "what attention and MLP return is not what is added to the residual stream, which is no plain sum"

        def adds_up(total: Tensor, *parts: Tensor) -> bool:
            size = torch.stack([part.abs() for part in (total, *parts)]).sum(0)
            error = torch.stack(parts).sum(0).sub(total).abs()
            return bool((error <= 8 * probe.eps * size).all())

        def refuse(*kinds: Kind) -> None:
            for kind in kinds:
                found.refused.setdefault(kind, why)

        if mid is not None and changed is not None:
            if attn is None or not adds_up(mid, pre, attn):
                refuse("attn_out", "resid_mid")
            if mlp is None or not adds_up(post, changed, mlp):
                refuse("resid_mid", "mlp_out")
        elif attn is None or mlp is None or not adds_up(post, pre, attn, mlp):
            refuse("attn_out", "mlp_out")

    def _test_norm(self, layer: int, seen: _Probe, found: Block) -> None:
        width = self.arch.d_model
        found.attn_norm = None if seen.attn_norm is None else take_apart(seen.attn_norm, width)
        if "mlp.hook_in" in found.refused:
            found.refused.setdefault("ln2.hook_normalized", found.refused["mlp.hook_in"])
        if seen.norm is None:
            found.refused.setdefault("ln2.hook_normalized", "its MLP reads no norm's output")
        if "ln2.hook_normalized" in found.refused or seen.norm is None:
            return
        found.norm = take_apart(seen.norm, width)
        if found.norm is None:
            found.refused["ln2.hook_normalized"] = (
                f"the norm before its MLP ({type(seen.norm).__name__}) is neither a LayerNorm nor an RMSNorm"
            )


class _Probe:
    """Sees one block's values in one pass, and changes the stream between attention and MLP on the way."""

    def __init__(self, block: torch.nn.Module, places: dict[str, Place]) -> None:
        self.block, self.places = block, places
        self.values: dict[str, Tensor] = {}
        self.norm: torch.nn.Module | None = None  # whose output the MLP reads
        self.attn_norm: torch.nn.Module | None = None
        self.eps = 0.0  # of the stream's dtype
        self._outputs: list[tuple[torch.nn.Module, Tensor]] = []  # kept alive, so that no address is used twice

    def watch(self, run: Callable[[], None]) -> _Probe:
        import torch

        handles = []
        for child in self.block.modules():
            if child is not self.block:
                handles.append(child.register_forward_hook(self._made))
        for kind, place in (("resid_pre", Place(self.block, "input")), *self.places.items()):
            handles.append(hook(place, self._function(kind)))
        handles.append(hook(Place(self.block, "output"), self._function("resid_post")))
        try:
            with torch.no_grad(), suppress(_Seen):
                run()
        finally:
            for handle in handles:
                handle.remove()
        self._outputs.clear()
        return self

    def _made(self, module: torch.nn.Module, _args: Any, output: Any) -> None:
        import torch

        if isinstance(output, torch.Tensor):
            self._outputs.append((module, output))

    def _maker(self, value: Tensor) -> torch.nn.Module | None:
        # The module that made the tensor comes first; containers that only return it come after.
        return next((module for module, output in self._outputs if output is value), None)

    def _function(self, kind: str) -> Callable[[Tensor], Tensor | None]:
        import torch

        def function(value: Tensor) -> None:
            self.values[kind] = value.detach().to("cpu", torch.float32, copy=True)  # some is changed in place below
            if kind == "resid_pre":
                self.eps = torch.finfo(value.dtype).eps
            if kind == "resid_mid":
                noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
                value.add_(noise * value.float().pow(2).mean().sqrt().to(value))
                self.values["changed"] = value.detach().float().cpu()
            if kind == "mlp.hook_in":
                self.norm = self._maker(value)
            if kind == "attn_in":
                self.attn_norm = self._maker(value)
            if kind == "resid_post":
                raise _Seen

        return function


class _Seen(Exception):  # noqa: N818 - no error
    """Ends a pass once the block was seen."""


def _place(found: tuple[torch.nn.Module, str]) -> Place:
    module, side = found
    return Place(module, "input" if side == "input" else "output")


def _others(site: Site, arch: ArchSpec) -> str:
    if arch.quirks.n_residual_streams > 1 or arch.slot_for(site.layer).of > 1:
        return "another model"
    return f"{Site(site.layer)} or {Site(site.layer, 'resid_post')}"
