"""Whether a model is fed as it was trained: the start of text that costs the least, and a cache that changes nothing.

Facts of the model and its tokenizer alone, whatever SAE is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lancet.checkup import Finding

if TYPE_CHECKING:
    from lancet.model import Model

START_TOKENS = 32  # of each text: a start matters most to the tokens just behind it
START = 0.05  # nats a token that another start may cost less
ROWS = 5  # texts in a pass: scores over a large vocabulary take much memory
STEPS = 8  # cached tokens, one a pass, as a generation takes them
# Starts of text of well-known models, tried where the vocabulary has them: a tokenizer may name another one.
STARTS = ("<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>")
KL = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


def start(model: Model, rows: Sequence[list[int]], figures: dict[str, float], usual: bool = True) -> Iterator[Finding]:
    """Whether text begins with one start token, the one that costs the least.

    Args:
        rows: plain text of several kinds. A single text may prefer the mark of a chat, or code that of a file.
        usual: also try the field's usual marks on a model that states no start. Some that were trained without one find
            text a little likelier behind the mark that ended their documents, which is no reason to refuse a pair.
    """
    own = model.start_plain
    starts = {own, model.start_chat} - {None}
    begins = [row[:2] for row in rows]
    if getattr(model.tokenizer, "chat_template", None):
        begins.append(list(model.tokenize_chat([{"role": "user", "content": "hello"}]).ids[:2]))
    twice = any(len(begin) > 1 and set(begin) <= starts for begin in begins)
    got = "two" if twice else "none" if own is None else "one"
    why = "two start tokens stand before the text, and the model was trained to see one" if twice else ""
    yield Finding("one start of text", got, "at most one", not twice, why)

    content = [row if own is None or row[0] != own else row[1:] for row in rows]
    content = [row[: min(START_TOKENS, model.context - 1)] for row in content]
    costs = {
        each: _cost_from(model, content, each)
        for each in dict.fromkeys((own, *_starts(model, usual or own is not None)))
    }
    best = min(costs, key=lambda each: costs[each])

    def told(each: int | None) -> str:
        return "none" if each is None else repr(model.decode([each]))

    figures |= {f"loss, start {told(each)}": value for each, value in costs.items()}
    fine = costs[own] <= costs[best] + START
    yield Finding(
        "start of text",
        f"{told(own)}, {costs[own]:.2f} nats a token",
        f"the one that costs the least ({told(best)}, {costs[best]:.2f})",
        fine,
        ""
        if fine
        else f"text begins with {'no start token' if own is None else told(own)}, and the model expects {told(best)} "
        f'there (`"start": {{"plain": ..., "chat": ...}}` in a lancet.json beside its config.json says which)',
    )


def _starts(model: Model, usual: bool) -> Iterator[int | None]:
    """What text might begin with: nothing, the tokenizer's and the chat's own marks, and the field's usual ones."""
    tokenizer = model.tokenizer
    yield None
    for known in (tokenizer.bos_token_id, model.start_chat, *([tokenizer.eos_token_id] if usual else [])):
        if isinstance(known, int):
            yield known
    for mark in STARTS if usual else ():
        known = tokenizer.convert_tokens_to_ids(mark)
        if isinstance(known, int) and tokenizer.convert_ids_to_tokens(known) == mark:  # not the unknown token
            yield known


def _cost_from(model: Model, content: Sequence[list[int]], start: int | None) -> float:
    """Nats a token with a start before each text, over the same tokens whatever the start: all but the first
    of each text."""
    import torch

    before = [] if start is None else [start]
    first = 1 + len(before)
    rows = [[*before, *row] for row in content if len(row) > 1]
    nats, count = 0.0, sum(len(row) - first for row in rows)
    for begin in range(0, len(rows), ROWS):
        batch = model.batch(rows[begin : begin + ROWS])
        with torch.inference_mode():
            scores = model.forward(batch.ids, batch.mask.long())[:, first - 1 : -1]
            wanted = batch.mask[:, first:]
            costs = torch.nn.functional.cross_entropy(scores[wanted].float(), batch.ids[:, first:][wanted])
        nats += float(costs) * int(wanted.sum())
    return nats / max(1, count)


def cached(model: Model, rows: Sequence[list[int]], figures: dict[str, float]) -> Iterator[Finding]:
    """The cache as a generation uses it: the beginning at once, then a token a pass."""
    import torch

    row = max(rows, key=len)
    ids = torch.tensor([row], device=model.device)
    begin = max(1, len(row) - STEPS)
    mask, positions = torch.ones_like(ids), torch.arange(len(row), device=model.device)[None]
    with torch.inference_mode():
        whole = model.forward(ids)[0, begin:].double().log_softmax(-1)
        cache = model.new_cache(1)
        model.forward(ids[:, :begin], mask[:, :begin], positions[:, :begin], cache, last=True)
        one_by_one = [
            model.forward(ids[:, i : i + 1], mask[:, : i + 1], positions[:, i : i + 1], cache, last=True)[0, -1]
            for i in range(begin, len(row))
        ]
        later = torch.stack(one_by_one).double().log_softmax(-1)
    figures["cached KL"] = kl = float((whole.exp() * (whole - later)).sum(-1).mean())
    bar = KL[str(model.dtype).removeprefix("torch.")]
    why = "" if kl <= bar else "a text that is written token by token differs from the same text read at once"
    yield Finding("cached equals uncached", f"KL {kl:.1e}", f"at most {bar:.0e}", kl <= bar, why)
