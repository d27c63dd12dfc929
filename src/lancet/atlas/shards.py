"""A corpus as shards: documents cut into pieces of tokens once, in files that the model is run over.

A **piece** is a stretch of one document, read with a start token of its own: the one that its document brings (that of
a chat), else that of plain text. A **shard** is a run of whole pieces. Shards hold the pieces' text too, so that what
examples show needs neither the corpus nor the tokenizer again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lancet.atlas.corpus import Bad
from lancet.atlas.statistics import Layout
from lancet.errors import DamagedError, UsageError
from lancet.files import read_json, whole_file, write_json

if TYPE_CHECKING:
    from lancet.tokens import Texts

Array = np.ndarray[Any, np.dtype[Any]]

SHARD = 32_768  # tokens of a shard, about
LONGEST = 8_192  # tokens that a piece may have
TOGETHER = 256  # documents tokenised at once
STRETCH = 100_000  # characters of a document tokenised at once
PREPARED = "prepared.json"


class Piece(NamedTuple):
    """A piece.

    Attributes:
        ids: [tokens] int32, without the start token.
        ends: [tokens] int32: where each token ends in the piece's text, in characters.
        text: behind the start token.
        start: the id of its start token, -1 where the model's texts have none.
    """

    ids: Array
    ends: Array
    text: str
    start: int


@dataclass(frozen=True, eq=False)
class Shard:
    """Some pieces.

    Attributes:
        number: [pieces] int32, each piece's number in the preparation.
        hash, document: [pieces] uint64, of the piece and of its document's text.
        ids: [pieces] lists of token ids, without the start token.
        ends: [pieces] lists: where each token ends in the piece's text, in characters.
        text: [pieces].
        start: [pieces] int32, the id of the start token, -1 where there is none.
    """

    number: Array
    hash: Array
    document: Array
    ids: list[Array]
    ends: list[Array]
    text: list[str]
    start: Array

    @cached_property
    def layout(self) -> Layout:
        """Its tokens one after the other."""
        lengths = np.array([len(ids) for ids in self.ids])
        piece = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(len(piece)) - np.repeat(lengths.cumsum() - lengths, lengths) + 1
        return Layout(piece, position, np.concatenate(self.ids), self.hash, self.document, self.number)

    @classmethod
    def load(cls, path: Any, first: int) -> Shard:
        """Reads a shard.

        Args:
            path: a file, or what was read from one.
            first: the number of its first piece.

        Raises:
            DamagedError: it is not what was written.
        """
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            table = parquet.read_table(pyarrow.BufferReader(path) if isinstance(path, bytes) else path)
        except (OSError, pyarrow.ArrowException) as error:
            raise DamagedError(f"the shard {path if isinstance(path, Path) else ''} is damaged: {error}") from error
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        lists = {
            name: np.split(columns[name].values.to_numpy(), columns[name].offsets.to_numpy()[1:-1])
            for name in ("ids", "ends")
        }
        number = np.arange(first, first + len(table), dtype=np.int32)
        hash_, document, start = (columns[name].to_numpy() for name in ("hash", "document", "start"))
        return cls(number, hash_, document, lists["ids"], lists["ends"], columns["text"].to_pylist(), start)

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        import pyarrow
        import pyarrow.parquet as parquet

        table = pyarrow.table(
            {
                "hash": pyarrow.array(self.hash),
                "document": pyarrow.array(self.document),
                "ids": pyarrow.array(self.ids, pyarrow.list_(pyarrow.int32())),
                "ends": pyarrow.array(self.ends, pyarrow.list_(pyarrow.int32())),
                "text": pyarrow.array(self.text, pyarrow.string()),
                "start": pyarrow.array(self.start),
            }
        )
        with whole_file(path) as temporary, temporary.open("wb") as file:
            parquet.write_table(table, file, compression="zstd")


@dataclass
class Prepared:
    """What a corpus became.

    Attributes:
        folder: of the shards.
        shards: [tokens, pieces] of each.
        documents, repeats, bad_lines: counts; a repeat is a document whose text came before, and is left out.
        fingerprint: of the documents' texts, whatever their order.
    """

    folder: Path
    shards: list[tuple[int, int]] = field(default_factory=list)
    documents: int = 0
    repeats: int = 0
    bad_lines: int = 0
    fingerprint: str = ""

    @property
    def tokens(self) -> int:
        """In all shards, start tokens left out."""
        return sum(tokens for tokens, _ in self.shards)

    @property
    def pieces(self) -> int:
        return sum(pieces for _, pieces in self.shards)

    def path(self, index: int) -> Path:
        """A shard's file."""
        return self.folder / f"{index:06}.parquet"

    @cached_property
    def first(self) -> list[int]:
        """The number of each shard's first piece."""
        return [0, *np.cumsum([pieces for _, pieces in self.shards]).tolist()]

    def load(self, index: int) -> Shard:
        """A shard."""
        return Shard.load(self.path(index), self.first[index])

    def of_piece(self, number: Array) -> Array:
        """[n] the shards in which pieces lie."""
        return np.searchsorted(self.first, number, side="right") - 1

    def to_json(self) -> dict[str, Any]:
        """As `manifest.json` tells the corpus."""
        names = ("fingerprint", "documents", "repeats", "bad_lines", "tokens", "pieces")
        return {name: getattr(self, name) for name in names}


