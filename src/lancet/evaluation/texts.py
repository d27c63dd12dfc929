"""The text that SAEs are scored on: the bench's held-out lines and passages, or the user's own files."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lancet import bench
from lancet.atlas import corpus, shards
from lancet.errors import UsageError

if TYPE_CHECKING:
    from lancet.model import Model

LENGTH = 512  # tokens of a piece at most, its start token counted, as in a harvest
CHUNK = 8192  # tokens of pieces that are sorted by length among themselves


def bundled(seed: int = 11) -> Iterator[str]:
    """The bench's held-out templates, lines and passages mixed, in one expansion after the other until no new text
    comes; the beginning is a fair sample of the whole."""
    rng = random.Random(seed)
    templates = [template for concept in bench.concepts().values() for template in concept.part("heldout")]
    templates += [template for lines in bench.passages().values() for template in bench.select(lines, "heldout")]
    seen: set[str] = set()
    while True:
        new = {bench.expand(template, rng) for template in templates} - seen
        if not new:
            return
        seen |= new
        texts = sorted(new)
        rng.shuffle(texts)
        yield from texts


def own(files: Sequence[str | Path], column: str = "text", bad: corpus.Bad | None = None) -> Iterator[str]:
    """The documents of files, folders, standard input or a data set, as `lancet harvest` takes them.

    Raises:
        UsageError: nothing is there, or no file of a known kind.
    """
    return corpus.documents(corpus.sources(files), column, bad)


def chunks(model: Model, texts: Iterable[str], most: int) -> Iterator[list[list[int]]]:
    """Token ids of pieces, the start token first, about CHUNK tokens at a time; a longer text is cut into pieces.

    Args:
        most: tokens in all, start tokens left out; the last piece is cut short.

    Raises:
        UsageError: there is no text.
    """
    held: list[list[int]] = []
    waiting, left = 0, most
    for piece in _pieces(model, texts):
        row = piece.ids[:left].tolist()
        left -= len(row)
        waiting += len(row)
        held.append(row if piece.start < 0 else [piece.start, *row])
        if waiting >= CHUNK or not left:
            yield held
            held, waiting = [], 0
        if not left:
            return
    if held:
        yield held
    if left == most:
        raise UsageError("there is no text to score on; give other files, or leave --text out for the bundled text")


def _pieces(model: Model, texts: Iterable[str]) -> Iterator[shards.Piece]:
    for group in shards.groups(texts):
        for pieces in shards.cut(model, group, min(LENGTH, model.context)):
            yield from pieces
