"""Explanations that others published, out of their files.

Neuronpedia's exports are folders of `batch-N.jsonl.gz`, a record a line (https://docs.neuronpedia.org, Exports):
`modelId` and `layer` (such as `6-res-jb`) say whose it is, `index` the feature, `description` the text,
`explanationModelName` and `typeName` who wrote it and how. What `lancet names export` wrote and tables of feature and
name (CSV, TSV) are read too. A record of another model or layer is refused and counted. An index that the SAE does not
have refuses everything: the file is then of an SAE of another width, and its other numbers are other features.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lancet.atlas.explanations import VERSION, Explanation, of_json, one_line
from lancet.errors import DamagedError, MismatchError, UsageError

# The first of each is Neuronpedia's.
INDEX = ("index", "feature", "feature_index", "featureIndex", "feature_id", "latent", "neuron")
TEXT = ("description", "explanation", "name", "text", "label")
MODEL = ("modelId", "model_id", "model")
LAYER = ("layer", "saeId", "sae_id", "sourceId")
WRITER = ("explanationModelName", "explanation_model", "explainer")
METHOD = ("typeName", "explanationType")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")


@dataclass(frozen=True)
class Target:
    """The SAE whose explanations are wanted.

    Attributes:
        key: under which its explanations are kept.
        features: how many it has.
        model, sae: their names; a model's folder tells nothing about records of a model of the hub.
        layer: the block of its site, None where unknown.
        page: its id on Neuronpedia, such as gpt2-small/6-res-jb, None where it has none.
    """

    key: str
    features: int
    model: str
    sae: str
    layer: int | None = None
    page: str | None = None


@dataclass
class Imported:
    """What was read.

    Attributes:
        entries: the explanations.
        files: how many files were read.
        others: "model/layer" -> how many records of it were refused.
        corrupt: how many lines could not be read; `first` says of one where it is and what is wrong.
        empty: how many records have no text.
    """

    entries: list[Explanation] = field(default_factory=list)
    files: int = 0
    others: Counter[str] = field(default_factory=Counter)
    corrupt: int = 0
    first: str = ""
    empty: int = 0

    def bad(self, file: Path, line: int, why: str) -> None:
        """Counts a line that could not be read."""
        self.corrupt += 1
        self.first = self.first or f"{file.name} line {line}: {why}"


def read(given: Sequence[str], target: Target, anyway: bool = False) -> Imported:
    """Reads files, folders of files and patterns such as `batch-*.jsonl.gz`.

    Args:
        anyway: also take records that name another model or layer.

    Raises:
        UsageError: no such file, or one of unknown kind.
        DamagedError: a file is cut off, or is not text.
        MismatchError: an index is beyond the SAE's features, or no record is this SAE's.
    """
    out = Imported()
    beyond: list[tuple[int, str]] = []
    for file in files(given):
        out.files += 1
        for line, record in _records(file, out):
            if found := _entry(file, line, record, target, anyway, out):
                out.entries.append(found)
                if found.feature >= target.features:
                    beyond.append((found.feature, f"{file.name} line {line}"))
    if beyond:
        index, where = max(beyond)
        raise MismatchError(
            f"{len(beyond):,} of {len(out.entries):,} records have indices that {target.sae} lacks (#{index} in "
            f"{where}; it has #0 to #{target.features - 1}), so they are of another SAE and nothing was taken in"
        )
    if not out.entries:
        told = f", {sum(out.others.values()):,} of {_some(out.others)}" if out.others else ""
        told += f", {out.corrupt:,} lines that could not be read ({out.first})" if out.corrupt else ""
        told += f", {out.empty:,} without text" if out.empty else ""
        whose = target.page or f"{target.model}, layer {target.layer}"
        raise MismatchError(
            f"no explanation of {target.sae} ({whose}) in {out.files} file{'s' * (out.files != 1)}{told}; give a file "
            f"with {INDEX[0]} and {TEXT[0]} in each record" + (", or --anyway" if out.others else "")
        )
    return out


def _some(counted: Mapping[str, int]) -> str:
    listed = [f"{name} ({count:,})" for name, count in sorted(counted.items(), key=lambda item: -item[1])]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} others" if len(listed) > 5 else "")


# ---- files -----------------------------------------------------------------------------------------------------------


def files(given: Sequence[str]) -> list[Path]:
    """The files that arguments mean, each once: a folder's own files, or those of its `explanations*` folders.

    Raises:
        UsageError: there is none.
    """
    out: list[Path] = []
    for text in given:
        path = Path(text)
        if path.is_dir():
            found = _inside(path) or [f for sub in sorted(path.glob("explanations*")) for f in _inside(sub)]
        elif path.is_file():
            found = [path]
        else:
            found = [p for p in map(Path, glob.glob(text, recursive=True)) if p.is_file()]
        if not found:
            raise UsageError(f"no file to import at {text}; give {_kinds()}, a folder of these, or a pattern")
        for file in sorted(found, key=_in_order):
            if not _kind(file):
                raise UsageError(f"{file} is of no known kind; give {_kinds()}")
            out.append(file)
    return list(dict.fromkeys(out))


def _inside(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file() and _kind(file) and not file.name.startswith(".")]


def _in_order(file: Path) -> tuple[str, list[tuple[int, str]]]:
    """batch-2 before batch-10."""
    parts = re.findall(r"\d+|\D+", file.name)
    return str(file.parent), [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _kind(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _kinds() -> str:
    return f"{', '.join(SUFFIXES)} (or the same with .gz)"


def _text(file: Path) -> str:
    try:
        raw = file.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        why = "it is cut off" if isinstance(error, EOFError) else str(error)
        raise DamagedError(f"cannot read {file}: {why}; fetch it again (nothing was taken in)") from error
    except Exception as error:  # zlib.error, which is no OSError
        raise DamagedError(f"cannot read {file}: {error}; fetch it again (nothing was taken in)") from error


def _records(file: Path, out: Imported) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Each record with the line it begins at; what is none is counted."""
    text = _text(file)
    if _kind(file) in (".csv", ".tsv"):
        yield from _table(file, text)
        return
    try:  # an answer of Neuronpedia's API is one JSON value; a file of several lines is not
        whole = json.loads(text) if text.lstrip()[:1] in ("[", "{") and _kind(file) == ".json" else None
    except ValueError:
        whole = None
    if isinstance(whole, dict):
        whole = next((value for value in whole.values() if isinstance(value, list)), [whole])
    for number, told in enumerate(whole if isinstance(whole, list) else text.split("\n"), 1):
        if isinstance(told, str):
            if not told.strip():
                continue
            try:
                told = json.loads(told)
            except ValueError:
                out.bad(file, number, "no JSON")
                continue
        if isinstance(told, dict):
            yield number, told
        else:
            out.bad(file, number, "no object")


