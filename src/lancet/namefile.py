"""The file of the names that were given to one SAE's features: its place, its shape, and what it is checked for.

    {"lancet_names": 1, "key": ..., "names": {"bridge": {"feature": 12}, "mood": {"blend": [[12, 0.6], [77, 0.4]]}}}

An SAE is told by its weights and not by its path, so that a name holds wherever the SAE is opened from.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import struct
import unicodedata
import weakref
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet import doses
from lancet.algebra import Binary, Expression, Number, Ref, refs, substitute
from lancet.errors import DamagedError, LancetError, UsageError
from lancet.files import data_dir, read_json
from lancet.units import short

if TYPE_CHECKING:
    from lancet.sae import Sae

VERSION = 1
NAME = re.compile(r"[^\W\d]\w*")
_keys: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Kept:
    """What one name stands for: exactly one of the first four.

    Attributes:
        feature: its index.
        blend: (feature, weight) pairs.
        expression: in numbers, such as `unit(#12) - #77`.
        vector: [d_out] for a direction that no features make, such as a mean difference.
        said: as it was written when the name was given, "" where that says no more.
        dose: the recommended amount of a blend, expression or vector, "" where none was found.
    """

    feature: int | None = None
    blend: tuple[tuple[int, float], ...] = ()
    expression: str = ""
    vector: tuple[float, ...] = ()
    said: str = ""
    dose: str = ""

    @property
    def meaning(self) -> str:
        """In the notation of expressions, or in words."""
        if self.feature is not None:
            return f"#{self.feature}"
        if self.blend:
            return " + ".join(f"{short(weight)} * #{feature}" for feature, weight in self.blend)
        return self.expression or f"a direction kept as numbers ({self.said})"

    @property
    def expressed(self) -> Expression:
        """As an expression; a bare vector cannot be one."""
        from lancet.grammar import parse_expression

        if self.feature is not None:
            return Ref(index=self.feature)
        parts: list[Expression] = [Binary("*", Number(w), Ref(index=i)) for i, w in self.blend]
        return reduce(partial(Binary, "+"), parts) if parts else parse_expression(self.expression)

    def __str__(self) -> str:
        return self.said or self.meaning

    def same(self, other: Kept) -> bool:
        """Whether both stand for the same thing."""
        parts = [(kept.feature, kept.blend, kept.expression, kept.vector) for kept in (self, other)]
        return parts[0] == parts[1]

    def to_json(self) -> dict[str, Any]:
        """{"feature"} or {"blend"} or {"expression"} or {"vector"}, with {"said", "dose"} where there are any."""
        out: dict[str, Any] = {}
        if self.feature is not None:
            out["feature"] = self.feature
        elif self.blend:
            out["blend"] = [list(pair) for pair in self.blend]
        elif self.expression:
            out["expression"] = self.expression
        else:
            out["vector"] = base64.b64encode(struct.pack(f"<{len(self.vector)}f", *self.vector)).decode()
        return out | {key: getattr(self, key) for key in ("said", "dose") if getattr(self, key)}


@dataclass(frozen=True)
class Names:
    """All names of one SAE.

    Attributes:
        entries: name -> what it stands for.
        doses: recommended amounts of features (`#12`), of the card's concepts and of expressions, by their text.
    """

    entries: dict[str, Kept] = field(default_factory=dict)
    doses: dict[str, str] = field(default_factory=dict)

    def of_feature(self, index: int) -> str:
        """The names of a feature, "" where it has none."""
        return ", ".join(name for name, kept in self.entries.items() if kept.feature == index)

    def expanded(self, expression: Expression) -> Expression:
        """An expression with names replaced by what they stand for; names of bare vectors and unknown ones stay."""

        def by(ref: Ref) -> Expression:
            kept = self.entries.get(ref.name)
            return ref if kept is None or kept.vector else kept.expressed

        return substitute(expression, by)


# ---- where they lie --------------------------------------------------------------------------------------------------


def key(sae: Sae) -> str:
    """Tells SAEs apart by site and weights (samples of them), whatever dtype, device, path or model's dtype."""
    if sae not in _keys:
        digest = hashlib.sha256(f"{sae.site} {sae.writes} {sae.architecture}".encode())
        for name, tensor in sorted(sae.tensors()):
            if name == "offset":  # depends on how the model was loaded
                continue
            flat = tensor.detach().flatten()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(flat[:: max(1, len(flat) // 4096)].float().cpu().numpy().tobytes())
        _keys[sae] = digest.hexdigest()[:24]
    return _keys[sae]


def path(sae: Sae) -> Path:
    """The file of an SAE's names."""
    return data_dir() / "names" / f"{key(sae)}.json"


def load(sae: Sae) -> Names:
    """The names of an SAE; none where none were given.

    Raises:
        DamagedError: the file is not what was written.
    """
    where = path(sae)
    if not where.is_file():
        return Names()
    try:
        return parse(read_json(where), sae)
    except ValueError as error:
        raise DamagedError(f"{where} was damaged: {error}; restore it, or delete it to begin anew") from error


def entries_of(key: str) -> dict[str, dict[str, Any]]:
    """Name -> its entry as the file has it, by the SAE's key alone: beside an atlas no SAE is open.

    Raises:
        DamagedError: the file is not JSON, or not of names.
    """
    where = data_dir() / "names" / f"{key}.json"
    if not re.fullmatch(r"[\w-]+", key) or not where.is_file():  # a key may come out of a file that others made
        return {}
    told = read_json(where)
    names = told.get("names") if isinstance(told, dict) else None
    if not isinstance(names, dict):
        raise DamagedError(f"{where} is not a file of names; restore it, or delete it to begin anew")
    return {name: entry for name, entry in names.items() if isinstance(entry, dict)}


def normal(name: str) -> str:
    """The one spelling of a name that may be typed in several ways (`é` as one character or two)."""
    return unicodedata.normalize("NFC", name)


# ---- reading and writing ---------------------------------------------------------------------------------------------


def written(names: Names, sae: Sae) -> dict[str, Any]:
    """Names as JSON, sorted so that two files can be compared."""
    return {
        "lancet_names": VERSION,
        "key": key(sae),
        "sae": sae.name,
        "site": str(sae.site),
        "features": sae.d_sae,
        "names": {name: kept.to_json() for name, kept in sorted(names.entries.items())},
        "doses": dict(sorted(names.doses.items())),
    }


def parse(told: Any, sae: Sae) -> Names:
    """Names out of JSON.

    Raises:
        ValueError: anything in it is not as it must be; says what.
    """
    if not isinstance(told, dict) or told.get("lancet_names") != VERSION:
        raise ValueError(f'it is no object with "lancet_names": {VERSION}')
    if told.get("key") != key(sae):
        raise ValueError('its "key" is not this SAE\'s')
    names, doses = told.get("names"), told.get("doses", {})
    if not isinstance(names, dict) or not isinstance(doses, dict):
        raise ValueError('"names" and "doses" must be objects')
    entries = {}
    for name, entry in names.items():
        if not NAME.fullmatch(name) or name != normal(name):
            raise ValueError(f"{name!r} is not a name")
        try:
            entries[name] = _entry(entry, sae)
        except (ValueError, LancetError) as error:
            raise ValueError(f"{name}: {str(error).splitlines()[0]}") from error
    for text, amount in doses.items():
        _amount(text, amount)
    return Names(entries, dict(doses))


def _entry(told: Any, sae: Sae) -> Kept:
    from lancet.grammar import parse_expression

    kinds = {"feature", "blend", "expression", "vector"}
    if not isinstance(told, dict) or len(kinds & set(told)) != 1 or set(told) - kinds - {"said", "dose"}:
        raise ValueError("it must have one of feature, blend, expression and vector, and may have said and dose")
    said, dose = told.get("said", ""), told.get("dose", "")
    if not isinstance(said, str):
        raise ValueError("said must be text")
    if dose:
        _amount("dose", dose)
    more = {"said": said, "dose": dose or ""}
    match told:
        case {"feature": index}:
            return Kept(feature=_index(index, sae), **more)
        case {"blend": [*pairs]} if pairs:
            return Kept(blend=tuple(_pair(pair, sae) for pair in pairs), **more)
        case {"expression": str(text)}:
            for ref in refs(parse_expression(text)):
                if ref.name or (ref.site is None and not 0 <= ref.index < sae.d_sae):
                    raise ValueError(f"{ref} is no feature; {sae.name} has #0 to #{sae.d_sae - 1}")
            return Kept(expression=text, **more)
        case {"vector": str(text)}:
            raw = base64.b64decode(text, validate=True)
            if len(raw) != 4 * sae.d_out:
                raise ValueError(f"its vector has {len(raw) // 4} numbers, this SAE's have {sae.d_out}")
            vector = struct.unpack(f"<{sae.d_out}f", raw)
            if not all(map(math.isfinite, vector)):
                raise ValueError("its vector holds numbers that are not finite")
            return Kept(vector=vector, **more)
    raise ValueError("a blend is a list of [feature, weight], an expression and a vector are text")


def _index(index: Any, sae: Sae) -> int:
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < sae.d_sae:
        raise ValueError(f"{index!r} is no feature; {sae.name} has #0 to #{sae.d_sae - 1}")
    return index


def _pair(pair: Any, sae: Sae) -> tuple[int, float]:
    match pair:
        case [index, int() | float() as weight] if not isinstance(weight, bool) and math.isfinite(weight):
            return _index(index, sae), float(weight)
    raise ValueError(f"{pair!r} is not [feature, weight]")


def _amount(text: Any, amount: Any) -> None:
    if not isinstance(amount, str):
        raise ValueError(f"the dose of {text} must be text such as 0.4rn, got {amount!r}")
    try:
        if not doses.parse(amount):
            raise ValueError(f"the dose of {text} is empty")
    except UsageError as error:
        raise ValueError(f"the dose of {text}: {error}") from error
