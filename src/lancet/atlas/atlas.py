"""An atlas, read where it lies: its Parquet files are queried through DuckDB, a row group at a time.

    atlas = Atlas.open("smollm2-atlas")
    atlas.feature(12).density
    atlas.examples(12)[0].text
    atlas.features(max_density=0.01, token="bridge").to_pandas()

Neither torch nor a model is needed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.atlas import manifest as manifests
from lancet.atlas.manifest import Manifest
from lancet.errors import DamagedError, MismatchError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from lancet.lab import Lab
    from lancet.sae import Sae

BANDS = 6  # band 0 holds the strongest, bands 1 to 5 are fifths of the range
STRONGEST = 255  # the byte of a peak's own size


@dataclass(frozen=True)
class Record:
    """One feature's row; docs/atlas.md has what each column means.

    Attributes:
        histogram: [50] firings by size of the activation; positions: [10] firings by position in the piece.
        bounds: [6] edges of the bands, from 0 to the maximum.
        fires_tokens, fires_shares: [<= 5] the tokens that hold most of the activation, and how much of it.
        logit_up, logit_down, effect_up, effect_down: [<= 10] tokens, empty where the lens was not run, with their
            values in logits and in nats.
        near, near_cosines: [10] features with the nearest directions.
        together, together_shares: [<= 10] features that fire on the same tokens, and on which share of this one's
            firings, of which `together_fired` were counted.
    """

    feature: int
    fired: int
    density: float
    mean: float
    maximum: float
    minimum: float
    histogram: tuple[int, ...]
    positions: tuple[int, ...]
    bounds: tuple[float, ...]
    fires_tokens: tuple[str, ...]
    fires_shares: tuple[float, ...]
    logit_up: tuple[str, ...]
    logit_up_values: tuple[float, ...]
    logit_down: tuple[str, ...]
    logit_down_values: tuple[float, ...]
    effect_up: tuple[str, ...]
    effect_up_values: tuple[float, ...]
    effect_down: tuple[str, ...]
    effect_down_values: tuple[float, ...]
    near: tuple[int, ...]
    near_cosines: tuple[float, ...]
    together: tuple[int, ...]
    together_shares: tuple[float, ...]
    together_fired: int


@dataclass(frozen=True)
class Example:
    """A window of text around a feature's strongest token in a piece.

    Attributes:
        feature: its number.
        band: 0 for the strongest, 1 to 5 for fifths of the range (5 the strongest), -1 where the feature is silent.
        rank: its place in the band, from 0.
        value: the activation at the peak.
        hash: the piece's.
        text: the window's characters.
        tokens: the window's tokens; one of them is "" where a character before it took several.
        strengths: the activation at each token, in units of activations, to 1/255 of the peak's.
        peak: index of the strongest token in `tokens`.
    """

    feature: int
    band: int
    rank: int
    value: float
    hash: int
    text: str
    tokens: tuple[str, ...]
    strengths: tuple[float, ...]
    peak: int

    def pieces(self) -> tuple[list[tuple[str, float]], int]:
        """What is to be shown: (characters, strength as a share of the peak's) in order, and the index of the peak's.

        Tokens that make up one character are one piece, as strong as the strongest of them.
        """
        size, peak = abs(self.value) or 1.0, 0
        out: list[tuple[str, float]] = []
        for i, (token, strength) in enumerate(zip(self.tokens, self.strengths, strict=True)):
            share = abs(strength) / size
            if token or not out:
                out.append((token, share))
            else:
                out[-1] = (out[-1][0], max(out[-1][1], share))
            if i == self.peak:
                peak = len(out) - 1
        return out, peak


class Atlas:
    """What a corpus says about every feature of one SAE. `Atlas.open` makes one.

    Attributes:
        folder: where it lies.
        manifest: what it says of itself.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path) -> Atlas:
        """Opens the atlas in a folder; only its manifest is read.

        Raises:
            MissingError: no atlas is there, or one that was not written to its end.
            DamagedError: it is of another version, or files are missing.
        """
        where = Path(folder)
        return cls(where, manifests.load(where))

    def __repr__(self) -> str:
        told = self.manifest
        return f"Atlas({str(self.folder)!r}: {told.d_sae:,} features of {told.sae} on {told.tokens:,} tokens)"

    def __len__(self) -> int:
        return self.manifest.d_sae

    # ---- whose it is -----------------------------------------------------------------------------------------------

    def belongs(self, to: Lab | Sae) -> bool:
        """Whether it is about this SAE (or about one of a lab's): told by the SAE's weights, not by its name."""
        from lancet.namefile import key

        return any(sae.d_sae == len(self) and key(sae) == self.manifest.key for sae in _saes(to))

    def check(self, to: Lab | Sae) -> None:
        """Refuses an atlas of another SAE.

        Raises:
            MismatchError.
        """
        if not self.belongs(to):
            names = ", ".join(f"{sae.name} at {sae.site}" for sae in _saes(to))
            raise MismatchError(
                f"the atlas in {self.folder} is about {self.manifest.where} of "
                f"{self.manifest.model}, and {names} is open; open that SAE, or make its atlas with `lancet harvest`"
            )

    @property
    def names(self) -> dict[str, int]:
        """The names that the user gave to single features of the SAE."""
        from lancet.namefile import entries_of

        told = {name: entry.get("feature") for name, entry in entries_of(self.manifest.key).items()}
        return {name: at for name, at in told.items() if isinstance(at, int) and 0 <= at < len(self)}

    def names_of(self, feature: int) -> str:
        """The user's names of a feature, "" where it has none."""
        return ", ".join(name for name, at in self.names.items() if at == feature)

    def check_feature(self, feature: int) -> int:
        """The number itself.

        Raises:
            UsageError: there is no such feature.
        """
        if not 0 <= feature < len(self):
            raise UsageError(f"no feature {feature}; {self.manifest.sae} has #0 to #{len(self) - 1}")
        return feature

    # ---- what is asked of it ---------------------------------------------------------------------------------------

    def feature(self, feature: int) -> Record:
        """One feature's row.

        Raises:
            UsageError: there is no such feature; DamagedError: the files are damaged.
        """
        return self.records([feature])[0]

    def records(self, features: Sequence[int]) -> list[Record]:
        """The rows of several features, in the order asked for.

        Raises:
            UsageError: there is no such feature; DamagedError: the files are damaged.
        """
        wanted = list(dict.fromkeys(self.check_feature(int(feature)) for feature in features))
        columns = ", ".join(f'"{name}"' for name in Record.__dataclass_fields__)
        rows = self.query(f"SELECT {columns} FROM features WHERE feature IN ({_listed(wanted)})")
        found: dict[int, Record] = {}
        for row in rows:
            values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in row]
            found[row[0]] = Record(*values)
        if len(found) < len(wanted):
            raise DamagedError(f"{self.folder / 'features.parquet'} lacks features; run `lancet harvest` again")
        return [found[int(feature)] for feature in features]

    def examples(self, feature: int, bands: Sequence[int] = range(BANDS), most: int | None = None) -> list[Example]:
        """A feature's examples, by band and then by rank.

        Args:
            feature: its number.
            bands: only of these; 0 holds the strongest.
            most: at most so many of each band.

        Raises:
            UsageError: there is no such feature; DamagedError: the files are damaged.
        """
        return self.examples_of([feature], bands, most)[feature]

    def examples_of(
        self, features: Sequence[int], bands: Sequence[int] = range(BANDS), most: int | None = None
    ) -> dict[int, list[Example]]:
        """The examples of several features at once; see `examples`."""
        wanted = [self.check_feature(int(feature)) for feature in features]
        if not wanted or not bands:
            return {feature: [] for feature in wanted}
        rows = self.query(
            "SELECT feature, band, rank, value, passage, peak, first, strengths, hash FROM examples "
            f"WHERE feature IN ({_listed(wanted)}) AND band IN ({_listed(bands)})"
            + (f" AND rank < {int(most)}" if most is not None else "")
            + " ORDER BY feature, band, rank"
        )
        texts = self._passages({row[4] for row in rows})
        out: dict[int, list[Example]] = {feature: [] for feature in wanted}
        for row in rows:
            out[row[0]].append(self._example(row, texts))
        return out

    def silent(self, feature: int, count: int, seed: int = 0) -> list[Example]:
        """Windows of text in which a feature does not fire, as far as the atlas knows.

        They are windows around the peaks of other features (one each, drawn by the seed), without the pieces that the
        feature's own examples come from and without the features near it or firing together with it. A feature that
        fires on much text may still fire in some.

        Args:
            feature: its number.
            count: how many; fewer come where the atlas has no more.
            seed: the same gives the same windows.

        Returns:
            Examples with band -1 and no strength anywhere; `peak` is the other feature's.
        """
        own = self.feature(feature)
        hashes = {row[0] for row in self.query(f"SELECT hash FROM examples WHERE feature = {feature}")}
        draw = random.Random(f"{seed}:{feature}")  # a string: the same on every platform
        close = {feature, *own.near, *own.together}
        others = [other for other in draw.sample(range(len(self)), len(self)) if other not in close]
        out: list[Example] = []
        seen: set[int] = set()
        while others and len(out) < count:
            batch, others = others[: 2 * count], others[2 * count :]
            found = self.examples_of(batch)
            for other in batch:
                free = [e for e in found[other] if e.hash not in hashes and e.hash not in seen]
                if free and len(out) < count:
                    e = free[draw.randrange(len(free))]
                    seen.add(e.hash)
                    zeros = (0.0,) * len(e.tokens)
                    out.append(Example(feature, -1, len(out), 0.0, e.hash, e.text, e.tokens, zeros, e.peak))
        return out

    def features(
        self,
        min_density: float | None = None,
        max_density: float | None = None,
        token: str | None = None,
        says: str | None = None,
        name: str | None = None,
        limit: int | None = None,
        columns: Sequence[str] = ("density", "mean", "maximum", "fires_tokens", "effect_up", "logit_up"),
    ) -> pa.Table:
        """Features by what they are, as a table: `feature`, `name` (the user's, "" where there is none), `columns`.

        Args:
            min_density, max_density: share of tokens on which they fire, ends included.
            token: among the tokens that they fire on, whatever its case and the space before it.
            says: among the tokens that the effect lens makes likelier, told likewise.
            name: characters in the user's name.
            limit: the first so many by number.
            columns: further columns of features.parquet.

        Raises:
            UsageError: a column that there is not.
        """
        import pyarrow as pa

        if unknown := [column for column in columns if column not in Record.__dataclass_fields__]:
            raise UsageError(f"no column {unknown[0]!r}; there are {', '.join(Record.__dataclass_fields__)}")
        named: dict[int, str] = {}
        for given, feature in self.names.items():
            named[feature] = f"{named[feature]}, {given}" if feature in named else given
        where, values = ["true"], []
        for test, value in (("density >= ?", min_density), ("density <= ?", max_density)):
            if value is not None:
                where.append(test)
                values.append(value)
        for column, text in (("fires_tokens", token), ("effect_up", says)):
            if text is not None:
                where.append(f"list_contains(list_transform({column}, lambda t: lower(trim(t))), ?)")
                values.append(text.strip().lower())
        if name is not None:
            fitting = [feature for feature, given in named.items() if name.casefold() in given.casefold()]
            where.append(f"feature IN ({_listed(fitting)})" if fitting else "false")
        asked = ", ".join(f'"{c}"' for c in dict.fromkeys(["feature", *columns]))
        sql = f"SELECT {asked} FROM features WHERE {' AND '.join(where)} ORDER BY feature"
        sql += f" LIMIT {int(limit)}" if limit is not None else ""
        table = self._read(lambda: self._connection.sql(sql, params=values).to_arrow_table())
        names = pa.array([named.get(feature, "") for feature in table["feature"].to_pylist()], pa.string())
        return table.add_column(1, "name", names)

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query over the tables `features`, `examples` and `passages`.

        Raises:
            DamagedError: the files cannot be read.
        """
        return self._read(lambda: self._connection.execute(sql, list(values)).fetchall())

    # ---- how ---------------------------------------------------------------------------------------------------------

    def _read(self, ask: Callable[[], Any]) -> Any:
        import duckdb

        try:
            return ask()
        except duckdb.Error as error:
            why = str(error).splitlines()[0]
            raise DamagedError(
                f"the atlas in {self.folder} cannot be read ({why}); run `lancet harvest` again"
            ) from error

    @cached_property
    def _connection(self) -> Any:
        import duckdb

        # No network: what DuckDB lacks it would fetch by itself.
        held = duckdb.connect(config={"autoinstall_known_extensions": "false", "parquet_metadata_cache": "true"})
        name = ""
        try:
            for name in manifests.FILES:
                path = str((self.folder / name).resolve()).replace("'", "''")
                held.execute(f"CREATE VIEW {Path(name).stem} AS SELECT * FROM read_parquet('{path}')")
        except duckdb.Error as error:
            why = str(error).splitlines()[0]
            raise DamagedError(f"{self.folder / name} is damaged ({why}); run `lancet harvest` again") from error
        return held

    def _passages(self, wanted: Iterable[int]) -> Mapping[int, tuple[str, list[int]]]:
        """passage -> (text, where each token ends in it)."""
        if not wanted:
            return {}
        rows = self.query(f"SELECT passage, text, ends FROM passages WHERE passage IN ({_listed(sorted(wanted))})")
        return {passage: (text, ends) for passage, text, ends in rows}

    def _example(self, row: Sequence[Any], texts: Mapping[int, tuple[str, list[int]]]) -> Example:
        feature, band, rank, value, passage, peak, first, strengths, piece = row
        if passage not in texts:
            raise DamagedError(f"{self.folder / 'passages.parquet'} lacks passages; run `lancet harvest` again")
        text, ends = texts[passage]
        edges = [0, *ends]
        last = first + len(strengths)
        tokens = tuple(text[edges[i] : edges[i + 1]] for i in range(first, last))
        return Example(
            feature=feature,
            band=band,
            rank=rank,
            value=value,
            hash=piece,
            text=text[edges[first] : edges[last]],
            tokens=tokens,
            strengths=tuple(value * byte / STRONGEST for byte in strengths),
            peak=peak - first,
        )


def _saes(to: Lab | Sae) -> Sequence[Any]:
    return getattr(to, "saes", None) or (to,)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(int(number)) for number in numbers)