def _table(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a table with a header that names its columns, or without one: feature, then name."""
    reader = csv.reader(io.StringIO(text), delimiter="\t" if _kind(file) == ".tsv" else ",")
    header: list[str] | None = None
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            names = [cell.strip() for cell in cells]
            if set(names) & set(INDEX) and set(names) & set(TEXT):
                header = names
                continue
            if not re.fullmatch(r"\s*#?\d+\s*", cells[0]):
                raise UsageError(
                    f"{file} begins with {', '.join(names)[:80]!r}; give the columns feature and name, or a header "
                    f"with one of {', '.join(INDEX)} and one of {', '.join(TEXT)}"
                )
            header = []
        if header:
            yield reader.line_num, dict(zip(header, cells, strict=False))
        else:  # a name with commas that nobody quoted is still one name
            yield reader.line_num, {"index": cells[0], "description": ",".join(cells[1:])}


# ---- records ---------------------------------------------------------------------------------------------------------


def _entry(
    file: Path, line: int, record: Mapping[str, Any], target: Target, anyway: bool, out: Imported
) -> Explanation | None:
    if "lancet_explanations" in record:
        if record["lancet_explanations"] != VERSION or (record.get("key") != target.key and not anyway):
            raise MismatchError(f"{file} holds the explanations of another SAE than {target.sae}; nothing was taken in")
        return None
    if "source" in record and set(record) <= {"feature", "text", "source", "score", "asked", "note"}:
        try:
            return of_json(record)
        except ValueError as error:
            out.bad(file, line, str(error))
            return None
    model, layer = _first(record, MODEL), _first(record, LAYER)
    if not anyway and not fits(model, layer, target):
        out.others[f"{model or '?'}/{layer or '?'}"] += 1
        return None
    index, text = _first(record, INDEX), _first(record, TEXT)
    number = str(index).strip().removeprefix("#") if not isinstance(index, bool) else ""
    if not number.isdecimal():
        known = f"no {' or '.join(INDEX[:2])}" if index is None else f"index {index!r} is no number"
        out.bad(file, line, known)
        return None
    if not isinstance(text, str) or not one_line(text):
        out.empty += 1
        return None
    whose = f"{model}/{layer}" if model and layer else file.name
    parts = [f"import: {whose}", _first(record, WRITER), _first(record, METHOD)]
    return Explanation(int(number), one_line(text), " ".join(str(part) for part in parts if part))


def _first(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((record[key] for key in keys if record.get(key) not in (None, "")), None)


def fits(model: Any, layer: Any, target: Target) -> bool:
    """Whether a record's model and layer are the SAE's, as far as they can be told; what a record leaves out fits."""
    page_model, _, page_layer = (target.page or "").lower().partition("/")
    if model is not None and str(model).lower() != page_model and not _same_model(str(model), target.model):
        return False
    if layer is None:
        return True
    if page_layer:
        return str(layer).lower() == page_layer
    number = re.match(r"\d+", str(layer))
    return number is None or target.layer is None or int(number[0]) == target.layer


def _same_model(one: str, other: str) -> bool:
    from lancet import names

    if Path(other).is_absolute():
        return True
    return names.same(one, other) or one.lower() == (names.hub_id(other) or other).split("/")[-1].lower()
