"""Documents out of files, folders, standard input and data sets, one after the other.

A row of JSONL or Parquet is a document; of a text file each passage is. Lines that cannot be read are left out, counted
and told; nothing is ever held but the document at hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lancet.errors import DamagedError, MissingError, UsageError

PASSAGE = 2_000  # characters up to which paragraphs are joined, and after which one ends with its line
CHUNK = 1 << 20  # bytes read at once
TOLD = 5  # line numbers kept of a file's bad lines
PACKED = {".gz": "gzip", ".zst": "zstd"}
KINDS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
ALLOWED = ".txt, .md, .jsonl or .parquet, each also .gz or .zst"


@dataclass
class Bad:
    """What could not be read.

    Attributes:
        lines: file -> how many lines were left out.
        first: file -> the numbers of the first of them, from 1.
        why: file -> what was wrong with the first.
    """

    lines: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[int]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def add(self, file: str, line: int, why: str) -> None:
        """Counts a line."""
        self.lines[file] = self.lines.get(file, 0) + 1
        self.why.setdefault(file, why)
        first = self.first.setdefault(file, [])
        if len(first) < TOLD:
            first.append(line)

    @property
    def total(self) -> int:
        return sum(self.lines.values())

    def __str__(self) -> str:
        """One line a file."""
        return "\n".join(
            f"{file}: {count} line{'s' * (count > 1)} left out, first line "
            f"{', '.join(map(str, self.first[file]))}{', ...' * (count > TOLD)} ({self.why[file]})"
            for file, count in self.lines.items()
        )


@dataclass(frozen=True)
class Source:
    """One place that documents come from.

    Attributes:
        name: as it is told to the user.
        kind: "text", "jsonl", "parquet", "saved" (a folder of `datasets`) or "hub" (a data set by name).
        path: None for standard input and for a data set by name.
        packed: "gzip", "zstd" or "".
    """

    name: str
    kind: str
    path: Path | None = None
    packed: str = ""

    def identity(self) -> list[Any]:
        """[name, bytes, modification time], by which a changed corpus is told; of standard input the name alone."""
        if self.path is None:
            return [self.name]
        files = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        stats = [file.stat() for file in files if file.is_file()]
        return [str(self.path.resolve()), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]


def sources(given: Sequence[str | Path]) -> list[Source]:
    """The files that are meant, folders opened up: sorted, those of other kinds left out.

    Raises:
        UsageError: nothing is there, or no file of a known kind.
    """
    if isinstance(given, (str, Path)):
        given = [given]
    if not given:
        raise UsageError(f"no corpus: give files ({ALLOWED}), folders of them, - or the name of a data set")
    found: list[Source] = []
    for each in map(str, given):
        path = Path(each).expanduser()
        if each == "-":
            found.append(Source("standard input", "stdin"))
        elif path.is_dir():
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                found.append(Source(each, "saved", path))
                continue
            inside = [_of_file(file) for file in sorted(path.rglob("*")) if file.is_file()]
            known = [source for source in inside if source is not None]
            if not known:
                raise UsageError(f"{each} holds no file of a corpus; it needs {ALLOWED}")
            found += known
        elif path.is_file():
            source = _of_file(path)
            if source is None:
                raise UsageError(f"{each} is of no known kind; give {ALLOWED}")
            found.append(source)
        elif each.count("/") <= 1 and Path(each).suffix not in {*KINDS, *PACKED} and each[:1] not in "./~":
            found.append(Source(each, "hub"))
        else:
            raise UsageError(f"{each} does not exist; give a file ({ALLOWED}), a folder, - or the name of a data set")
    return found


def _of_file(path: Path) -> Source | None:
    packed = PACKED.get(path.suffix.lower(), "")
    kind = KINDS.get((path.with_suffix("") if packed else path).suffix.lower())
    return Source(str(path), kind, path, packed) if kind else None


def documents(found: Sequence[Source], column: str = "text", bad: Bad | None = None) -> Iterator[str]:
    """The documents of sources, empty ones left out.

    Args:
        column: the field of JSONL or column of Parquet that holds the text.
        bad: counts what cannot be read.

    Raises:
        UsageError: a file cannot be opened, or has no such column.
        DamagedError: a Parquet file is not one.
        MissingError: a data set cannot be had.
    """
    bad = Bad() if bad is None else bad
    for source in found:
        for text in _of(source, column, bad):
            if text.strip():
                yield text


def _of(source: Source, column: str, bad: Bad) -> Iterator[str]:
    if source.kind in ("saved", "hub"):
        yield from _dataset(source, column)
    elif source.kind == "parquet":
        yield from _parquet(source, column)
    elif source.kind == "stdin":
        lines = _lines(sys.stdin.buffer.read, source.name, bad)
        first = next(((n, line) for n, line in lines if line.strip()), None)
        if first is not None:  # what begins with an object is JSONL
            parts = _jsonl if first[1].lstrip().startswith("{") else _passages
            yield from parts(_again(first, lines), source.name, column, bad)
    else:
        with _opened(source) as file:
            lines = _lines(file.read, source.name, bad)
            yield from (_jsonl if source.kind == "jsonl" else _passages)(lines, source.name, column, bad)


def _again(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _opened(source: Source) -> Any:
    import pyarrow

    assert source.path is not None
    try:
        if not source.packed:
            return source.path.open("rb")
        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(source.path)), source.packed)
    except OSError as error:
        raise UsageError(f"cannot read {source.name}: {error}; check the path and its permissions") from error


def _lines(read: Callable[[int], bytes], name: str, bad: Bad) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of UTF-8 text; what is not UTF-8 is left out and counted."""
    rest, number = b"", 0
    while True:
        try:
            chunk = read(CHUNK)
        except OSError as error:  # a packed file that is cut short, or is none: what was read so far counts
            bad.add(name, number + 1, f"the file ends or is damaged there: {str(error).splitlines()[0]}")
            chunk = b""
        *whole, rest = (rest + chunk).split(b"\n")
        if not chunk:
            whole = [*whole, rest] if rest else whole
        for raw in whole:
            number += 1
            try:
                yield number, raw.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                bad.add(name, number, "not UTF-8")
        if not chunk:
            return


