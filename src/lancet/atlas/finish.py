"""Statistics to the tables of an atlas (docs/atlas.md): bands, lists, windows of text, and the manifest at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lancet.atlas import company, lenses
from lancet.atlas.manifest import FACTS, NAME, VERSION
from lancet.atlas.place import slug
from lancet.atlas.selection import AFTER, BEFORE, DRAWN, STRONGEST, begins, drawn, ranks, strongest
from lancet.atlas.sketch import AllPairs
from lancet.atlas.statistics import BINS, UNIT, Statistics
from lancet.errors import DamagedError
from lancet.facts import FIRES, Facts
from lancet.files import whole_file, write_json
from lancet.telling import Say

if TYPE_CHECKING:
    from lancet.atlas.plan import Plan
    from lancet.atlas.shards import Prepared
    from lancet.lab import Lab
    from lancet.model import Model
    from lancet.sae import Sae

FRACTIONS = (0.2, 0.4, 0.6, 0.8)  # of the maximum, near which bands end
ROWS = {"features": 1024, "examples": 4096, "passages": 1024}  # of a row group: a card reads a few of a large atlas

BLOCK = 4096  # features whose rows are made together

Array = np.ndarray[Any, np.dtype[Any]]


def write(
    lab: Lab,
    sae: Sae,
    plan: Plan,
    told: dict[str, Any],
    prepared: Prepared,
    statistics: Statistics,
    folder: Path,
    work: Path,
    with_lenses: bool,
    most: int,
    say: Say,
) -> None:
    """Writes an atlas; a folder that has a manifest already is left as it is.

    Args:
        told: the SAE's entry of the plan.
        most: examples of the strongest band, at most STRONGEST; the other bands get a quarter of it.
        work: keeps the lenses' blocks between attempts.
    """
    if (folder / NAME).is_file():
        return
    statistics.settle()
    shown = {}
    if with_lenses:
        own = work / f"lenses-{slug(told['site'])}"
        logit = lenses.logit(lab, sae, own, say)
        shown = {"logit": logit, "effect": lenses.effects(lab, sae, own, say)}
    edges = bounds(statistics)
    chosen = examples(statistics, edges, most)
    _write_passages(prepared, chosen, folder)
    _write_examples(chosen, folder)
    _write_features(lab.model, sae, statistics, edges, shown, folder)
    facts(lab, sae, statistics, shown).save(folder / FACTS)
    write_json(
        folder / NAME, _manifest(lab, plan, told, prepared, statistics, shown) | {"examples": [most, drawn_of(most)]}
    )


def _manifest(
    lab: Lab, plan: Plan, told: dict[str, Any], prepared: Prepared, statistics: Statistics, shown: dict[str, Any]
) -> dict[str, Any]:
    from lancet import __version__

    pairs = statistics.pairs
    exact = isinstance(pairs, AllPairs)
    counted = {"tokens": statistics.tokens if exact else len(pairs.uid), "exact": exact}
    return {
        "lancet_atlas": VERSION,
        "model": plan.model,
        "sae": {name: told[name] for name in ("name", "site", "d_sae", "key", "fingerprint")},
        "corpus": prepared.to_json(),
        "scale": 2.0**statistics.octave,
        "positions": statistics.places.tolist(),
        "co_firing": counted,
        "length": plan.length,
        "shard_tokens": plan.shard_tokens,
        "lenses": {name: shown.get(name) is not None for name in ("logit", "effect")},
        "versions": {"lancet": __version__},
    }


def facts(lab: Lab, sae: Sae, statistics: Statistics, shown: dict[str, Any]) -> Facts:
    """What edits and readings go by, measured on the corpus instead of the bundled text.

    The typical norm stays as it was: doses are kept in units of it, and must not change when a corpus is harvested.
    """
    import torch

    ids = np.full((sae.d_sae, FIRES), -1, np.int64)
    shares = np.zeros((sae.d_sae, FIRES), np.float32)
    feature, rank, token, share = _top_tokens(statistics)
    ids[feature, rank], shares[feature, rank] = token, share
    effects: dict[str, Any] = {}
    if held := shown.get("effect"):
        base = lenses.baseline(lab, sae)
        effects = {"effect_ids": torch.from_numpy(held["up"]), "effect_values": torch.from_numpy(held["up_values"])}
        effects |= {"effect_mean": base.mean, "effect_deviation": base.deviation}
    return Facts(
        maximum=torch.from_numpy(np.where(statistics.fired > 0, statistics.maximum, 0).astype(np.float32)),
        density=torch.from_numpy(statistics.fired / max(1, statistics.tokens)),
        norm=lab.facts(sae, harvested=False).norm,
        tokens=statistics.tokens,
        fires_ids=torch.from_numpy(ids),
        fires_shares=torch.from_numpy(shares),
        **effects,
    )


# ---- bands -----------------------------------------------------------------------------------------------------------


def largest(statistics: Statistics) -> Array:
    """[d_sae] float32 the largest size of each feature's activation."""
    return np.maximum(np.abs(statistics.maximum), np.abs(statistics.minimum))


