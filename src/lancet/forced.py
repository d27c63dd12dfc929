"""Forward passes over given tokens, many changes at once: what precedes every change is computed once.

`Branches` follows one text under many changes; `answer_losses` weighs many answers, each after its own prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lancet.edit import BatchEdits, RowChange, hooks

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.site import Site
    from lancet.tokens import Tokens

Changes = dict["Site", RowChange]
MOST_ROWS = 64
MOST_BYTES = 256 << 20  # of float32 logits held at once


def first_changed(changes: Sequence[Changes], length: int) -> int:
    """The first position at which any of the changes acts, at most the last of `length` positions."""
    first = length - 1
    for change in changes:
        for row in change.values():
            where = row.any.nonzero()
            if row and len(where):
                first = min(first, int(where[0, 0]))
    return first


class Branches:
    """One text under many changes, none of which acts before position `first`.

    Attributes:
        first: the first position that is computed for each change anew.
        head: [first, vocab] logits of the positions before; [1, vocab] of the last of them where not all are `scored`.
    """

    def __init__(self, model: Model, tokens: Tokens, first: int, scored: bool = True) -> None:
        import torch

        self.model, self.first = model, first
        self.ids = torch.tensor([tokens.ids], device=model.device)
        self.cache = model.new_cache(1)
        self.head = torch.zeros(0, model.d_vocab, device=model.device)
        if first:
            with torch.inference_mode():
                self.head = model.forward(self.ids[:, :first], cache=self.cache, last=not scored)[0]

    def logits(self, changes: Sequence[Changes]) -> Iterator[Tensor]:
        """[<= rows, len(text) - first, vocab] float32 logits under each change, in order, as many rows as fit."""
        width = self.ids.shape[1] - self.first
        rows = max(1, min(MOST_ROWS, MOST_BYTES // (4 * width * self.model.d_vocab)))
        for begin in range(0, len(changes), rows):
            yield self._pass(changes[begin : begin + rows])

    def _pass(self, changes: Sequence[Changes]) -> Tensor:
        import torch

        n, first = len(changes), self.first
        new = self.ids[:, first:].expand(n, -1)
        positions = torch.arange(first, self.ids.shape[1], device=new.device).expand(n, -1)
        cache = self.model.repeated(self.cache, n) if first else self.model.new_cache(n)
        edits = batch_edits(changes)
        with torch.inference_mode(), ExitStack() as stack:
            enter(stack, self.model, edits, [first] * n, new.shape[1])
            return self.model.forward(new, positions=positions, cache=cache).float()


def batch_edits(changes: Sequence[Changes]) -> dict[Site, BatchEdits]:
    """All rows' changes, by site."""
    sites = sorted({site for change in changes for site, row in change.items() if row})
    return {site: BatchEdits([change.get(site, RowChange([])) for change in changes]) for site in sites}


def enter(stack: ExitStack, model: Model, edits: dict[Site, BatchEdits], first: Sequence[int], columns: int) -> None:
    """Puts edits into effect for one pass; see `BatchEdits.place`."""
    for edit in edits.values():
        edit.place(first, columns)
    for site, function in hooks(edits):
        stack.enter_context(model.at(site, function))


def answer_losses(
    model: Model, prompts: Sequence[Tokens], answers: Sequence[Sequence[int]], changes: Sequence[Changes] | None = None
) -> Tensor:
    """[rows, longest answer] loss in nats of each answer's tokens after its prompt, NaN beyond an answer's end.

    Args:
        changes: each row's; none for the plain model.
    """
    import torch

    longest, most = max(map(len, prompts)), max(1, *map(len, answers))
    batch = model.batch(prompts, side="left")
    given = torch.zeros(len(prompts), most, dtype=torch.long)
    known = torch.zeros(len(prompts), most, dtype=torch.bool)
    for i, answer in enumerate(answers):
        given[i, : len(answer)] = torch.tensor(list(answer), dtype=torch.long)
        known[i, : len(answer)] = True
    given, known = given.to(model.device), known.to(model.device)
    mask = torch.cat([batch.mask.long(), torch.ones_like(given)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    first = [len(prompt) - longest for prompt in prompts]
    edits, cache = batch_edits(changes or [{}] * len(prompts)), model.new_cache(len(prompts))
    with torch.inference_mode():
        with ExitStack() as stack:
            enter(stack, model, edits, first, longest)
            head = model.forward(batch.ids, batch.mask.long(), positions[:, :longest], cache, last=True)
        with ExitStack() as stack:
            enter(stack, model, edits, [f + longest for f in first], most)
            rest = model.forward(given, mask, positions[:, longest:], cache)
        logits = torch.cat([head, rest[:, :-1]], 1).float()
        losses = logits.logsumexp(-1) - logits.gather(-1, given[..., None])[..., 0]
    return losses.masked_fill(~known, float("nan"))
