"""A causal language model with its tokenizer: text to tokens, tokens to the values at a site.

Knows positions and nothing about SAEs. Index 0 of every text is the start token, exactly one, the one that the model
was trained to see there; a batch is padded, never packed, so that no text attends to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lancet.errors import UsageError
from lancet.site import Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A function of the value at a site, [batch, seq, d_model] -> the same shape, or None to leave it as it is.
SiteFunction = Callable[["Tensor"], "Tensor | None"]


@dataclass(frozen=True)
class Tokens:
    """One text as the model sees it.

    Attributes:
        text: the characters; for a chat, the rendered template.
        ids: token ids, the start token first.
        spans: for each token its (begin, end) in `text`; the start token has (0, 0) unless it is written in the text.
        roles: for each token "start", "text" or, in a chat, "system", "user", "assistant" or "marker" (the template's
            own tokens).
    """

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    roles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def piece(self, position: int) -> str:
        """The characters of one token ("" for the start token); the pieces of a text joined are the text.

        A character that is cut into several tokens belongs to the first of them; `spans` has it at each.
        """
        begin, end = self.spans[position]
        if position:
            begin = max(begin, self.spans[position - 1][1])
        return self.text[begin:end]


@dataclass(frozen=True)
class Batch:
    """Rows of different lengths, padded.

    Attributes:
        ids: [batch, seq] token ids.
        mask: [batch, seq] True where a token is.
        start: [batch] index of each row's start token.
    """

    ids: Tensor
    mask: Tensor
    start: Tensor

    @property
    def content(self) -> Tensor:
        """[batch, seq] True at every token but the start token."""
        import torch

        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return self.mask & (columns[None] != self.start[:, None])


@dataclass(repr=False)
class Model:
    """A transformers model, its tokenizer, and what must be known to feed it right.

    Attributes:
        name: what the user opened.
        hf: the transformers model, in eval mode.
        tokenizer: its fast tokenizer.
        start_plain: the id that plain text starts with, None where the model has none.
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
        self.arch = resolve_arch(self.hf, self.hf.config)

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {self.n_layers} layers, width {self.d_model}, {self.dtype}, {self.device})"

    # ---- facts -------------------------------------------------------------------------------------------------

    @property
    def d_model(self) -> int:
        return self.arch.d_model

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

    def check_site(self, site: Site) -> Site:
        """Raises UsageError where the model has no such block."""
        if not 0 <= site.layer < self.n_layers:
            raise UsageError(
                f"no site {site} in {self.name}: it has blocks 0 to {self.n_layers - 1}; "
                f"choose one of blocks.0.hook_{site.kind} to blocks.{self.n_layers - 1}.hook_{site.kind}"
            )
        return site

    # ---- text to tokens ----------------------------------------------------------------------------------------

    def tokenize(self, text: str, most: int | None = None) -> Tokens:
        """Plain text, with exactly one start token.

        Args:
            most: cut the text to so many tokens, the start token counted, instead of refusing a long one.

        Raises:
            UsageError: the text is empty or longer than the context.
        """
        if not text:
            raise UsageError("the text is empty; give at least one character")
        return self._tokens(text, self.start_plain, lambda begin: "text", most)

    def tokenize_chat(self, messages: Sequence[dict[str, str]], answer: bool = True) -> Tokens:
        """A chat through the model's own template.

        Args:
            messages: [{"role": "user", "content": "..."}, ...].
            answer: end with the template's opening of the assistant's turn.

        Raises:
            UsageError: the model has no chat template, it refuses or rewrites a message, or a message is empty.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(f"{self.name} has no chat template; leave out --chat and give plain text")
        if not messages or not all(message.get("content") for message in messages):
            raise UsageError("the chat has an empty message; give each turn at least one character")
        text = self._render(messages, answer)
        turns = self._turns(messages, text, answer)

        def role(begin: int) -> str:
            return next((name for first, end, name in turns if first <= begin < end), "marker")

        return self._tokens(text, self.start_chat, role)

    def _render(self, messages: Sequence[dict[str, str]], answer: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer))
        except TemplateError as error:  # some templates know no system role, or want the turns to alternate
            raise UsageError(f"{self.name}'s chat template refuses this chat: {error}") from error

    def _turns(self, messages: Sequence[dict[str, str]], text: str, answer: bool) -> list[tuple[int, int, str]]:
        """(begin, end, role) of each message's own characters in `text`.

        Read off the template filled with placeholders: a short message may well occur in the template's own words too.
        """
        places = [f"\ue000{i}\ue001" for i in range(len(messages))]
        frame = self._render([{**m, "content": place} for m, place in zip(messages, places, strict=True)], answer)
        turns, read, end = [], 0, 0
        for message, place in zip(messages, places, strict=True):
            said, at = message["content"], frame.find(place, read)
            begin = end + at - read
            # Some templates trim what they are given.
            content = next((c for c in (said, said.strip()) if text.startswith(c, begin)), None)
            if at < 0 or content is None:
                raise UsageError(f"{self.name}'s chat template rewrites {said[:40]!r}; give the chat as plain text")
            read, end = at + len(place), begin + len(content)
            turns.append((begin, end, message["role"]))
        return turns

    def _tokens(self, text: str, start: int | None, role: Callable[[int], str], most: int | None = None) -> Tokens:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair: bytes that were not UTF-8 on the command line
            raise UsageError(
                f"the text is not valid Unicode at character {error.start + 1}; give it in UTF-8"
            ) from error
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = list(encoding["input_ids"])
        spans = [(int(begin), int(end)) for begin, end in encoding["offset_mapping"]]
        roles = [role(begin) for begin, _ in spans]
        if start is not None:
            if ids[:1] in ([self.start_plain], [self.start_chat]):  # the text brings its own
                roles[0] = "start"
            else:
                ids, spans, roles = [start, *ids], [(0, 0), *spans], ["start", *roles]
        ids, spans, roles = ids[:most], spans[:most], roles[:most]
        if len(ids) > self.context:
            raise UsageError(
                f"the text has {len(ids)} tokens, {self.name} takes at most {self.context}; shorten or split it"
            )
        return Tokens(text, tuple(ids), tuple(spans), tuple(roles))

    def batch(self, rows: Sequence[Tokens] | Sequence[Sequence[int]], side: str = "right") -> Batch:
        """Pads rows to one length. Generation pads on the left, everything else on the right."""
        import torch

        ids_of = [list(row.ids) if isinstance(row, Tokens) else list(row) for row in rows]
        longest = max(map(len, ids_of))
        ids = torch.zeros(len(ids_of), longest, dtype=torch.long)
        mask = torch.zeros(len(ids_of), longest, dtype=torch.bool)
        start = torch.zeros(len(ids_of), dtype=torch.long)
        for i, row in enumerate(ids_of):
            first = longest - len(row) if side == "left" else 0
            ids[i, first : first + len(row)] = torch.tensor(row)
            mask[i, first : first + len(row)] = True
            # Without a start token no position is one: -1 equals no column.
            start[i] = first if self.start_plain is not None or self.start_chat is not None else -1
        return Batch(ids.to(self.device), mask.to(self.device), start.to(self.device))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(list(ids)))

    # ---- tokens to values --------------------------------------------------------------------------------------

    def module(self, site: Site) -> torch.nn.Module:
        """The block that a site belongs to."""
        return self.arch.decoder_layers[self.check_site(site).layer]

    @contextmanager
    def at(self, site: Site, function: SiteFunction) -> Iterator[None]:
        """Runs `function` on the value at `site` in every forward pass inside the block; the hook always comes off."""
        from interp_engine.hooks import hidden_arg_index

        block = self.module(site)

        def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            index = hidden_arg_index(args)
            value = args[index] if index is not None else kwargs["hidden_states"]
            new = function(value)
            if new is None:
                return None
            if index is not None:
                return (*args[:index], new, *args[index + 1 :]), kwargs
            return args, {**kwargs, "hidden_states": new}

        def after(_module: Any, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                new = function(output[0])
                return None if new is None else (new, *output[1:])
            return function(output)

        if site.kind == "resid_pre":
            handle = block.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = block.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def from_site(self, site: Site) -> Iterator[None]:
        """Blocks that run before `site` hand their input on unchanged inside the block.

        For passes whose value at the site is replaced anyway: what lies below is not computed again.
        """
        below = self.arch.decoder_layers[: site.depth]
        kept = [block.__dict__.get("forward") for block in below]
        is_tuple = self._blocks_return_tuples

        def hand_on(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            return (hidden_states,) if is_tuple else hidden_states

        try:
            for block in below:
                block.forward = hand_on
            yield
        finally:
            for block, forward in zip(below, kept, strict=True):
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = forward

    @cached_property
    def _blocks_return_tuples(self) -> bool:
        seen: list[bool] = []
        handle = self.arch.decoder_layers[0].register_forward_hook(
            lambda _m, _a, out: seen.append(isinstance(out, tuple))
        )
        try:
            self.values(self.batch([[0]]), [Site(0, "resid_post")])
        finally:
            handle.remove()
        return seen[0]

    def values(self, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """The values at `sites`, [batch, seq, d_model] each; the forward pass stops after the deepest of them."""
        import torch

        found: dict[Site, Tensor] = {}
        deepest = max(sites, key=lambda site: site.depth)
        positions = {}
        if not batch.mask[:, 0].all():  # padded on the left, where transformers would count the padding
            positions["position_ids"] = (batch.mask.long().cumsum(1) - 1).clamp_min(0)

        def keep(site: Site) -> SiteFunction:
            def function(value: Tensor) -> None:
                found[site] = value
                if len(found) == len(set(sites)):
                    raise _Enough

            return function

        with torch.no_grad(), ExitStack() as stack:
            # Hooks on one module run in the order of registration, so the deepest site is always the last one seen.
            for site in sorted(set(sites), key=lambda s: (s.depth, s.kind == "resid_pre", s != deepest)):
                stack.enter_context(self.at(site, keep(site)))
            with suppress(_Enough):
                self.hf(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False, **positions)
        return found


class _Enough(Exception):  # noqa: N818 - no error
    """Ends a forward pass once everything asked for was seen."""
