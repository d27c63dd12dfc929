"""Cards and searches in an atlas of 131,072 features against one of 24,576, both made up, and how long they take.

What an atlas costs is reading it, so the made-up ones have the true numbers of rows, examples and characters; their
words are drawn as words of a language are (a few are everywhere), so that common words have long columns here too.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import ROOT, Figure, Settings, check, in_turns, ratio, remark

if TYPE_CHECKING:
    from lancet.atlas.atlas import Atlas

SMALL, LARGE = 24_576, 131_072
EXAMPLES = (20, 5, 5, 5, 5, 5)  # of each band
SHARED = 4  # examples that show one passage
TOKENS, LETTERS = 48, 6  # of a passage, and of a token with its space
WINDOW = 32
VOCABULARY = 30_000
CARDS, QUERIES = 20, ("w00010", "w00000 w00003", "w20000", "w00100 w00050 w00007")
BAR = 2.0


def run(settings: Settings) -> Iterator[Figure]:
    from benchmarks import pairs
    from lancet.atlas.atlas import Atlas
    from lancet.atlas.card import cards
    from lancet.atlas.search import search

    with tempfile.TemporaryDirectory() as folder, pairs.own_cache(replace(settings, work=Path(folder))):
        held = {}
        for d_sae in (SMALL, LARGE):
            begin = time.perf_counter()
            held[d_sae] = Atlas.open(make(Path(folder) / str(d_sae), d_sae))
            remark(f"made {d_sae:,} features in {time.perf_counter() - begin:.0f} s")

        def draw_cards(atlas: Atlas) -> Any:
            return [cards(fresh(atlas), [feature])[0] for feature in range(7, len(atlas), len(atlas) // CARDS)][:CARDS]

        def draw_searches(atlas: Atlas) -> Any:
            return [search(fresh(atlas), query) for query in QUERIES]

        def compared(what: str, side: Any, count: int) -> Figure:
            sides = {f"{d_sae:,}": lambda atlas=atlas: side(atlas) for d_sae, atlas in held.items()}
            taken = in_turns(sides, settings.repeats)
            each = {name: [seconds / count for seconds in runs] for name, runs in taken.items()}
            return ratio(f"one {what}, the atlas opened anew", each, f"{LARGE:,}", f"{SMALL:,}", BAR)

        yield compared("card", draw_cards, CARDS)
        for d_sae, atlas in held.items():
            begin = time.perf_counter()
            check(bool(search(atlas, "w00010")), "a word that is there is found")
            yield Figure(f"the index of {d_sae:,} features, once", time.perf_counter() - begin, "s")
        yield compared("search", draw_searches, len(QUERIES))


def fresh(atlas: Atlas) -> Atlas:
    """The same atlas as a new process would open it, nothing of it in memory."""
    from lancet.atlas.atlas import Atlas

    return Atlas.open(atlas.folder)


def make(folder: Path, d_sae: int, seed: int = 0) -> Path:
    """A made-up atlas at full size, written by the writer of the tests' fixture."""
    import numpy as np
    import pyarrow as pa

    sys.path.insert(0, str(ROOT / "tests"))
    from fixtures_atlas import SCHEMAS, manifest, write_tables

    draw = np.random.default_rng(seed)
    words = np.array([f" w{i:05}"[: LETTERS + 1] for i in range(VOCABULARY)])

    def drawn(*shape: int) -> Any:
        """Numbers of words, the n-th about as often as 1/n."""
        return np.minimum(VOCABULARY ** draw.random(shape) - 1, VOCABULARY - 1).astype(np.int64)

    def lists(values: Any, kind: Any) -> Any:
        rows, count = values.shape
        return pa.ListArray.from_arrays(
            np.arange(0, rows * count + 1, count, dtype=np.int32), pa.array(values.ravel(), kind)
        )

    def texts(numbers: Any) -> Any:
        return lists(words[numbers], pa.string())

    def floats(count: int) -> Any:
        return lists(-np.sort(-draw.random((d_sae, count))), pa.float32())

    each = sum(EXAMPLES)
    rows = d_sae * each
    passages = rows // SHARED
    width = LETTERS + 1
    numbers = drawn(passages, TOKENS)
    letters = words.astype("S").view(np.uint8).reshape(VOCABULARY, width)[numbers].reshape(passages, TOKENS * width)
    offsets = np.arange(0, (passages + 1) * TOKENS * width, TOKENS * width, dtype=np.int64)
    large = pa.Array.from_buffers(
        pa.large_string(), passages, [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(letters))]
    )
    ends = np.broadcast_to(np.arange(width, TOKENS * width + 1, width, dtype=np.int32), (passages, TOKENS))
    hashes = draw.integers(0, 1 << 63, passages, dtype=np.uint64)
    of = draw.permutation(np.repeat(np.arange(passages), SHARED))
    of = np.concatenate([of, draw.integers(0, passages, rows - len(of))])
    first = draw.integers(0, TOKENS - WINDOW, rows)
    strengths = np.where(draw.integers(0, 255, (rows, WINDOW), np.uint8) < 25, np.uint8(90), np.uint8(0))
    strengths[:, 16] = 255
    bytes_ = pa.Array.from_buffers(
        pa.large_binary(),
        rows,
        [None, pa.py_buffer(np.arange(0, (rows + 1) * WINDOW, WINDOW, dtype=np.int64)), pa.py_buffer(strengths)],
    )
    fired = draw.integers(40, 40_000, d_sae)
    lenses = {}
    for name in ("logit_up", "logit_down", "effect_up", "effect_down"):
        lenses |= {name: texts(drawn(d_sae, 10)), f"{name}_values": floats(10)}
    columns = {
        "features": {
            "feature": np.arange(d_sae), "fired": fired, "density": fired / 1e7, "mean": draw.random(d_sae),
            "maximum": 10 * draw.random(d_sae), "minimum": np.zeros(d_sae),
            "histogram": lists(draw.integers(0, 500, (d_sae, 50)), pa.int64()),
            "positions": lists(draw.integers(0, 500, (d_sae, 10)), pa.int64()), "bounds": floats(6),
            "fires_tokens": texts(drawn(d_sae, 5)), "fires_shares": floats(5), **lenses,
            "near": lists(draw.integers(0, d_sae, (d_sae, 10)), pa.int32()), "near_cosines": floats(10),
            "together": lists(draw.integers(0, d_sae, (d_sae, 10)), pa.int32()), "together_shares": floats(10),
            "together_fired": fired,
        },
        "examples": {
            "feature": np.repeat(np.arange(d_sae), each),
            "band": np.tile(np.repeat(np.arange(len(EXAMPLES)), EXAMPLES), d_sae),
            "rank": np.tile(np.concatenate([np.arange(count) for count in EXAMPLES]), d_sae),
            "value": 10 * draw.random(rows), "passage": of, "peak": first + 16, "first": first, "strengths": bytes_,
            "hash": hashes[of],
        },
        "passages": {
            "passage": np.arange(passages), "hash": hashes, "start": np.ones(passages), "text": large,
            "ends": lists(np.ascontiguousarray(ends), pa.int32()),
        },
    }  # fmt: skip
    tables = {
        name: pa.table({key: value if isinstance(value, pa.Array) else pa.array(value) for key, value in held.items()})
        for name, held in columns.items()
    }
    for name, table in tables.items():
        check(table.schema.names == SCHEMAS[name].names, f"the columns of {name}")
    return write_tables(folder, tables, manifest(d_sae))
