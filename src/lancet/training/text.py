"""The corpus as one file of token ids: any piece of it is there at once, wherever it lies."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lancet.atlas import shards
from lancet.atlas.corpus import Bad, documents
from lancet.errors import DamagedError
from lancet.files import read_json, whole_file, write_json

if TYPE_CHECKING:
    from lancet.atlas.corpus import Source
    from lancet.tokens import Texts

Array = np.ndarray[Any, np.dtype[Any]]

IDS, LENGTHS, STARTS, ABOUT = "ids.int32", "lengths.int32", "starts.int32", "corpus.json"


@dataclass(frozen=True, eq=False)
class Text:
    """Pieces of documents, each of which is read with a start token of its own.

    Attributes:
        folder: of the files.
        about: what the corpus was: fingerprint, documents, repeats, bad_lines, tokens, pieces.
        lengths: [pieces] tokens of each, the start token left out.
        starts: [pieces] the id of each one's start token, -1 where there is none.
    """

    folder: Path
    about: dict[str, Any]
    lengths: Array = field(repr=False)
    starts: Array = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> Text | None:
        """What was written to a folder, None where it was not finished.

        Raises:
            DamagedError: files are shorter than they were.
        """
        if not (folder / ABOUT).is_file():
            return None
        about = read_json(folder / ABOUT)
        lengths, starts = (np.fromfile(folder / name, np.int32) for name in (LENGTHS, STARTS))
        size = (folder / IDS).stat().st_size
        is_whole = len(lengths) == len(starts) == about["pieces"]
        if not is_whole or size != 4 * about["tokens"] or lengths.sum() != about["tokens"]:
            raise DamagedError(f"the prepared corpus in {folder} is damaged; delete {folder} and begin again")
        return cls(folder, about, lengths, starts)

    @property
    def tokens(self) -> int:
        return int(self.about["tokens"])

    @cached_property
    def _ids(self) -> Array:
        return np.memmap(self.folder / IDS, np.int32, "r")

    @cached_property
    def _first(self) -> Array:
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def pieces(self, which: Array) -> tuple[list[Array], Array]:
        """Token ids of some pieces, without start tokens, and their start tokens."""
        spans = zip(self._first[which], self.lengths[which], strict=True)
        return [np.array(self._ids[first : first + n]) for first, n in spans], self.starts[which]


def prepare(
    model: Texts,
    found: Sequence[Source],
    column: str,
    folder: Path,
    length: int,
    tokens: int | None,
    bad: Bad,
    told: Callable[[int], None],
) -> Text:
    """The text of a corpus, prepared once; what an earlier attempt finished is taken.

    Args:
        found: where the documents come from.
        length: tokens of a piece at most, its start token counted.
        tokens: read no more than so many.
        told: called with the tokens done.

    Raises:
        UsageError: there is no text; LancetError: the disk is full.
    """
    if (ready := Text.open(folder)) is not None:
        return ready
    place = folder / "shards"
    prepared = shards.finished(place) or shards.prepare(
        model, documents(found, column, bad), place, length, tokens, bad=bad, told=told
    )
    lengths: list[int] = []
    starts: list[Array] = []
    with whole_file(folder / IDS) as ids, ids.open("wb") as file:
        for index in range(len(prepared.shards)):
            shard = prepared.load(index)
            file.write(np.concatenate(shard.ids).astype(np.int32).tobytes())
            lengths += map(len, shard.ids)
            starts.append(shard.start)
    for name, numbers in ((LENGTHS, np.array(lengths, np.int32)), (STARTS, np.concatenate(starts))):
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(numbers.tobytes())
    write_json(folder / ABOUT, prepared.to_json())
    shutil.rmtree(place)
    opened = Text.open(folder)
    assert opened is not None
    return opened
