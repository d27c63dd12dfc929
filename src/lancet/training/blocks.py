"""Activations in blocks: a random part of the text, read whole, shuffled, and given out as batches.

A block depends on its number alone, so that whoever begins anywhere gets the same numbers: the corpus' pieces are put
in a random order once and cut into blocks; each round goes through all blocks, in an order of its own, and shuffles the
rows of each anew. Rows that fill no batch at the end of a block go before those of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lancet.atlas.activations import read_pieces
from lancet.errors import LancetError
from lancet.files import whole_file
from lancet.massive import ordinary

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.site import Site
    from lancet.training.text import Text

Array = np.ndarray[Any, np.dtype[Any]]

ORDER = 20_270  # the seed of every order of the text
PART = 8192  # rows that are converted to float32 at once


@dataclass(eq=False)
class Feed:
    """One site's rows of one block, behind those that the block before left over.

    Attributes:
        rest: [r, width] left over.
        values: [n, width] of the block, in the order of the text.
        order: [m] those that are trained on, shuffled.
        batch: rows of a batch.
        massive: rows of the block that are left out.
    """

    rest: Tensor
    values: Tensor
    order: Tensor
    batch: int
    massive: int

    def __len__(self) -> int:
        """Whole batches."""
        return (len(self.rest) + len(self.order)) // self.batch

    def __getitem__(self, index: int) -> Tensor:
        """[batch, width] float32."""
        return self._rows(index * self.batch, (index + 1) * self.batch).float()

    def left(self) -> Tensor:
        """[less than batch, width] what is left over."""
        return self._rows(len(self) * self.batch, len(self.rest) + len(self.order))

    def _rows(self, first: int, end: int) -> Tensor:
        import torch

        before = len(self.rest)
        own = self.values[self.order[max(0, first - before) : max(0, end - before)]]
        return torch.cat([self.rest[first:end], own]) if first < before else own

    def mean_and_norm(self) -> tuple[Tensor, float]:
        """[width] the mean of the block's rows, float32, and the mean of their norms."""
        import torch

        total, norms = torch.zeros(self.values.shape[1], dtype=torch.float64, device=self.values.device), 0.0
        for rows in self.order.split(PART):
            part = self.values[rows].float()
            total += part.double().sum(0)
            norms += float(part.norm(dim=1).double().sum())
        return (total / len(self.order)).float(), norms / len(self.order)


@dataclass(frozen=True, eq=False)
class Blocks:
    """All blocks of a text.

    Attributes:
        sites: whose activations are wanted.
        size: tokens of a block, about.
        folder: where activations are kept in bfloat16; None keeps none, and has the model's own dtype.
    """

    model: Model
    sites: Sequence[Site]
    text: Text = field(repr=False)
    size: int
    folder: Path | None = None

    @cached_property
    def _parts(self) -> list[Array]:
        """The pieces of each block, blocks of like size."""
        lengths = self.text.lengths
        order = np.random.default_rng(ORDER).permutation(len(lengths))
        begin = np.cumsum(lengths[order], dtype=np.int64) - lengths[order]
        count = -(-self.text.tokens // self.size)
        block = begin * count // self.text.tokens
        return [part for part in np.split(order, np.searchsorted(block, np.arange(1, count))) if len(part)]

    def __len__(self) -> int:
        """Blocks of a round."""
        return len(self._parts)

    def feeds(
        self, number: int, rest: dict[Site, Tensor], batch: int, told: Callable[[int, int], None]
    ) -> dict[Site, Feed]:
        """The rows of the block with a number, counted through all rounds.

        Args:
            rest: rows left over by the block before.
            told: called with the tokens read and those in all, now and then; what it raises ends the reading.

        Raises:
            LancetError: an activation is not finite, or the disk is full.
        """
        import torch

        round_, at = divmod(number, len(self))
        which = int(np.random.default_rng((ORDER, round_)).permutation(len(self))[at]) if round_ else at
        values = self._kept(which) or self._computed(which, told)
        n = len(next(iter(values.values())))
        shuffled = torch.from_numpy(np.random.default_rng((ORDER, round_, which)).permutation(n))
        found = {}
        for site in self.sites:
            value = values[site]
            norms = torch.cat([part.float().norm(dim=1) for part in value.split(PART)])
            if not norms.isfinite().all():
                raise LancetError(f"activations at {site} are not finite; open the model with --dtype float32")
            order = shuffled.to(value.device)
            order = order[ordinary(norms)[order]]
            left = rest.get(site, value[:0])
            found[site] = Feed(left, value, order, batch, n - len(order))
        return found

    def _computed(self, which: int, told: Callable[[int, int], None]) -> dict[Site, Tensor]:
        import torch

        ids, start = self.text.pieces(self._parts[which])
        n = sum(map(len, ids))
        dtype = self.model.dtype if self.folder is None else torch.bfloat16
        out = {
            site: torch.empty(n, self.model.d_site(site), dtype=dtype, device=self.model.device) for site in self.sites
        }
        done = 0
        told(0, n)
        for read in read_pieces(self.model, self.sites, ids, start):
            token = read.token.to(self.model.device)
            for site in self.sites:
                out[site][token] = read.values[site][read.keep].to(out[site])
            done += len(token)
            told(done, n)
        if self.folder is not None:
            from safetensors.torch import save_file

            with whole_file(self._file(which)) as temporary:
                save_file({str(site): value for site, value in out.items()}, temporary)
        return out

    def _kept(self, which: int) -> dict[Site, Tensor] | None:
        if self.folder is None or not self._file(which).is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(self._file(which), device=str(self.model.device))
            return {site: found[str(site)] for site in self.sites}
        except (SafetensorError, KeyError):
            return None

    def _file(self, which: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{which:06}.safetensors"
