"""Where descriptions of features ("explanations", as the field calls them) are kept, each beside where it came from.

They are not the user's short names (naming.py), which edits use: a feature may have many, they are sentences, and one
may be wrong. One file of JSON lines for each SAE in the user's data folder, written whole or not at all and changed by
one process at a time. JSON lines and not Parquet: 131,072 of them are read in 0.7 s and written in 1 s of processor
time, and are plain text that the user can search, compare and repair.

    {"lancet_explanations": 1, "key": "..."}
    {"feature": 12, "text": "bridges", "source": "ask: gpt-4o-mini", "score": 0.9, "asked": 20}

Each line begins with its feature, in order: `of` finds one feature's lines without parsing the others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lancet.errors import DamagedError, UsageError
from lancet.files import changed_by_one, data_dir, whole_file

_FEATURE = re.compile(rb'\{"feature": (\d+),')
VERSION = 1
AUTO = "auto"
CHANCE = 0.5  # balanced accuracy of an answer that knows nothing


@dataclass(frozen=True)
class Explanation:
    """One description of one feature.

    Attributes:
        feature: its index.
        text: a line of text.
        source: "auto", "ask: MODEL" or "import: WHAT MODEL METHOD".
        score: its detection score, a balanced accuracy (0.5 is chance); None where it was not measured.
        asked: how many windows of text that score rests on.
        note: what it was made from, in words, "" where nothing is known.
    """

    feature: int
    text: str
    source: str
    score: float | None = None
    asked: int = 0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """{"feature", "text", "source"}, with "score", "asked" and "note" where there are any."""
        out: dict[str, Any] = {"feature": self.feature, "text": self.text, "source": self.source}
        if self.score is not None:
            out |= {"score": self.score, "asked": self.asked}
        return out | ({"note": self.note} if self.note else {})


def of_json(told: Any) -> Explanation:
    """What `to_json` wrote.

    Raises:
        ValueError: it is something else; says what.
    """
    if not isinstance(told, dict):
        raise ValueError("it is no object")
    feature, text, source = told.get("feature"), told.get("text"), told.get("source")
    score, asked, note = told.get("score"), told.get("asked", 0), told.get("note", "")
    if not isinstance(feature, int) or isinstance(feature, bool) or feature < 0:
        raise ValueError(f'"feature" must be a number from 0 on, got {feature!r}')
    if not all(isinstance(part, str) for part in (text, source, note)) or not text or not source:
        raise ValueError('"text" and "source" must be text')
    if score is not None and (not isinstance(score, int | float) or not math.isfinite(score) or not 0 <= score <= 1):
        raise ValueError(f'"score" must be between 0 and 1, got {score!r}')
    if not isinstance(asked, int) or asked < 0:
        raise ValueError(f'"asked" must be a count, got {asked!r}')
    return Explanation(feature, str(text), str(source), None if score is None else float(score), asked, str(note))


def one_line(text: str) -> str:
    """A description as it is kept: runs of white space become one space."""
    return " ".join(text.split())


def path(key: str) -> Path:
    """The file of an SAE's explanations.

    Raises:
        UsageError: this is no key that `lancet.namefile.key` makes.
    """
    if not re.fullmatch(
        r"[\w-]+", key
    ):  # it becomes a file's name, and comes out of an atlas that others may have made
        raise UsageError(f"{key!r} is no SAE's key; harvest the atlas again")
    return data_dir() / "explanations" / f"{key}.jsonl"


def load(key: str) -> dict[int, list[Explanation]]:
    """Feature -> its explanations, in the order of their sources; {} where none were kept.

    Raises:
        DamagedError: the file is not what was written.
    """
    where = path(key)
    try:
        lines = where.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"cannot read {where} ({error}); restore it, or delete it to begin anew") from error
    out: dict[int, list[Explanation]] = {}
    for number, line in enumerate(lines, 1):
        try:
            told = json.loads(line) if line else None
            if number == 1 and (not isinstance(told, dict) or told.get("lancet_explanations") != VERSION):
                raise ValueError(f'it must begin with {{"lancet_explanations": {VERSION}}}')
            if number > 1 and line:
                found = of_json(told)
                out.setdefault(found.feature, []).append(found)
        except ValueError as error:
            raise DamagedError(
                f"{where} was damaged in line {number}: {error}; restore it, or delete it to begin anew"
            ) from error
    return out


def of(key: str, features: Iterable[int]) -> dict[int, list[Explanation]]:
    """Feature -> its explanations, of those features that have some. Their lines alone are read: the file is in the
    order of features, and may have one for each of 131,072.

    Raises:
        DamagedError: one of the lines is not what was written.
    """
    where = path(key)
    if not where.is_file():
        return {}
    held = where.read_bytes()
    out: dict[int, list[Explanation]] = {}
    try:
        for feature in features:
            at = _first_line(held, feature)
            while at < len(held) and held.startswith(b'{"feature": %d,' % feature, at):
                end = held.find(b"\n", at)
                end = len(held) if end < 0 else end
                out.setdefault(feature, []).append(of_json(json.loads(held[at:end])))
                at = end + 1
    except ValueError as error:
        raise DamagedError(f"{where} was damaged: {error}; restore it, or delete it to begin anew") from error
    return out


def _first_line(held: bytes, feature: int) -> int:
    """Where the first line of this feature or of a later one begins; a search by halves.

    Raises:
        ValueError: a line does not begin with a feature.
    """
    low, high = held.find(b"\n") + 1, len(held)
    while low < high:
        middle = held.rfind(b"\n", 0, (low + high) // 2) + 1  # of the line that lies half way
        middle = max(middle, low)
        match = _FEATURE.match(held, middle)
        if match is None:
            raise ValueError(f"byte {middle} begins no explanation")
        if int(match[1]) < feature:
            low = held.find(b"\n", middle) + 1 or len(held)
        else:
            high = middle
    return low


def keep(key: str, entries: Iterable[Explanation]) -> int:
    """Adds explanations; they replace those of the same feature and source. Returns how many were given.

    Raises:
        LancetError: another process has been changing the file for ten seconds, or the disk is full.
        UsageError: the user's data folder cannot be written to.
    """
    new: dict[tuple[int, str], list[Explanation]] = {}
    for entry in entries:
        of_json(entry.to_json())
        beside = new.setdefault((entry.feature, entry.source), [])
        if entry not in beside:
            beside.append(entry)
    if not new:
        return 0
    with changed_by_one(path(key)):
        kept = [e for found in load(key).values() for e in found if (e.feature, e.source) not in new]
        _write(key, [*kept, *(entry for found in new.values() for entry in found)])
    return sum(map(len, new.values()))


def forget(key: str, source: str) -> int:
    """Deletes all explanations of one source; returns how many there were.

    Raises:
        LancetError, UsageError: as `keep`.
    """
    with changed_by_one(path(key)):
        before = [entry for found in load(key).values() for entry in found]
        kept = [entry for entry in before if entry.source != source]
        if len(kept) < len(before):
            _write(key, kept)
    return len(before) - len(kept)


def best(entries: Iterable[Explanation]) -> Explanation | None:
    """The explanation to show where there is room for one: the highest score, then written ones before "auto"."""
    ranked = sorted(entries, key=lambda e: (-(e.score if e.score is not None else CHANCE), e.source == AUTO))
    return ranked[0] if ranked else None


def export(key: str, file: Path) -> int:
    """Writes all explanations to a file of JSON lines that `lancet names import` reads; returns how many.

    Raises:
        UsageError: there are none, or the file cannot be written.
    """
    entries = [entry for found in load(key).values() for entry in found]
    if not entries:
        raise UsageError("no explanations are kept for this SAE; `lancet names auto` proposes some")
    with whole_file(file) as temporary:
        temporary.write_text(_text(key, entries), encoding="utf-8")
    return len(entries)


def _write(key: str, entries: list[Explanation]) -> None:
    with whole_file(path(key)) as temporary:
        temporary.write_text(_text(key, entries), encoding="utf-8")


def _text(key: str, entries: list[Explanation]) -> str:
    lines = [json.dumps({"lancet_explanations": VERSION, "key": key})]
    for entry in sorted(entries, key=lambda e: (e.feature, e.source)):  # stable: an order that was given stays
        lines.append(json.dumps(entry.to_json(), ensure_ascii=False))
    return "\n".join(lines) + "\n"
