"""Texts as sparse rows of a matrix: the active features of each token, or pooled over each text.

Documents are cut into the pieces that a harvest reads (shards.py), and as many pieces as make some 8,000 tokens are
read at once, so that memory does not grow with the corpus. A document that goes on in the next chunk is pooled in
parts, which `final` puts together; parts are therefore kept in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from lancet.atlas import shards
from lancet.atlas.activations import entries
from lancet.atlas.selection import Array
from lancet.atlas.statistics import check_finite
from lancet.errors import UsageError

if TYPE_CHECKING:
    from lancet.model import Model
    from lancet.sae import Sae

CHUNK = 8_192  # tokens read at once, about
POOLS = ("max", "mean", "count")


@dataclass(frozen=True, eq=False)
class Encoded:
    """Texts as a sparse matrix.

    Attributes:
        matrix: scipy CSR [rows, d_sae] float32; a row is a token, or a text where it was pooled.
        document: [rows] int32 which text each row is of, from 0.
        position: [rows] int32 the token's place in its piece, from 1 (0 is the start token, which has no row); None
            where it was pooled.
        token: [rows] the token's own characters; None where it was pooled. A character of several tokens belongs to
            the first of them.
    """

    matrix: Any
    document: Array
    position: Array | None
    token: list[str] | None


@dataclass(frozen=True, eq=False)
class Chunk:
    """Pieces that are read together.

    Attributes:
        document: [pieces] int32, from 0.
        ids, ends, text, start: of each piece, as of `shards.Piece`; a document without tokens has one empty piece.
    """

    document: Array
    ids: list[Array]
    ends: list[Array]
    text: list[str]
    start: Array

    @cached_property
    def lengths(self) -> Array:
        """[pieces] tokens."""
        return np.array([len(ids) for ids in self.ids], np.int64)

    @property
    def digest(self) -> str:
        """Of the tokens and of which documents they are."""
        digest = blake2b(self.document.tobytes() + self.lengths.tobytes(), digest_size=8)
        for ids in self.ids:
            digest.update(ids.tobytes())
        digest.update(self.start.tobytes())
        return digest.hexdigest()


def check_pool(pool: str | None) -> None:
    """Raises UsageError where there is no such way of pooling."""
    if pool is not None and pool not in POOLS:
        raise UsageError(f"no pooling {pool!r}; choose {', '.join(POOLS)}, or leave it out for a row of each token")


def chunks(model: Model, documents: Iterable[str], length: int, tokens: int | None = None) -> Iterator[Chunk]:
    """Documents cut into pieces, in their order; a document may go on in the next chunk.

    Args:
        length: tokens of a piece at most, its start token counted.
        tokens: after so many reading ends, in the middle of a document if need be.
    """
    rows: list[tuple[int, shards.Piece]] = []
    held, left = 0, tokens

    def made() -> Chunk:
        document = np.array([number for number, _ in rows], np.int32)
        ids, ends, text, start = (list(column) for column in zip(*(piece for _, piece in rows), strict=True))
        rows.clear()
        return Chunk(document, ids, ends, text, np.array(start, np.int32))

    for number, piece in _pieces(model, documents, length):
        if left is not None and len(piece.ids) > left:
            piece = piece._replace(ids=piece.ids[:left], ends=piece.ends[:left])
        if rows and held + len(piece.ids) > CHUNK:
            yield made()
            held = 0
        rows.append((number, piece))
        held += len(piece.ids)
        if left is not None:
            left -= len(piece.ids)
            if left == 0:
                break
    if rows:
        yield made()


def _pieces(model: Model, documents: Iterable[str], length: int) -> Iterator[tuple[int, shards.Piece]]:
    number = 0
    nothing = shards.Piece(np.zeros(0, np.int32), np.zeros(0, np.int32), "", -1)
    for texts in shards.groups(documents):
        for pieces in shards.cut(model, texts, length):
            for piece in pieces or [nothing]:
                yield number, piece
            number += 1


def matrix(model: Model, sae: Sae, chunk: Chunk) -> Any:
    """scipy CSR [tokens, d_sae] float32 of a chunk, columns sorted.

    Raises:
        LancetError: an activation is not finite.
    """
    from scipy.sparse import coo_matrix, csr_matrix

    shape = (int(chunk.lengths.sum()), sae.d_sae)
    some = np.flatnonzero(chunk.lengths)
    ids = [chunk.ids[i] for i in some]
    if not ids:
        return csr_matrix(shape, dtype=np.float32)
    token, feature, value = entries(model, [sae], ids, chunk.start[some])[0]
    check_finite(value)
    found = coo_matrix((value, (token, feature)), shape).tocsr()
    found.sort_indices()
    return found


def table(model: Model, sae: Sae, chunk: Chunk, pool: str | None = None) -> Any:
    """A chunk as a pyarrow table, what `final` takes.

    Returns:
        for each token `document` int32, `position` int32, `token` string, `features` list of int32, `values` list of
        float; where it is pooled, for each document `document` int32, `tokens` int64, `features`, and `values` list of
        double: of max and count the numbers themselves, of mean the sums.
    """
    import pyarrow as pa

    found = matrix(model, sae, chunk)
    if pool is None:
        lengths = chunk.lengths
        position = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths) + 1
        columns = {
            "document": pa.array(np.repeat(chunk.document, lengths)),
            "position": pa.array(position.astype(np.int32)),
            "token": pa.array([token for piece in zip(chunk.text, chunk.ends, strict=True) for token in _cut(*piece)]),
        }
        columns["token"] = columns["token"].cast(pa.string())
        return pa.table(columns | _lists(found.indptr, found.indices, found.data))
    document, which = np.unique(chunk.document, return_inverse=True)  # they come in order
    tokens = np.bincount(which, chunk.lengths, len(document)).astype(np.int64)
    row = np.repeat(np.repeat(which, chunk.lengths), np.diff(found.indptr))
    value = np.ones(len(found.data)) if pool == "count" else found.data.astype(np.float64)
    indptr, feature, value = _pooled(row, found.indices, value, len(document), pool)
    columns = {"document": pa.array(document.astype(np.int32)), "tokens": pa.array(tokens)}
    return pa.table(columns | _lists(indptr, feature, value))


def _cut(text: str, ends: Array) -> Iterator[str]:
    begin = 0
    for end in ends.tolist():
        yield text[begin:end]
        begin = end


def _lists(indptr: Array, feature: Array, value: Array) -> dict[str, Any]:
    """The columns `features` and `values`."""
    import pyarrow as pa

    offsets = pa.array(indptr.astype(np.int32))
    held = {"features": feature.astype(np.int32), "values": value}
    return {name: pa.ListArray.from_arrays(offsets, pa.array(each)) for name, each in held.items()}


def _pooled(row: Array, feature: Array, value: Array, rows: int, pool: str) -> tuple[Array, Array, Array]:
    """Entries of the same row and feature put together: (indptr [rows + 1], features, values), sorted.

    The largest is the largest by size, for SAEs whose activations fall below zero; of equal ones the positive.
    """
    key = row.astype(np.int64) << 32 | feature
    order = np.argsort(key, kind="stable")
    key, value = key[order], value[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    if len(first) and pool == "max":
        high, low = np.maximum.reduceat(value, first), np.minimum.reduceat(value, first)
        value = np.where(high >= -low, high, low)
    elif len(first):
        value = np.add.reduceat(value, first)
    key = key[first]
    indptr = np.concatenate([[0], np.bincount(key >> 32, minlength=rows).cumsum()])
    return indptr, (key & 0xFFFFFFFF).astype(np.int32), value


def final(parts: Iterable[Any], pool: str | None) -> Iterator[Any]:
    """Tables of chunks, in their order, as they are given out: a document pooled in several parts becomes one row.

    Yields:
        pyarrow tables: of tokens as they came; of documents `document` int32, `tokens` int64, `features` list of int32,
        `values` list of float.
    """
    import pyarrow as pa

    if pool is None:
        yield from parts
        return
    held = None  # the last row, which may go on in the next part
    for part in parts:
        if held is not None:
            same = held["document"][0] == part["document"][0]
            both = pa.concat_tables([held, part.slice(0, 1)])
            part = pa.concat_tables([_one(both, pool) if same else both, part.slice(1)])
        ready, held = part.slice(0, len(part) - 1), part.slice(len(part) - 1)
        if len(ready):
            yield _given(ready, pool)
    if held is not None:
        yield _given(held, pool)


def _flat(part: Any, column: str) -> Array:
    return part[column].combine_chunks().flatten().to_numpy()


def _counts(part: Any) -> Array:
    """[rows] how many features each row has."""
    return part["features"].combine_chunks().value_lengths().to_numpy()


def _one(both: Any, pool: str) -> Any:
    """Two rows of one document as one."""
    import pyarrow as pa

    feature, value = _flat(both, "features"), _flat(both, "values")
    indptr, feature, value = _pooled(np.zeros(len(feature), np.int64), feature, value, 1, pool)
    tokens = pa.array([sum(both["tokens"].to_pylist())], pa.int64())
    return pa.table(
        {"document": both["document"].combine_chunks()[:1], "tokens": tokens} | _lists(indptr, feature, value)
    )


def _given(part: Any, pool: str) -> Any:
    import pyarrow as pa

    counts = _counts(part)
    value = _flat(part, "values")
    if pool == "mean":
        value = value / np.repeat(part["tokens"].to_numpy(), counts)
    indptr = np.concatenate([[0], counts.cumsum()])
    columns = {name: part[name].combine_chunks() for name in ("document", "tokens")}
    return pa.table(columns | _lists(indptr, _flat(part, "features"), value.astype(np.float32)))


def features(
    model: Model, sae: Sae, texts: str | Sequence[str], pool: str | None = None, length: int | None = None
) -> Encoded:
    """The active features of texts, of every token or pooled over each text.

    Args:
        texts: one or several; a long one is cut into pieces as in a harvest, each read with its own start token.
        pool: "max" (by size), "mean" (over all its tokens) or "count" (tokens on which a feature fires); the start
            token is left out.
        length: tokens of a piece at most, its start token counted; 512, or the context where that is less, for None.

    Raises:
        UsageError: no such pooling or length, no text, or a text that is no Unicode.
        LancetError: an activation is not finite.
    """
    import pyarrow as pa
    from scipy.sparse import csr_matrix

    from lancet.atlas.corpus import is_unicode
    from lancet.atlas.plan import piece_length

    check_pool(pool)
    length = piece_length(model, length)
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise UsageError("no text to encode; give at least one")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not is_unicode(text):
            raise UsageError(f"text {number} is {'not valid Unicode' if isinstance(text, str) else 'no string'}")
    whole = pa.concat_tables(final((table(model, sae, part, pool) for part in chunks(model, texts, length)), pool))
    counts = _counts(whole)
    indptr = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
    found = csr_matrix((_flat(whole, "values"), _flat(whole, "features"), indptr), (len(whole), sae.d_sae))
    document = whole["document"].to_numpy()
    if pool is not None:
        return Encoded(found, document, None, None)
    return Encoded(found, document, whole["position"].to_numpy(), whole["token"].to_pylist())
