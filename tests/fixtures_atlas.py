"""A small made-up atlas, written exactly as docs/atlas.md says: its features are known, so that tests can ask for them.

`write_atlas(folder)` writes one; `write_tables` is its writer, which the benchmark feeds with larger tables.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

KEY = "a" * 24
ROW_GROUPS = {"features": 1024, "examples": 4096, "passages": 1024}
BINS, POSITIONS, BANDS = 50, 10, 6
# Feature -> (tokens it fires on, tokens it says, words around the peak). The rest fire on words made of their number.
KNOWN: dict[int, tuple[list[str], list[str], list[str]]] = {
    3: ([" bridge", " Bridge", " bridges"], [" river", " wood"], ["The", " old", " crosses", " the", " water"]),
    5: ([" rope", " cable"], [" bridge", " Bridge", " span"], ["They", " pulled", " the", " over", " it"]),
    7: ([" bridge", " arch"], [" bridge", " bridges"], ["A", " stone", " of", " the", " Romans"]),
    9: ([" Romans", " Goths"], [" emperor", " legion"], ["A", " bridge", " by", " the", "."]),
    10: (["大桥", "桥"], ["江", "水"], ["他们", "在", "上", "看", "风景", "，", "很", "高兴"]),
    12: (["<script>", "&amp"], ['"><img src=x onerror=alert(1)>', "</style>"], ["<b>", "alert('x')", " &", " ends"]),
}
SILENT = 11  # the feature that never fired
COMMON = [" and", " so", " we", " went", " on", " with", " that", ",", " until", " evening", " came", "."]

_LIST = {"string": pa.list_(pa.string()), "float": pa.list_(pa.float32()), "int": pa.list_(pa.int32())}
_PARTS = (("", "string"), ("_values", "float"))
_LENSES = ("logit_up", "logit_down", "effect_up", "effect_down")
SCHEMAS = {
    "features": pa.schema(
        [
            ("feature", pa.int32()), ("fired", pa.int64()), ("density", pa.float64()), ("mean", pa.float32()),
            ("maximum", pa.float32()), ("minimum", pa.float32()), ("histogram", pa.list_(pa.int64())),
            ("positions", pa.list_(pa.int64())), ("bounds", _LIST["float"]), ("fires_tokens", _LIST["string"]),
            ("fires_shares", _LIST["float"]),
            *((f"{name}{end}", _LIST[kind]) for name in _LENSES for end, kind in _PARTS),
            ("near", _LIST["int"]), ("near_cosines", _LIST["float"]), ("together", _LIST["int"]),
            ("together_shares", _LIST["float"]), ("together_fired", pa.int64()),
        ]
    ),
    "examples": pa.schema(
        [
            ("feature", pa.int32()), ("band", pa.int8()), ("rank", pa.int8()), ("value", pa.float32()),
            ("passage", pa.int32()), ("peak", pa.int16()), ("first", pa.int16()), ("strengths", pa.binary()),
            ("hash", pa.uint64()),
        ]
    ),
    "passages": pa.schema(
        [
            ("passage", pa.int32()), ("hash", pa.uint64()), ("start", pa.int32()), ("text", pa.string()),
            ("ends", _LIST["int"]),
        ]
    ),
}  # fmt: skip


def write_atlas(folder: Path, d_sae: int = 64, key: str = KEY, seed: int = 0, finished: bool = True) -> Path:
    """Writes an atlas of `d_sae` features (at least 16); without its manifest where it is not `finished`."""
    draw = random.Random(seed)
    rows: dict[str, list[dict[str, Any]]] = {"features": [], "examples": [], "passages": []}
    for feature in range(d_sae):
        fires, says, around = KNOWN.get(feature, ([f" word{feature}"], [f" said{feature}"], COMMON))
        fired = 0 if feature == SILENT else draw.randrange(40, 4000)
        maximum = 0.0 if fired == 0 else round(draw.uniform(4, 30), 3)
        if fired:
            for band, rank, value in peaks(maximum, draw):
                example(rows, feature, band, rank, value, draw.choice(fires), around, draw)
        rows["features"].append(record(feature, fired, maximum, fires, says, d_sae, draw))
    tables = {name: pa.Table.from_pylist(told, SCHEMAS[name]) for name, told in rows.items()}
    return write_tables(folder, tables, manifest(d_sae, key) if finished else None)


def peaks(maximum: float, draw: random.Random) -> list[tuple[int, int, float]]:
    """(band, rank, value) of a feature's examples, by band and rank: few, but of every band."""
    strongest = [(0, rank, maximum * (1 - 0.02 * rank)) for rank in range(8)]
    fifths = [(band, rank, maximum * (band - draw.random()) / 5) for band in range(1, BANDS) for rank in range(3)]
    return strongest + fifths


