"""Many texts through a model and an SAE: what facts and backgrounds are measured with.

Nobody waits half an hour for facts. How much text is read is bounded by the multiplications that it takes, by what
machine it is, and by how many features light: bounds that give the same text on the same kind of machine every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.features import Features
    from lancet.model import Model
    from lancet.sae import Sae
    from lancet.site import Site
    from lancet.tokens import Tokens

TOGETHER = 2048  # tokens of one pass of the model, padding counted
CHUNK = 8192  # tokens of texts that are sorted by length among themselves: reading may end after each chunk
WORK, WORK_ON_CARD = 2e13, 4e14  # multiplications: three minutes of two cores, a minute or two of a home card
LEAST = 1024  # tokens that are read whatever they cost
ENTRIES = 50_000_000  # active features in all, after which reading ends: 3,000 a token, where a sparse code has 100
PURSUED = 64  # features that matching pursuit chooses a token, each with a product of its own, where none says how many


@dataclass(frozen=True)
class Piece:
    """Some tokens that were read, start tokens left out.

    Attributes:
        features: their active features, a row each.
        text: [rows] which text each is of; position: [rows] where in it; ids: [rows] the token itself.
        values: site -> [rows, width] their values, in the model's dtype.
    """

    features: Features
    text: Tensor
    position: Tensor
    ids: Tensor
    values: dict[Site, Tensor]


def work(model: Model, sae: Sae) -> float:
    """The multiplications of one token: the blocks below the site that the SAE writes, and its encoder."""
    blocks = model.arch.decoder_layers[: sae.writes.depth]
    encoder = float(sae.d_in * sae.d_sae)
    if sae.architecture == "matching_pursuit":
        most = sae.pursuit.max_iterations if sae.pursuit else None
        encoder *= min(most or sae.d_in, PURSUED)
    if sae.temporal is not None:
        encoder += sum(value.numel() for layer in sae.temporal.layers for value in layer.values())
    return encoder + sum(p.numel() for block in blocks for p in block.parameters())


def affordable(model: Model, sae: Sae, rows: Sequence[Tokens]) -> list[Tokens]:
    """The first of the texts, as many as a few minutes of this machine allow."""
    bound = (WORK if model.device.type == "cpu" else WORK_ON_CARD) / work(model, sae)
    left, kept = max(float(LEAST), bound), []
    for row in rows:
        left -= len(row)
        if left < 0 and kept:
            break
        kept.append(row)
    return kept


def through(
    model: Model,
    sae: Sae,
    rows: Sequence[Tokens],
    sites: Sequence[Site] = (),
    told: Callable[[int], None] = lambda done: None,
    most: float = float("inf"),
) -> Iterator[Piece]:
    """Reads texts, piece by piece: a text lies in one piece, and the pieces keep to the order of the texts by chunks.

    Args:
        sites: whose values are wanted, beside the site that the SAE reads.
        told: called with how many texts are done.
        most: active features after which reading ends with the chunk.
    """
    chunk = max(CHUNK, 0 if sae.kind.contextual else sae.tokens_at_once)
    begin = entries = 0
    while begin < len(rows) and entries <= most:
        end, tokens = begin, 0
        while end < len(rows) and (end == begin or tokens + len(rows[end]) <= chunk):
            tokens += len(rows[end])
            end += 1
        for piece in _chunk(model, sae, rows[begin:end], begin, sites):
            entries += len(piece.features.value)
            yield piece
        begin = end
        told(begin)


def _chunk(model: Model, sae: Sae, rows: Sequence[Tokens], first: int, sites: Sequence[Site]) -> Iterator[Piece]:
    """One piece where all that lights can be found at once, else a piece for each pass of the model or each text."""
    import torch

    wanted = list(dict.fromkeys([sae.site, *sites]))
    held: list[tuple[Tensor, Tensor, Tensor, dict[Site, Tensor]]] = []
    for which in alike(rows):
        batch = model.batch([rows[i] for i in which])
        values, keep = model.values(batch, wanted), batch.content
        row, position = keep.nonzero(as_tuple=True)
        text = torch.tensor(which, device=row.device)[row] + first
        kept = {site: value[keep] for site, value in values.items()}
        if sae.kind.contextual:  # text by text, with what stands before each token
            for i, found in enumerate(sae.features_of(values[sae.site], keep)):
                own = row == i
                mine = {site: value[own] for site, value in kept.items()}
                yield Piece(found, text[own], position[own], batch.ids[keep][own], mine)
            continue
        held.append((text, position, batch.ids[keep], kept))
        # A matrix that is converted at each use is used for as many tokens as there is room for.
        if sae.one_piece or sum(len(each[0]) for each in held) + TOGETHER > sae.tokens_at_once:
            yield _joined(sae, held)
            held = []
    if held:
        yield _joined(sae, held)


def _joined(sae: Sae, held: Sequence[tuple[Tensor, Tensor, Tensor, dict[Site, Tensor]]]) -> Piece:
    import torch

    text, position, ids, found = zip(*held, strict=True)
    values = {site: torch.cat([each[site] for each in found]) for site in found[0]}
    return Piece(sae.features(values[sae.site]), torch.cat(text), torch.cat(position), torch.cat(ids), values)


def alike(rows: Sequence[Sized], together: int = TOGETHER) -> Iterator[list[int]]:
    """The texts in groups of like length, each of at most so many tokens with its padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    group: list[int] = []
    for i in order:
        if group and len(rows[i]) * (len(group) + 1) > together:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
