"""The index that an atlas is searched by: built once, kept in the cache, mapped when it is asked.

For each field (what features fire on, what they say, what their examples are about) there is a matrix of BM25 scores,
terms by features, that bm25s computes; the score of a query is the sum of its terms' columns. Terms are known by 64
bits of their hash, in order, so that a query maps a file and reads a few pages of it, however large the vocabulary.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.atlas import terms
from lancet.atlas.atlas import Atlas
from lancet.atlas.manifest import FILES, NAME
from lancet.errors import DamagedError, LancetError
from lancet.files import cache_dir, read_json, whole_folder, write_json
from lancet.telling import Say, counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

LAYOUT = 1  # raise it when what is written changes
FIELDS = ("fires", "says", "about")
EXAMPLES = 5  # of the strongest band, that a feature is searched by
AT_ONCE = 16_384  # features whose examples are in memory at once
WEIGHT = 10  # how often a token that holds all of a feature's activation counts
PARTS = ("terms", "begins", "features", "scores")


@dataclass(frozen=True)
class Matrix:
    """BM25 scores of one field, a column for each term.

    Attributes:
        terms: [terms] hashes of the terms, ascending.
        begins: [terms + 1] where each column begins in the next two.
        features: [entries] row numbers; scores: [entries].
    """

    terms: NDArray[Any]
    begins: NDArray[Any]
    features: NDArray[Any]
    scores: NDArray[Any]

    def column(self, term: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """The features that have a term, and their scores."""
        import numpy as np

        wanted = np.uint64(hashed(term))
        at = int(np.searchsorted(self.terms, wanted))
        if at == len(self.terms) or self.terms[at] != wanted:
            return self.features[:0], self.scores[:0]
        begin, end = int(self.begins[at]), int(self.begins[at + 1])
        return self.features[begin:end], self.scores[begin:end]


def hashed(term: str) -> int:
    """64 bits that stand for a term."""
    return int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "little")


class Collected:
    """Documents of one field, each the terms of one of the rows 0, 1, 2, ...: four bytes a term."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.rows: list[array[int]] = []

    def add(self, document: Iterable[str]) -> None:
        """Takes the terms of the next row."""
        numbers = self.numbers
        self.rows.append(array("i", (numbers.setdefault(term, len(numbers)) for term in document)))

    def matrix(self) -> Matrix:
        """The scores of all rows."""
        import logging

        import numpy as np

        if not self.numbers:
            none = np.zeros(0, np.float32)
            return Matrix(none.astype(np.uint64), np.zeros(1, np.int64), none.astype(np.int32), none)
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)
        made: Any = bm25s.BM25()
        kept = made.build_index_from_ids(list(range(len(self.numbers))), self.rows, show_progress=False)
        names = np.array([hashed(term) for term in self.numbers], np.uint64)
        order = np.argsort(names, kind="stable")
        begins = kept["indptr"].astype(np.int64)
        sizes = np.diff(begins)[order]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        entries = np.repeat(begins[:-1][order] - starts[:-1], sizes) + np.arange(starts[-1])
        return Matrix(names[order], starts, kept["indices"][entries].astype(np.int32), kept["data"][entries])


# ---- on disk -------------------------------------------------------------------------------------------------------


def opened(folder: Path, state: Mapping[str, Any], make: Callable[[], Mapping[str, Matrix]]) -> Mapping[str, Matrix]:
    """The matrices that a folder of the cache holds, mapped; made anew where they are of another state or damaged.

    Args:
        state: what they depend on, as JSON.
        make: returns name -> Matrix.
    """
    found = _mapped(folder, state)
    if found is not None:
        return found
    made = make()
    with suppress(LancetError), whole_folder(folder) as out:  # a cache that cannot be written costs the work again
        _write(out, made, state)
    return made


def _write(folder: Path, made: Mapping[str, Matrix], state: Mapping[str, Any]) -> None:
    import numpy as np

    for name, held in made.items():
        for part in PARTS:
            np.save(folder / f"{name}.{part}.npy", getattr(held, part), allow_pickle=False)
    write_json(folder / "index.json", {"layout": LAYOUT, "fields": list(made), "state": dict(state)})