class Seen:
    """The hashes of documents, 8 bytes each: sorted runs, merged when a later one has grown like an earlier one."""

    def __init__(self) -> None:
        self._runs: list[Array] = []

    def new(self, hashes: Array) -> Array:
        """[n] True where a hash (uint64) comes for the first time."""
        new = np.zeros(len(hashes), dtype=bool)
        new[np.unique(hashes, return_index=True)[1]] = True
        for run in self._runs:
            at = np.searchsorted(run, hashes).clip(max=len(run) - 1)
            new &= run[at] != hashes
        if new.any():
            self._runs.append(np.sort(hashes[new]))
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.concatenate([self._runs[-1], last])
            self._runs[-1].sort(kind="stable")
        return new


def finished(folder: Path) -> Prepared | None:
    """A preparation that came to its end, None where there is none."""
    path = folder / PREPARED
    if not path.is_file():
        return None
    told = read_json(path)
    names = ("documents", "repeats", "bad_lines", "fingerprint")
    return Prepared(folder, [(tokens, pieces) for tokens, pieces in told["shards"]], **{n: told[n] for n in names})


def prepare(
    model: Texts,
    documents: Iterable[str],
    folder: Path,
    length: int,
    tokens: int | None = None,
    size: int = SHARD,
    bad: Bad | None = None,
    told: Callable[[int], None] = lambda tokens: None,
) -> Prepared:
    """Tokenises documents into shards; what an earlier attempt left unfinished is begun anew.

    Args:
        length: tokens of a piece at most, its start token counted.
        tokens: after so many reading ends, in the middle of a document if need be.
        size: tokens of a shard, about.
        bad: what the documents' reader counts into.
        told: called with the tokens done, after each shard.

    Raises:
        UsageError: there is no text.
    """
    shutil.rmtree(folder, ignore_errors=True)
    out, state = Prepared(folder), _Fingerprint()
    rows: list[tuple[Any, ...]] = []
    held = 0

    def flush() -> None:
        number = np.arange(out.pieces, out.pieces + len(rows), dtype=np.int32)
        hash_, document, ids, ends, text, start = (list(column) for column in zip(*rows, strict=True))
        names = np.array(hash_, np.uint64), np.array(document, np.uint64)
        shard = Shard(number, *names, ids, ends, text, np.array(start, np.int32))
        shard.save(out.path(len(out.shards)))
        out.shards.append((held, len(rows)))
        rows.clear()
        told(out.tokens)

    left = tokens
    for row in _pieces(model, documents, length, out, state):
        if left is not None:
            row = _shortened(row, left)
            left -= len(row[2])
        if rows and held + len(row[2]) > size:
            flush()
            held = 0
        rows.append(row)
        held += len(row[2])
        if left == 0:
            break
    if rows:
        flush()
    out.bad_lines, out.fingerprint = bad.total if bad else 0, str(state)
    if not out.shards:
        why = f"; {bad}" if bad and bad.total else ""
        raise UsageError(
            f"the corpus is empty: it holds no text{why}; give other files or another --field".replace("\n", "; ")
        )
    told_json = {"shards": out.shards} | out.to_json()
    write_json(folder / PREPARED, told_json)
    return out