def example(
    rows: dict[str, list[dict[str, Any]]], feature: int, band: int, rank: int, value: float, token: str,
    around: list[str], draw: random.Random,
) -> None:  # fmt: skip
    """Adds a passage of 40 tokens with the token at a random place, and the example that shows it."""
    tokens = [draw.choice(around if draw.random() < 0.6 else COMMON) for _ in range(40)]
    peak = draw.randrange(2, 38)
    tokens[peak] = token
    ends, at = [], 0
    for piece in tokens:
        at += len(piece)
        ends.append(at)
    first, last = max(0, peak - 16), min(40, peak + 16)
    strengths = bytes(255 if i == peak else draw.choice([0, 0, 0, 40]) for i in range(first, last))
    passage, piece_hash = len(rows["passages"]), draw.getrandbits(64)
    rows["passages"].append({"passage": passage, "hash": piece_hash, "start": 1, "text": "".join(tokens), "ends": ends})
    rows["examples"].append(
        {
            "feature": feature, "band": band, "rank": rank, "value": value, "passage": passage, "peak": peak,
            "first": first, "strengths": strengths, "hash": piece_hash,
        }
    )  # fmt: skip


def record(
    feature: int, fired: int, maximum: float, fires: list[str], says: list[str], d_sae: int, draw: random.Random
) -> dict[str, Any]:
    """A row of features.parquet."""
    others = draw.sample([i for i in range(d_sae) if i != feature], 10)
    shares = sorted((draw.uniform(0.05, 0.9) for _ in range(10)), reverse=True)
    histogram, positions = [0] * BINS, [0] * POSITIONS
    for _ in range(fired):
        histogram[min(BINS - 1, max(0, round(draw.gauss(38, 4))))] += 1
        positions[draw.randrange(POSITIONS)] += 1
    lenses: dict[str, Any] = {}
    for name, tokens, sign in zip(_LENSES, (says, [" not"], says, [" nor"]), (1, -1, 1, -1), strict=True):
        lenses |= {name: tokens, f"{name}_values": [sign * (2.0 - 0.1 * i) for i in range(len(tokens))]}
    return {
        "feature": feature, "fired": fired, "density": fired / TOKENS, "mean": maximum / 3, "maximum": maximum,
        "minimum": 0.0, "histogram": histogram, "positions": positions, "bounds": [maximum * i / 5 for i in range(6)],
        "fires_tokens": fires[:5] if fired else [],
        "fires_shares": [0.5 / (i + 1) for i in range(len(fires))] if fired else [],
        **lenses, "near": others, "near_cosines": [0.9 - 0.05 * i for i in range(10)],
        "together": others[::-1] if fired else [], "together_shares": shares if fired else [], "together_fired": fired,
    }  # fmt: skip


TOKENS = 1_000_000


def manifest(d_sae: int, key: str = KEY) -> dict[str, Any]:
    """The manifest of a made-up atlas."""
    return {
        "lancet_atlas": 1,
        "model": {"name": "made-up", "fingerprint": "0" * 24},
        "sae": {"name": "made-up/sae", "site": "blocks.2.hook_resid_pre", "d_sae": d_sae, "key": key,
                "fingerprint": "1" * 24},
        "corpus": {"fingerprint": "2" * 24, "documents": 2000, "repeats": 0, "bad_lines": 0, "tokens": TOKENS,
                   "pieces": 2500},
        "scale": 2.0 ** math.ceil(math.log2(4 * 30)),
        "positions": [TOKENS // POSITIONS] * POSITIONS,
        "co_firing": {"tokens": TOKENS, "exact": True},
        "length": 512,
        "shard_tokens": 32768,
        "lenses": {"logit": True, "effect": True},
        "versions": {"lancet": "0.1.0"},
    }  # fmt: skip


def write_tables(folder: Path, tables: dict[str, pa.Table], told: dict[str, Any] | None) -> Path:
    """Writes tables of SCHEMAS and, last, the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table.cast(SCHEMAS[name]), folder / f"{name}.parquet", row_group_size=ROW_GROUPS[name])
    if told is not None:
        (folder / "manifest.json").write_text(json.dumps(told), encoding="utf-8")
    return folder