def bounds(statistics: Statistics) -> Array:
    """[d_sae, 4] int: the bins that bands 2 to 5 begin with."""
    size = largest(statistics).astype(np.float64)
    with np.errstate(divide="ignore"):
        parts = [np.log2(size * fraction) - statistics.octave for fraction in FRACTIONS]
    index = np.rint(4 * np.stack(parts, 1).clip(-1e3, 1e3)) + BINS
    return index.clip(1, BINS).astype(np.int64)


def drawn_of(most: int) -> int:
    """How many examples a fifth of the range gets where the strongest band has `most`."""
    return max(1, most * DRAWN // STRONGEST)


def examples(statistics: Statistics, edges: Array, most: int = STRONGEST) -> dict[str, Array]:
    """The chosen peaks with their bands, by feature, band, then rank: {"peak": PEAK, "band", "rank"}."""
    statistics.settle()
    top, low = strongest(statistics.peaks.top, most), statistics.peaks.low.copy()
    band = 1 + (low["bin"][:, None] >= edges[low["feature"]]).sum(1)
    low["bin"] = band  # bands are whole bins: the lowest hashes of a band are among those of its bins
    low = drawn(low, drawn_of(most))
    peaks = np.concatenate([top, low])
    bands = np.r_[np.zeros(len(top), np.int8), low["bin"].astype(np.int8)]
    order = np.lexsort((bands, peaks["feature"]))  # stable: within a band the order stays
    peaks, bands = peaks[order], bands[order]
    rank = ranks(begins(peaks["feature"], bands)).astype(np.int8)
    return {"peak": peaks, "band": bands, "rank": rank}


# ---- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Windows:
    """Stretches of pieces that windows lie in, by hash, then start."""

    hash: Array
    piece: Array
    start: Array
    stop: Array


def _windows(prepared: Prepared, chosen: dict[str, Array]) -> _Windows:
    """Overlapping windows of a piece become one stretch; `chosen` gets "passage", "first", "start" of each example."""
    peaks = chosen["peak"]
    peak = peaks["peak"].astype(np.int64)
    start = np.maximum(peak - BEFORE, 0)
    stop = np.minimum(peak + AFTER + 1, _lengths(prepared, peaks["piece"]))
    order = np.lexsort((start, peaks["piece"], peaks["hash"]))
    piece, hash_, a, b = peaks["piece"][order], peaks["hash"][order], start[order], stop[order]
    new_piece = begins(hash_, piece)
    run = new_piece.cumsum() * (1 << 20)
    reach = np.maximum.accumulate(b + run) if len(b) else b
    new = new_piece.copy()
    new[1:] |= (a + run)[1:] > reach[:-1]
    which = new.cumsum() - 1
    starts = np.flatnonzero(new)
    first, last = a[starts], (np.maximum.reduceat(b, starts) if len(b) else b)
    chosen["passage"] = np.empty(len(peaks), np.int32)
    chosen["passage"][order] = which
    chosen["window"], chosen["stop"] = start, stop
    chosen["start"] = first[chosen["passage"]] if len(peaks) else start
    return _Windows(hash_[starts], piece[starts], first, last)


def _lengths(prepared: Prepared, piece: Array) -> Array:
    """[n] tokens of pieces."""
    distinct, inverse = np.unique(piece, return_inverse=True)
    shard = prepared.of_piece(distinct)
    found = np.empty(len(distinct), np.int64)
    for index in np.unique(shard).tolist():
        inside = shard == index
        lengths = np.array([len(ids) for ids in prepared.load(index).ids])
        found[inside] = lengths[distinct[inside] - prepared.first[index]]
    return found[inverse]


def _write_passages(prepared: Prepared, chosen: dict[str, Array], folder: Path) -> None:
    import pyarrow as pa

    windows = _windows(prepared, chosen)
    texts: list[str] = [""] * len(windows.hash)
    ends: list[Any] = [None] * len(texts)
    shard = prepared.of_piece(windows.piece)
    for index in np.unique(shard).tolist():
        held = prepared.load(index)
        for row in np.flatnonzero(shard == index).tolist():
            own = int(windows.piece[row]) - prepared.first[index]
            if held.hash[own] != windows.hash[row]:
                raise DamagedError(f"{prepared.path(index)} is not the shard that was counted; begin anew")
            a, b = int(windows.start[row]), int(windows.stop[row])
            begin = int(held.ends[own][a - 1]) if a else 0
            ends[row] = held.ends[own][a:b] - begin
            texts[row] = held.text[own][begin : int(held.ends[own][b - 1])]
    table = pa.table(
        {
            "passage": pa.array(np.arange(len(texts), dtype=np.int32)),
            "hash": pa.array(windows.hash),
            "start": pa.array(windows.start.astype(np.int32)),
            "text": pa.array(texts, pa.string()),
            "ends": pa.array(ends, pa.list_(pa.int32())),
        }
    )
    _write(folder / "passages.parquet", table.schema, [table])


def _write_examples(chosen: dict[str, Array], folder: Path) -> None:
    import pyarrow as pa

    peaks, start = chosen["peak"], chosen["start"]
    offset = chosen["window"] - (peaks["peak"].astype(np.int64) - BEFORE)
    strengths = [
        row[begin:end].tobytes()
        for row, begin, end in zip(
            peaks["strengths"], offset.tolist(), (offset + chosen["stop"] - chosen["window"]).tolist(), strict=True
        )
    ]
    table = pa.table(
        {
            "feature": pa.array(peaks["feature"].copy()),
            "band": pa.array(chosen["band"]),
            "rank": pa.array(chosen["rank"]),
            "value": pa.array(peaks["value"].copy()),
            "passage": pa.array(chosen["passage"]),
            "peak": pa.array((peaks["peak"] - start).astype(np.int16)),
            "first": pa.array((chosen["window"] - start).astype(np.int16)),
            "strengths": pa.array(strengths, pa.binary()),
            "hash": pa.array(peaks["hash"].copy()),
        }
    )
    _write(folder / "examples.parquet", table.schema, [table])


# ---- features --------------------------------------------------------------------------------------------------------


def _write_features(
    model: Model, sae: Sae, statistics: Statistics, edges: Array, shown: dict[str, Any], folder: Path
) -> None:
    import pyarrow as pa

    strings, floats = pa.list_(pa.string()), pa.list_(pa.float32())
    wanted = {
        "feature": pa.int32(),
        "fired": pa.int64(),
        "density": pa.float64(),
        "mean": pa.float32(),
        "maximum": pa.float32(),
        "minimum": pa.float32(),
        "histogram": pa.list_(pa.int64()),
        "positions": pa.list_(pa.int64()),
        "bounds": floats,
        "fires_tokens": strings,
        "fires_shares": floats,
    }
    for lens in ("logit", "effect"):
        for end in ("up", "down"):
            wanted |= {f"{lens}_{end}": strings, f"{lens}_{end}_values": floats}
    wanted |= {"near": pa.list_(pa.int32()), "near_cosines": floats}
    wanted |= {"together": pa.list_(pa.int32()), "together_shares": floats, "together_fired": pa.int64()}
    schema = pa.schema(list(wanted.items()))
    fired = statistics.fired
    mean = (statistics.total / UNIT / np.maximum(fired, 1)).astype(np.float32)
    borders = np.zeros((sae.d_sae, 6), np.float32)
    borders[:, 1:5] = np.exp2((edges - BINS) / 4 + statistics.octave)
    borders[:, 5] = largest(statistics)
    borders[fired == 0] = 0
    words = _Words(model)
    fires, near = _fires(statistics, words), _by_feature(company.near(sae), sae.d_sae)
    together = _together(statistics)
    blank: list[Any] = []

    def tables() -> Iterator[Any]:
        for first in range(0, sae.d_sae, BLOCK):
            part = slice(first, min(first + BLOCK, sae.d_sae))
            count = part.stop - part.start
            columns: dict[str, Any] = {
                "feature": np.arange(part.start, part.stop, dtype=np.int32),
                "fired": fired[part],
                "density": fired[part] / max(1, statistics.tokens),
                "mean": mean[part],
                "maximum": statistics.maximum[part],
                "minimum": statistics.minimum[part],
                "histogram": list(statistics.histogram[part]),
                "positions": list(statistics.positions[part]),
                "bounds": list(borders[part]),
                "fires_tokens": [fires.get(i, (blank, blank))[0] for i in range(part.start, part.stop)],
                "fires_shares": [fires.get(i, (blank, blank))[1] for i in range(part.start, part.stop)],
            }
            for lens in ("logit", "effect"):
                held = shown.get(lens)
                for end in ("up", "down"):
                    ids = [] if held is None else held[end][part].tolist()
                    columns[f"{lens}_{end}"] = [words.of(row) for row in ids] or [blank] * count
                    values = [blank] * count if held is None else list(held[f"{end}_values"][part])
                    columns[f"{lens}_{end}_values"] = values
            columns["near"], columns["near_cosines"] = list(near[0][part]), list(near[1][part])
            columns["together"] = [together[0].get(i, blank) for i in range(part.start, part.stop)]
            columns["together_shares"] = [together[1].get(i, blank) for i in range(part.start, part.stop)]
            columns["together_fired"] = together[2][part]
            yield pa.table({name: pa.array(columns[name], type_) for name, type_ in wanted.items()}, schema)

    _write(folder / "features.parquet", schema, tables())


class _Words:
    """Tokens as text, each decoded once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: dict[int, str] = {}

    def of(self, ids: list[int]) -> list[str]:
        """The text of each token alone."""
        for i in ids:
            if i not in self.known:
                self.known[i] = self.model.decode([i])
        return [self.known[i] for i in ids]


def _fires(statistics: Statistics, words: _Words) -> dict[int, tuple[list[str], list[float]]]:
    """feature -> the tokens that hold most of its activation, and their shares of it."""
    feature, _, token, shares = _top_tokens(statistics)
    found: dict[int, tuple[list[str], list[float]]] = {}
    for f, word, share in zip(feature.tolist(), words.of(token.tolist()), shares.tolist(), strict=True):
        held = found.setdefault(f, ([], []))
        held[0].append(word)
        held[1].append(share)
    return found


def _top_tokens(statistics: Statistics) -> tuple[Array, Array, Array, Array]:
    """Features, ranks, token ids and shares of the FIRES tokens that hold most of each feature's activation."""
    feature, token, mass = statistics.fires.by_token()
    whole = np.bincount(feature, mass, statistics.d_sae)
    rank = ranks(begins(feature))
    keep = rank < FIRES
    feature, rank, token, mass = feature[keep], rank[keep], token[keep], mass[keep]
    return feature, rank, token, mass / whole[feature]


def _by_feature(blocks: Iterator[tuple[Array, Array]], d_sae: int) -> tuple[Array, Array]:
    numbers, cosines = zip(*blocks, strict=True)
    return np.concatenate(numbers), np.concatenate(cosines)


def _together(statistics: Statistics) -> tuple[dict[int, Array], dict[int, Array], Array]:
    others: dict[int, Array] = {}
    shares: dict[int, Array] = {}
    firings = []
    for feature, other, share, fired in company.together(statistics):
        firings.append(fired)
        starts = np.flatnonzero(begins(feature)) if len(feature) else np.empty(0, np.int64)
        for f, o, s in zip(
            feature[starts].tolist(), np.split(other, starts[1:]), np.split(share, starts[1:]), strict=False
        ):
            others[f], shares[f] = o, s
    return others, shares, np.concatenate(firings).astype(np.int64)


def _write(path: Path, schema: Any, tables: Any) -> None:
    with whole_file(path) as temporary:
        write_tables(temporary, schema, tables, ROWS[path.stem])


def write_tables(path: Path, schema: Any, tables: Iterable[Any], rows: int, level: int = 9) -> None:
    """Writes tables of an atlas to one Parquet file: floats byte by byte, which are a quarter smaller so, all else by
    dictionary.

    Args:
        rows: of a row group; level: of zstd's compression.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    floats, others = [], []
    for field in schema:
        within = pa.types.is_list(field.type)
        kind = field.type.value_type if within else field.type
        (floats if pa.types.is_floating(kind) else others).append(
            f"{field.name}.list.element" if within else field.name
        )
    how: dict[str, Any] = {"compression": "zstd", "compression_level": level, "use_dictionary": others}
    how |= {"use_byte_stream_split": floats} if floats else {}
    with path.open("wb") as file, parquet.ParquetWriter(file, schema, **how) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=rows)