def _mapped(folder: Path, state: Mapping[str, Any]) -> dict[str, Matrix] | None:
    import numpy as np

    try:
        told = read_json(folder / "index.json")
        if told != {"layout": LAYOUT, "fields": told["fields"], "state": dict(state)}:
            return None
        return {
            name: Matrix(*(np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in PARTS))
            for name in told["fields"]
        }
    except (OSError, ValueError, KeyError, TypeError, DamagedError):
        return None


def place(atlas: Atlas) -> Path:
    """Where the index of an atlas lies: told apart by where the atlas lies."""
    name = hashlib.sha256(str(atlas.folder.resolve()).encode()).hexdigest()[:16]
    return cache_dir() / "search" / name


def of(atlas: Atlas, say: Say = lambda line: None) -> Mapping[str, Matrix]:
    """The index of an atlas, built where there is none of this manifest.

    Raises:
        DamagedError: the atlas is damaged.
    """
    manifest = (atlas.folder / NAME).read_bytes()
    state = {"manifest": hashlib.sha256(manifest).hexdigest()}
    state |= {name: (atlas.folder / name).stat().st_size for name in FILES}
    return opened(place(atlas), state, lambda: _built(atlas, say))


def _built(atlas: Atlas, say: Say) -> dict[str, Matrix]:
    say(f"building the index of {len(atlas):,} features (once)")
    collected = {field: Collected() for field in FIELDS}
    with counted(say, "reading the atlas", len(atlas)) as told:
        for first in range(0, len(atlas), AT_ONCE):
            for documents in _documents(atlas, first, min(first + AT_ONCE, len(atlas))):
                for field, document in zip(FIELDS, documents, strict=True):
                    collected[field].add(document)
            told(min(first + AT_ONCE, len(atlas)))
    return {field: collected.pop(field).matrix() for field in FIELDS}


def _documents(atlas: Atlas, first: int, end: int) -> Iterator[tuple[list[str], list[str], list[str]]]:
    """What each of some features fires on, says, and has in its examples, as terms."""
    windows = {
        feature: list(found) for feature, found in groupby(_windows(atlas, first, end), key=lambda window: window[0])
    }
    rows = atlas.query(
        "SELECT feature, fires_tokens, fires_shares, effect_up, effect_up_values, logit_up FROM features "
        f"WHERE feature >= {first} AND feature < {end} ORDER BY feature"
    )
    for feature, tokens, shares, said, values, logits in rows:
        own = windows.get(feature, ())
        fires = [t for _, text, begin, stop in own for t in terms.terms(terms.around(text, begin, stop))]
        for token, share in zip(tokens, shares, strict=True):
            fires += terms.terms(token) * (1 + round(WEIGHT * share))
        measured = [token for token, value in zip(said, values, strict=True) if value > 0]
        says = [t for token in measured or logits for t in terms.terms(token)]
        yield fires, says, [t for _, text, _, _ in own for t in terms.terms(text)]


def _windows(atlas: Atlas, first: int, end: int) -> list[tuple[int, str, int, int]]:
    """(feature, window, where its peak begins and ends in it) of the strongest examples of some features."""
    edge = "CASE WHEN {0} = 0 THEN 0 ELSE p.ends[{0}] END"  # where token {0} begins; DuckDB counts lists from 1
    start, peak = edge.format("CAST(e.first AS INTEGER)"), edge.format("CAST(e.peak AS INTEGER)")
    return [
        (int(feature), str(text), int(begin), int(stop))
        for feature, text, begin, stop in atlas.query(
            f"SELECT e.feature, substr(p.text, {start} + 1, p.ends[e.first + octet_length(e.strengths)] - {start}), "
            f"{peak} - {start}, p.ends[e.peak + 1] - {start} "
            "FROM examples e JOIN passages p ON e.passage = p.passage "
            f"WHERE e.band = 0 AND e.rank < {EXAMPLES} AND e.feature >= {first} AND e.feature < {end} "
            "ORDER BY e.feature, e.rank"
        )
    ]
