"""Text to tokens and back, with positions.

Index 0 of every text is the start token, exactly one, the one that the model was trained to see there; a batch is
padded, never packed, so that no text attends to another. The file knows tokenizers and chat templates, no networks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lancet.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


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

    def holding(self, text: str, occurrence: int = 0) -> tuple[int, ...]:
        """The positions of the tokens that hold these characters, however the tokenizer cut them.

        Raises:
            UsageError: they do not occur (so often); the nearest words are named.
        """
        if not text:
            raise UsageError("nothing to look for: the text after --at is empty")
        begin = -1
        for _ in range(occurrence + 1):
            begin = self.text.find(text, begin + 1)
            if begin < 0:
                near = difflib.get_close_matches(text, self.text.split(), n=3, cutoff=0.5)
                hint = f"; nearest: {', '.join(near)}" if near else ""
                times = f" {occurrence + 1} times" if occurrence else ""
                shown = self.text if len(self.text) <= 60 else self.text[:57] + "..."
                raise UsageError(f"{text!r} does not occur{times} in the text {shown!r}{hint}")
        end = begin + len(text)
        return tuple(i for i, (a, b) in enumerate(self.spans) if a < end and b > begin and b > a)


def followed(tokens: Tokens, ids: Sequence[int]) -> Tokens:
    """A text with more tokens after it, as generation leaves it; their characters are not in `text`."""
    end, more = len(tokens.text), len(ids)
    return Tokens(
        tokens.text, (*tokens.ids, *ids), (*tokens.spans, *((end, end),) * more), (*tokens.roles, *("text",) * more)
    )


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


class Texts:
    """The half of a model that reads and writes text; its fields are those of `lancet.model.Model`."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    start_plain: int | None
    start_chat: int | None

    @property
    def context(self) -> int:
        """The longest text, in tokens."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where token ids must lie."""
        raise NotImplementedError

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