class _Fingerprint:
    """The sum of the documents' hashes and their count."""

    def __init__(self) -> None:
        self.sum = self.count = 0

    def add(self, hash_: int) -> None:
        self.sum, self.count = (self.sum + hash_) % (1 << 64), self.count + 1

    def __str__(self) -> str:
        return f"{self.sum:016x}-{self.count}"


def _shortened(row: tuple[Any, ...], most: int) -> tuple[Any, ...]:
    hash_, document, ids, ends, text, start = row
    if len(ids) <= most:
        return row
    return hash_, document, ids[:most], ends[:most], text[: int(ends[most - 1])], start


def _pieces(
    model: Texts, documents: Iterable[str], length: int, out: Prepared, state: _Fingerprint
) -> Iterator[tuple[Any, ...]]:
    """(hash, document's hash, ids, ends, text, start) of each piece."""
    seen = Seen()
    for texts in groups(documents):
        digests = [blake2b(text.encode(), digest_size=8) for text in texts]
        hashes = np.array([int.from_bytes(d.digest(), "little") for d in digests], np.uint64)
        new = seen.new(hashes)
        out.repeats += int((~new).sum())
        chosen = np.flatnonzero(new).tolist()
        for i, pieces in zip(chosen, cut(model, [texts[i] for i in chosen], length), strict=True):
            out.documents += 1  # when it is taken: reading may end in the middle of a group
            state.add(int(hashes[i]))
            for number, piece in enumerate(pieces):
                digest = digests[i].copy()
                digest.update(number.to_bytes(8, "little"))
                yield int.from_bytes(digest.digest(), "little"), int(hashes[i]), *piece


def cut(model: Texts, texts: Sequence[str], length: int) -> Iterator[list[Piece]]:
    """The pieces of each text; a text without tokens has none.

    Args:
        length: tokens of a piece at most, its start token counted.

    """
    plain = -1 if model.start_plain is None else model.start_plain
    content = length - (model.start_plain is not None)
    stretches = [_stretches(text) for text in texts]
    encoded = iter(_encoded(model, [stretch for parts in stretches for stretch in parts]))
    for parts in stretches:
        pieces = []
        for text in parts:
            ids, ends, start, opening = next(encoded)
            for first in range(0, len(ids), content):
                begin = int(ends[first - 1]) if first else opening
                own = ends[first : first + content]
                told = text[begin : int(own[-1])], plain if first else start
                pieces.append(Piece(ids[first : first + content], own - begin, *told))
        yield pieces


def groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists that are tokenised at once."""
    group: list[str] = []
    size = 0
    for text in documents:
        group.append(text)
        size += len(text)
        if len(group) == TOGETHER or size > 10 * STRETCH:
            yield group
            group, size = [], 0
    if group:
        yield group


def _stretches(text: str) -> list[str]:
    """A text in parts that a tokenizer takes at once, cut before white space where there is any."""
    parts = []
    while len(text) > STRETCH:
        at = max(text.rfind(" ", STRETCH // 2, STRETCH), text.rfind("\n", STRETCH // 2, STRETCH))
        at = at if at > 0 else STRETCH
        parts.append(text[:at])
        text = text[at:]
    return [*parts, text]


def _encoded(model: Texts, texts: list[str]) -> Iterator[tuple[Array, Array, int, int]]:
    """Ids of each text, without a start token, where each token ends, the start token, and where the first other one
    begins (behind a start token that the text brings itself, as in `Texts.tokenize`); a character belongs to its first
    token."""
    if not texts:
        return
    plain = model.start_plain
    found = model.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for ids, spans in zip(found["input_ids"], found["offset_mapping"], strict=True):
        ids_, ends = np.array(ids, np.int32), np.array([end for _, end in spans], np.int32)
        start, begin = -1 if plain is None else plain, 0
        if plain is not None and ids[:1] in ([plain], [model.start_chat]):
            start, begin, ids_, ends = int(ids[0]), int(ends[0]), ids_[1:], ends[1:]
        yield ids_, np.maximum.accumulate(ends) if len(ends) else ends, start, begin
