"""A shard through the model and its SAEs: one pass of the model serves all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lancet import passes
from lancet.atlas.selection import Array
from lancet.atlas.shards import Shard
from lancet.atlas.statistics import Active

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.features import Features
    from lancet.model import Model
    from lancet.sae import Sae
    from lancet.site import Site


def active(model: Model, saes: Sequence[Sae], shard: Shard) -> list[Active]:
    """What fires in a shard, of each SAE.

    Raises:
        LancetError: an activation is not finite.
    """
    found = entries(model, saes, shard.ids, shard.start)
    return [Active.of(*each, sae.d_sae, shard.layout) for each, sae in zip(found, saes, strict=True)]


@dataclass(frozen=True)
class Pass:
    """What one pass of the model found.

    Attributes:
        values: site -> [batch, seq, width].
        keep: [batch, seq] True at every token that is read: neither padding nor start token.
        row: [n] the row of each such token in the batch, row by row.
        token: [n] its place among the tokens of all pieces.
    """

    values: dict[Site, Tensor]
    keep: Tensor
    row: Tensor
    token: Tensor


def read_pieces(model: Model, sites: Sequence[Site], ids: Sequence[Array], start: Array) -> Iterator[Pass]:
    """Pieces through the model as far as the deepest of some sites; pieces of like length share a pass.

    The shapes of the passes depend on the pieces alone, so that the same pieces give the same numbers.

    Args:
        ids: of each piece [tokens] token ids without the start token, at least one.
        start: [pieces] the ids of their start tokens, -1 where there are none.
    """
    import torch

    starts = model.start_plain is not None
    rows = [
        [int(first), *piece.tolist()] if starts else piece.tolist() for first, piece in zip(start, ids, strict=True)
    ]
    lengths = np.array([len(piece) for piece in ids])
    begin = torch.from_numpy(lengths.cumsum() - lengths)  # each piece's first token among all
    for group in passes.alike(rows):
        batch = model.batch([rows[i] for i in group])
        keep = batch.mask.clone()
        if starts:
            keep[:, 0] = False
        values = model.values(batch, sites)
        row, column = (index.cpu() for index in keep.nonzero(as_tuple=True))
        yield Pass(values, keep, row, begin[torch.tensor(group)[row]] + column - int(starts))


def entries(model: Model, saes: Sequence[Sae], ids: Sequence[Array], start: Array) -> list[tuple[Array, Array, Array]]:
    """What fires in some pieces, of each SAE; the start token is left out.

    Args:
        ids, start: as of `read_pieces`.

    Returns:
        for each SAE (token, feature, value), each [nnz], in no order: tokens are counted from the first of the first
        piece on, values are float32.
    """
    import torch

    found: list[list[Features]] = [[] for _ in saes]
    token: list[list[Tensor]] = [[] for _ in saes]
    held: list[list[tuple[Tensor, Tensor]]] = [[] for _ in saes]

    def encode(which: int) -> None:
        if held[which]:
            at, values = (torch.cat(parts) for parts in zip(*held[which], strict=True))
            held[which].clear()
            found[which].append(saes[which].features(values))
            token[which].append(at)

    for read in read_pieces(model, [sae.site for sae in saes], ids, start):
        for which, sae in enumerate(saes):
            value = read.values[sae.site]
            if sae.kind.contextual:  # text by text, with what stands before each token
                found[which] += list(sae.features_of(value, read.keep))
                token[which] += [read.token[read.row == i] for i in range(len(value))]
                continue
            held[which].append((read.token, value[read.keep]))
            waiting = sum(len(each) for each, _ in held[which])
            # A matrix that is converted at each use is used for as many tokens as there is room for.
            if sae.one_piece or waiting + passes.TOGETHER > sae.tokens_at_once:
                encode(which)
    out = []
    for which in range(len(saes)):
        encode(which)
        parts = [
            (at[f.token.cpu()], f.feature.cpu(), f.value.cpu())
            for at, f in zip(token[which], found[which], strict=True)
        ]
        tokens, feature, value = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        out.append((tokens, feature, value))
    return out
