"""A TransformerLens model that the user already holds, as a Model: run by its own code, edited at its own hooks.

Its weights may have been rewritten when it was loaded (centred, biases and gains folded); values are then in that basis
and `processed` says so, read off the weights. Two things are not left to its hooks. A HookedTransformer has none on
what its MLP reads and returns, so those are taken where the module is called; and a TransformerBridge's
`hook_resid_mid` is the input of the MLP's norm alone, so that the stream there is changed in place, sum included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lancet.basis import Basis
from lancet.errors import MismatchError, UsageError
from lancet.hooks import Place, hook
from lancet.model import Model, SiteFunction
from lancet.site import Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ZERO = 1e-5  # of the weights' own size: what is centred or folded is zero up to rounding


@dataclass(repr=False)
class HookedModel(Model):
    """A HookedTransformer; the attributes are those of Model, and `hf` is the HookedTransformer itself."""

    def __post_init__(self) -> None:
        self.hf.eval()
        self.lens: Any = self.hf
        self.points: dict[str, Any] = dict(self.lens.hook_dict)
        self._normalised = {}  # TransformerLens has a hook there

    # ---- facts -------------------------------------------------------------------------------------------------

    @property
    def d_model(self) -> int:
        return self.lens.cfg.d_model

    @property
    def d_vocab(self) -> int:
        return self.lens.cfg.d_vocab

    @property
    def n_layers(self) -> int:
        return self.lens.cfg.n_layers

    @property
    def context(self) -> int:
        return int(self.lens.cfg.n_ctx)

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def ends(self) -> set[int]:
        end = self.tokenizer.eos_token_id
        return set() if end is None else {end}  # type: ignore[arg-type]

    @property
    def is_layer_norm(self) -> bool:
        return str(self.lens.cfg.normalization_type).startswith("LN")

    @property
    def _embedding(self) -> Tensor:
        return self.lens.embed.W_E

    @property
    def processed(self) -> Basis:
        return self._processed

    @cached_property
    def _processed(self) -> Basis:
        """What was done to the weights, read off them."""
        cfg, blocks = self.lens.cfg, list(self.lens.blocks)
        rows = self._embedding[: min(1024, len(self._embedding))].detach().float()
        centred = self.is_layer_norm and float(rows.mean(-1).abs().max()) <= ZERO * float(rows.std())
        biased = any(bool(self._bias(block, "Q").any()) for block in blocks)
        folded = biased and not any(bool(self._bias(block, "V").any()) for block in blocks)
        return Basis(centred, folded, self._folds_norms(cfg))

    def _folds_norms(self, cfg: Any) -> bool:
        return str(cfg.normalization_type).endswith("Pre")

    def _bias(self, block: Any, which: str) -> Tensor:
        """[heads, d_head]; zeros where there is none."""
        bias = getattr(block.attn, f"b_{which}", None)
        return self._embedding.new_zeros(1) if bias is None else bias.detach()

    def value_bias(self, layer: int, norm_bias: bool) -> Tensor | None:
        """As `Model.value_bias`, of the weights as they are now.

        Raises:
            MismatchError: part of the bias went into other weights when the model was loaded.
        """
        import torch

        block, own = self.lens.blocks[layer], self.processed
        shift = getattr(block.ln1, "b", getattr(block.ln1, "bias", None)) if self.is_layer_norm else None
        folds_shift = self.is_layer_norm and own.fold_ln
        if own.fold_value_biases or folds_shift:
            same = folds_shift == norm_bias
            if not same and self.is_layer_norm:
                raise MismatchError(
                    f"{self.name} was loaded with fold_ln={folds_shift}, and the SAE was trained with fold_ln="
                    f"{norm_bias}: how much of its value bias is gone is not known; load the model as the SAE's was"
                )
        bias = self._bias(block, "V").float()
        if norm_bias and not folds_shift and shift is not None:
            bias = bias + torch.einsum("d,hdv->hv", shift.detach().float(), block.attn.W_V.detach().float())
        if not bool(bias.any()):
            return None
        heads = int(self.lens.cfg.n_heads)
        return bias.repeat_interleave(heads // len(bias), 0).flatten()

    def check_centring(self) -> None:
        """As `Model.check_centring`."""
        if getattr(self.lens.cfg, "post_embedding_ln", False):
            raise UsageError(f"{self.name} norms its embeddings, and centred writing weights leave a mean there")

    def d_site(self, site: Site) -> int:
        """As `Model.d_site`."""
        return self.lens.cfg.n_heads * self.lens.cfg.d_head if site.kind == "z" else self.d_model

    def parameters_below(self, site: Site) -> list[Tensor]:
        """As `Model.parameters_below`."""
        return [self._embedding, *(p for block in self._blocks[: site.depth] for p in block.parameters())]

    # ---- sites -------------------------------------------------------------------------------------------------

    def check_site(self, site: Site) -> Site:
        """As `Model.check_site`: the hook must exist."""
        if not 0 <= site.layer < self.n_layers:
            first, last = Site(0, site.kind), Site(self.n_layers - 1, site.kind)
            raise UsageError(
                f"no site {site} in {self.name}: it has blocks 0 to {last.layer}; choose one of {first} to {last}"
            )
        if self._place(site) is None and str(site) not in self.points:
            parallel = getattr(self.lens.cfg, "parallel_attn_mlp", False)
            why = "attention and MLP run in parallel" if parallel else "it has no hook there"
            raise UsageError(
                f"no site {site} in {self.name}: {why}; choose {Site(site.layer)} or {Site(site.layer, 'resid_post')}"
            )
        return site

    def _place(self, site: Site) -> Place | None:
        mlp = getattr(self.lens.blocks[site.layer], "mlp", None)
        if mlp is None or not site.kind.startswith("mlp.hook") or str(site) in self.points:
            return None
        return Place(mlp, "input" if site.kind == "mlp.hook_in" else "output")

    def _hooks(self, site: Site, function: SiteFunction) -> list[Any]:
        if (place := self._place(site)) is not None:
            return [hook(place, function)]
        point, called = self.points[str(site)], lens_function(site, function)
        point.add_hook(called)
        return [_Hooked(point, called)]

    def _unless_paused(self, function: SiteFunction) -> SiteFunction:
        return function  # nothing of this model is tested by passes of its own

    @property
    def _blocks(self) -> list[torch.nn.Module]:
        return list(self.lens.blocks)

    # ---- passes ------------------------------------------------------------------------------------------------

    def new_cache(self, rows: int) -> Any:
        """A cache of TransformerLens' own."""
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.lens.cfg, self.device, rows)

    def repeated(self, cache: Any, rows: int) -> Any:
        """As `Model.repeated`."""
        new = self.new_cache(rows)
        new.previous_attention_mask = cache.previous_attention_mask.expand(rows, -1)
        for mine, entry in zip(new.entries, cache.entries, strict=True):
            mine.past_keys = entry.past_keys.expand(rows, -1, -1, -1)
            mine.past_values = entry.past_values.expand(rows, -1, -1, -1)
        return new

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        last: bool = False,
    ) -> Tensor:
        """As `Model.forward`; TransformerLens counts positions from the mask itself."""
        import torch

        new = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
        logits = self.lens(ids, return_type="logits", attention_mask=new, past_kv_cache=cache)
        return logits[:, -1:] if last else logits


