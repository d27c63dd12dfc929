"""A causal language model with its tokenizer: text to tokens, tokens to the values at a site.

Knows positions and nothing about SAEs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lancet.anatomy import Anatomy
from lancet.errors import UsageError
from lancet.hooks import Place, hook
from lancet.site import Site
from lancet.tokens import Batch, Texts

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lancet.basis import Basis

# A function of the value at a site, [batch, seq, width] -> the same shape, or None to leave it as it is.
SiteFunction = Callable[["Tensor"], "Tensor | None"]


@dataclass(repr=False)
class Model(Texts):
    """A transformers model, its tokenizer, and what must be known to feed it right.

    Attributes:
        name: what the user opened.
        hf: the transformers model, in eval mode.
        tokenizer: its fast tokenizer.
        start_plain: the id that plain text starts with, None where the model has none.
        start_chat: the id that a chat starts with.
        notes: what was chosen automatically, in words (dtype, device).
    """

    name: str
    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    start_plain: int | None
    start_chat: int | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        from interp_engine.arch import resolve_arch

        self.hf.eval()
        config = copy(self.hf.config)
        if not config.architectures:  # made by hand; interp-engine looks up facts by it
            config.architectures = [type(self.hf).__name__]
        self.arch = resolve_arch(self.hf, config)
        self.anatomy = Anatomy(self.arch, self.dtype, self._probe)
        self._paused = False
        self._normalised: dict[int, dict[str, Tensor]] = {}  # block -> its MLP's normalised input during a pass

    def __repr__(self) -> str:
        shape = f"{self.n_layers} layers, width {self.d_model}"
        return f"{type(self).__name__}({self.name!r}, {shape}, {self.dtype}, {self.device})"

    # ---- facts -------------------------------------------------------------------------------------------------

    @property
    def d_model(self) -> int:
        return self.arch.d_model

    @property
    def d_vocab(self) -> int:
        """How many tokens it knows."""
        return self.arch.vocab_size

    @property
    def n_layers(self) -> int:
        return self.arch.n_layers

    @property
    def context(self) -> int:
        """The longest text, in tokens, that the model can take."""
        return int(getattr(self.hf.config, "max_position_embeddings", 0) or 1 << 30)

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def ends(self) -> set[int]:
        """The ids that end a text."""
        ends = self.hf.generation_config.eos_token_id if self.hf.generation_config else None
        return set(ends) if isinstance(ends, list) else {ends} - {None}  # type: ignore[return-value]

    def check_site(self, site: Site) -> Site:
        """Sees to it that the value at a site can be had, and changed, exactly.

        Raises:
            UsageError: the model has no such block, or its architecture no such value; says why.
        """
        if not 0 <= site.layer < self.n_layers:
            first, last = Site(0, site.kind), Site(self.n_layers - 1, site.kind)
            raise UsageError(
                f"no site {site} in {self.name}: it has blocks 0 to {last.layer}; choose one of {first} to {last}"
            )
        self.anatomy.check(site)
        return site

    def d_site(self, site: Site) -> int:
        """The width of the value at a site: d_model, or heads * d_head for z."""
        return self.anatomy.width(site)

    @property
    def processed(self) -> Basis:
        """What was done to the weights before the model came here: nothing, for one that transformers loaded."""
        from lancet.basis import Basis

        return Basis()

    @property
    def is_layer_norm(self) -> bool:
        """Whether the stream is read through LayerNorms (not RMSNorms)."""
        return self.anatomy.is_layer_norm

    def check_centring(self) -> None:
        """Raises UsageError where the stream without its mean is not what TransformerLens' centring leaves of it."""
        if any("word_embeddings" in name and "norm" in name for name, _ in self.arch.trunk.named_children()):
            raise UsageError(
                f"{self.name} norms its embeddings before the first block, where centred writing weights leave a mean; "
                f"an SAE of that basis cannot be had exactly"
            )

    def value_bias(self, layer: int, norm_bias: bool) -> Tensor | None:
        """[heads * d_head] what z holds of the value bias; see `Anatomy.value_bias`."""
        return self.anatomy.value_bias(layer, norm_bias)

    def parameters_below(self, site: Site) -> list[Tensor]:
        """The plain weights that the value at a site depends on: embeddings and blocks; what packed ones consist of."""
        from lancet.precision import plain_parts

        blocks = self.arch.decoder_layers[: site.depth]
        weights = [*self.hf.get_input_embeddings().parameters(), *(p for block in blocks for p in block.parameters())]
        return [part for p in weights if not p.is_meta for part in plain_parts(p)]  # meta: a device map put it on disk

    # ---- tokens to logits --------------------------------------------------------------------------------------

    def new_cache(self, rows: int) -> Any:
        """An empty cache of keys and values for `forward`."""
        from transformers import DynamicCache

        return DynamicCache(config=self.hf.config)

    def repeated(self, cache: Any, rows: int) -> Any:
        """A cache of one row as a cache of many; the row's own tensors are not copied until they grow."""
        new = self.new_cache(rows)
        for index, layer in enumerate(cache.layers):
            new.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index)
        return new

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        last: bool = False,
    ) -> Tensor:
        """One pass.

        Args:
            ids: [batch, new] the tokens that the cache does not have yet.
            mask: [batch, cached + new] 1 where a token is; None where there is no padding.
            positions: [batch, new] of each token in its row; None counts from 0.
            cache: grows by the new tokens.
            last: compute the last position only.

        Returns:
            [batch, new or 1, vocab] logits in the model's dtype.
        """
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if last:
            said["logits_to_keep"] = 1
        return self.hf(input_ids=ids, use_cache=cache is not None, **said).logits

    # ---- tokens to values --------------------------------------------------------------------------------------

    @contextmanager
    def at(self, site: Site, function: SiteFunction) -> Iterator[None]:
        """Runs `function` on the value at `site` in every forward pass inside the block; the hook always comes off.

        What the function returns is what the model computes with from there on. Between attention and MLP the stream
        is changed in place, so that the MLP's norm and the sum that follows read the very same numbers; a change of
        the normalised MLP input reaches the MLP as that change times the norm's gain.

        Raises:
            UsageError: see `check_site`.
        """
        handles = self._hooks(self.check_site(site), self._unless_paused(function))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._normalised.get(site.layer, {}).clear()

    def _hooks(self, site: Site, function: SiteFunction) -> list[Any]:
        place = self.anatomy.place(site)
        if site.kind == "resid_mid":

            def in_place(value: Tensor) -> None:
                new = function(value.clone())  # a copy: who only reads must not see a later change
                if new is not None:
                    value.copy_(new)

            return [hook(place, in_place)]
        if site.kind == "ln2.hook_normalized":
            norm, held = self.anatomy.norm(site.layer), self._normalised.setdefault(site.layer, {})

            def keep(value: Tensor) -> None:
                held.clear()
                held["input"] = value

            def before_gain(value: Tensor) -> Tensor | None:
                if "now" not in held:  # the first of several functions; the others see what it made of it
                    held["now"] = norm.normalised(held.pop("input"))
                old, new = held["now"], function(held["now"])
                if new is None:
                    return None
                held["now"] = new.float()
                return (value.float() + (held["now"] - old) * norm.gain.to(value.device)).to(value.dtype)

            return [hook(Place(norm.module, "input"), keep), hook(place, before_gain)]
        return [hook(place, function)]

    def _unless_paused(self, function: SiteFunction) -> SiteFunction:
        return lambda value: None if self._paused else function(value)

    def _probe(self) -> None:
        """A pass over six tokens with no hook of ours in effect: the anatomy's test of a block."""
        import torch

        ids = torch.arange(1, 7, device=self.device)[None] % self.arch.vocab_size
        paused, self._paused = self._paused, True
        try:
            self.hf(input_ids=ids, use_cache=False)
        finally:
            self._paused = paused

    @contextmanager
    def from_site(self, site: Site) -> Iterator[None]:
        """Blocks that run before `site.entry` hand their input on unchanged inside the block.

        For passes in which the value at `site.entry` is replaced anyway: what lies below is not computed again.
        """
        below = self._blocks[: site.entry.depth]
        kept = [block.__dict__.get("forward") for block in below]
        is_tuple = self._blocks_return_tuples

        def hand_on(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            return (hidden_states,) if is_tuple else hidden_states

        try:
            for block in below:  # past any __setattr__: TransformerLens' bridges hand attributes on
                block.__dict__["forward"] = hand_on
            yield
        finally:
            for block, forward in zip(below, kept, strict=True):
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.__dict__["forward"] = forward

    @property
    def _blocks(self) -> list[torch.nn.Module]:
        return self.arch.decoder_layers

    @cached_property
    def _blocks_return_tuples(self) -> bool:
        import torch

        seen: list[bool] = []
        handle = self._blocks[0].register_forward_hook(lambda _m, _a, out: seen.append(isinstance(out, tuple)))
        try:
            with torch.no_grad():
                self.forward(self.batch([[0]]).ids)
        finally:
            handle.remove()
        return seen[0]

    def values(self, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """The values at `sites`, [batch, seq, width] each; the forward pass stops after the deepest of them.

        Raises:
            UsageError: see `check_site`.
        """
        import torch

        found: dict[Site, Tensor] = {}
        wanted = set(sites)
        positions = None
        if not batch.mask[:, 0].all():  # padded on the left, where transformers would count the padding
            positions = (batch.mask.long().cumsum(1) - 1).clamp_min(0)

        def keep(site: Site) -> SiteFunction:
            def function(value: Tensor) -> None:
                found[site] = value
                if len(found) == len(wanted):
                    raise _Enough

            return function

        with torch.no_grad(), ExitStack() as stack:
            for site in sorted(wanted):
                stack.enter_context(self.at(site, keep(site)))
            with suppress(_Enough):
                self.forward(batch.ids, batch.mask.long(), positions)
        if missed := wanted - set(found):
            raise UsageError(f"{self.name} never computed {', '.join(map(str, sorted(missed)))}; choose another site")
        return found


class _Enough(Exception):  # noqa: N818 - no error
    """Ends a forward pass once everything asked for was seen."""
