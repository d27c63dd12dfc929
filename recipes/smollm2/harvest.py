"""Activations of the recipe's texts, in shards; a shard that is there is not made again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lancet.files import whole_file
from lancet.model import Model
from lancet.site import Site

TEXTS_PER_SHARD = 1024
TOKENS_PER_BATCH = 4096
REPEATED_OPENING_KEPT = 20  # the template's own system turn is the same in every chat: one in so many keeps it


def values_of(model: Model, texts: list[str], site: Site, longest: int) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """For batches of texts of like length: values [tokens, d], row of each token, and the texts' indices."""
    rows = [model.tokenize(text, most=longest) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while order:
        size = max(1, TOKENS_PER_BATCH // len(rows[order[min(len(order), 512) - 1]]))
        taken, order = order[:size], order[size:]
        batch = model.batch([rows[i] for i in taken])
        value = model.values(batch, [site])[site]
        keep = batch.content
        row_of = torch.arange(len(taken))[:, None].expand_as(keep)[keep]
        yield value[keep], row_of, taken


def opening_length(model: Model) -> int:
    """Tokens of the template's own system turn, which every chat repeats (the start token not counted)."""
    first = model.tokenize_chat([{"role": "user", "content": "a"}], answer=False)
    second = model.tokenize_chat([{"role": "user", "content": "b"}], answer=False)
    return next(i for i, (a, b) in enumerate(zip(first.ids, second.ids, strict=True)) if a != b) - 1


def harvest(model: Model, texts: list[str], site: Site, longest: int, out: Path, seed: int) -> list[Path]:
    """Writes `out/shard-NNNN.safetensors`, {"values": [tokens, d] bfloat16}, tokens shuffled inside each shard."""
    out.mkdir(parents=True, exist_ok=True)
    skip = opening_length(model)
    paths, begun, done = [], time.monotonic(), 0
    for number, first in enumerate(range(0, len(texts), TEXTS_PER_SHARD)):
        path = out / f"shard-{number:04d}.safetensors"
        paths.append(path)
        if path.exists():
            continue
        chunk = texts[first : first + TEXTS_PER_SHARD]
        parts = []
        for value, row_of, taken in values_of(model, chunk, site, longest):
            keep = torch.ones(len(row_of), dtype=torch.bool)
            for row, index in enumerate(taken):
                if chunk[index].startswith("<|im_start|>system") and (first + index) % REPEATED_OPENING_KEPT:
                    keep[(row_of == row).nonzero()[:skip, 0]] = False
            parts.append(value[keep].to(torch.bfloat16))
        values = torch.cat(parts)
        generator = torch.Generator().manual_seed(seed + number)
        values = values[torch.randperm(len(values), generator=generator)]
        with whole_file(path) as temporary:
            save_file({"values": values}, temporary)
        done += len(values)
        print(f"shard {number}: {done / (time.monotonic() - begun):.0f} tokens/s", flush=True)
    return paths