@dataclass(repr=False)
class BridgeModel(HookedModel):
    """A TransformerBridge: transformers' own forward, with TransformerLens' hooks in it."""

    def _folds_norms(self, cfg: Any) -> bool:
        # A bridge keeps its norms' modules when it folds them, and sets their gains to one.
        gains = [getattr(getattr(block, "ln2", None), "weight", None) for block in self.lens.blocks]
        gains = [gain.detach().float() for gain in gains if gain is not None]
        return bool(gains) and bool(self.lens._weights_processed) and all(bool((gain == 1).all()) for gain in gains)

    @property
    def ends(self) -> set[int]:
        settings = getattr(self.lens.original_model, "generation_config", None)
        ends = settings.eos_token_id if settings else None
        return set(ends) if isinstance(ends, list) else {ends} - {None}  # type: ignore[return-value]

    def new_cache(self, rows: int) -> Any:
        """As `Model.new_cache`."""
        from transformers import DynamicCache

        return DynamicCache(config=self.lens.original_model.config)

    repeated = Model.repeated

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        last: bool = False,
    ) -> Tensor:
        """As `Model.forward`."""
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        out = self.lens.original_model(input_ids=ids, use_cache=cache is not None, **said).logits
        return out[:, -1:] if last else out


class _Hooked:
    """A function on a hook point, with `remove()` as torch's handles have it."""

    def __init__(self, point: Any, function: Callable[..., Any]) -> None:
        self.point = point
        self.handle = next(handle for handle in point.fwd_hooks if handle.user_hook is function)

    def remove(self) -> None:
        self.handle.hook.remove()
        if self.handle in self.point.fwd_hooks:  # TransformerLens may have reset its hooks meanwhile
            self.point.fwd_hooks.remove(self.handle)


def lens_function(site: Site, function: SiteFunction) -> Callable[..., Tensor | None]:
    """A function of values [batch, seq, width] as TransformerLens calls them: heads apart, and the hook named."""

    def called(tensor: Tensor, *, hook: Any) -> Tensor | None:
        new = function(tensor.flatten(2).clone() if site.kind == "resid_mid" else tensor.flatten(2))
        if new is None:
            return None
        new = new.to(tensor.dtype).reshape(tensor.shape)
        if site.kind == "resid_mid":
            tensor.copy_(new)
            return None
        return new

    return called