def _jsonl(lines: Iterator[tuple[int, str]], name: str, column: str, bad: Bad) -> Iterator[str]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            bad.add(name, number, "not JSON")
            continue
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            bad.add(name, number, f"no text in the field {column!r}")
        elif not is_unicode(text):
            bad.add(name, number, "half of a surrogate pair")
        else:
            yield text


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: halves of surrogate pairs alone it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _passages(lines: Iterator[tuple[int, str]], name: str, column: str, bad: Bad) -> Iterator[str]:
    """Paragraphs, short ones joined."""
    held = ""
    for passage in _paragraphs(line for _, line in lines):
        if held and len(held) + 2 + len(passage) > PASSAGE:
            yield held
            held = ""
        held = f"{held}\n\n{passage}" if held else passage
    yield held


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in lines:
        if not line.strip() or size > PASSAGE:
            yield from ["\n".join(held)] if held else []
            held, size = [], 0
        if line.strip():
            held.append(line)
            size += len(line) + 1
    yield from ["\n".join(held)] if held else []


def _parquet(source: Source, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet as parquet

    if source.packed:
        raise UsageError(
            f"{source.name}: Parquet is packed in itself and cannot be read inside {source.packed}; unpack it"
        )
    try:
        with parquet.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UsageError(
                    f"{source.name} has no column {column!r}; it has {', '.join(names)}: choose one with --field"
                )
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                texts = batch.column(0).to_pylist()
                if any(not isinstance(text, (str, type(None))) for text in texts):
                    raise UsageError(
                        f"the column {column!r} of {source.name} holds no text; choose another with --field"
                    )
                yield from (text for text in texts if text)
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedError(f"{source.name} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _dataset(source: Source, column: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise MissingError(f'{source.name} needs the datasets library: pip install "datasets"') from error
    try:
        if source.path is not None:
            held: Any = datasets.load_from_disk(str(source.path))
        else:
            held = datasets.load_dataset(source.name, split="train", streaming=True)
    except Exception as error:  # its errors are of many kinds, its network's too
        where = "saved there" if source.path else "here or on the hub"
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise MissingError(
            f"no data set {source.name} {where}, or no way to it ({told}); give files, or a folder that "
            f"datasets' save_to_disk wrote"
        ) from error
    parts = list(held.values()) if isinstance(held, datasets.DatasetDict) else [held]
    for part in parts:
        names = part.column_names
        if names and column not in names:
            raise UsageError(
                f"{source.name} has no column {column!r}; it has {', '.join(names)}: choose one with --field"
            )
        for row in cast("Iterable[dict[str, Any]]", part):
            text = row.get(column)
            if isinstance(text, str) and is_unicode(text):
                yield text
