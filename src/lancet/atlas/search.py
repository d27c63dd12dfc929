"""Features by words: those that fire on them, those that say them, those whose examples or descriptions hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lancet.atlas import explanations, index, terms
from lancet.atlas.atlas import Atlas, Record
from lancet.atlas.index import Matrix
from lancet.errors import UsageError
from lancet.telling import Say

# What a field's score counts. Names and descriptions were written by someone who looked; examples hold much by chance.
WEIGHTS = {"named": 1.0, "described": 1.2, "fires": 1.5, "says": 1.2, "about": 0.4}
NAMED = 12.0  # a name that holds the word: more than any other field gives
SINGLE = 0.3  # what a single character of a longer run counts


@dataclass(frozen=True)
class Hit:
    """One feature that has something to do with the words.

    Attributes:
        record: its row in the atlas.
        score: the larger the better.
        fires, says, about, named, described: the words of the query that it fires on, that it makes likelier, that its
            examples hold, that its name holds, that its descriptions hold.
        name: the user's names of it; description: one of its explanations; "" where there is none.
    """

    record: Record
    score: float
    fires: tuple[str, ...]
    says: tuple[str, ...]
    about: tuple[str, ...]
    named: tuple[str, ...]
    described: tuple[str, ...]
    name: str
    description: str

    @property
    def feature(self) -> int:
        """Its number."""
        return self.record.feature

    @property
    def does(self) -> str:
        """In words: whether it fires on the words, says them, both, or neither."""
        if self.fires and self.says:
            return "fires and says"
        if self.fires or self.says:
            return "fires" if self.fires else "says"
        return "examples only" if self.about else "name only" if self.named else "description only"

    def to_json(self) -> dict[str, Any]:
        """As in docs/json.md."""
        lists = {key: list(getattr(self, key)) for key in ("fires", "says", "about", "named", "described")}
        return {
            "feature": self.feature,
            "does": self.does,
            "score": round(self.score, 3),
            **lists,
            "name": self.name,
            "description": self.description,
            "density": self.record.density,
            "maximum": self.record.maximum,
            "fires_tokens": list(self.record.fires_tokens),
            "says_tokens": list(self.record.effect_up or self.record.logit_up),
        }


def search(atlas: Atlas, query: str, top: int = 20, say: Say = lambda line: None) -> list[Hit]:
    """Features by words, the best first.

    Args:
        query: one or several words; a feature with all of them goes before one with some.
        top: at most so many.
        say: told when the index is built, which happens once for an atlas.

    Raises:
        UsageError: there is no word in the query; DamagedError: the atlas is damaged.
    """
    import numpy as np

    words = terms.asked(query)
    if not words or top < 1:
        what = f"{query!r} holds no word to search for" if not words else f"--top must be at least 1, got {top}"
        raise UsageError(f"{what}; give words such as bridge or 大桥")
    fields = {**index.of(atlas, say), **_named(atlas), **_described(atlas)}
    total = np.zeros(len(atlas), np.float32)
    columns = {
        (field, term): held.column(term) for field, held in fields.items() for _, found in words for term in found
    }
    for word, found in words:
        reached = np.zeros(len(atlas), np.float32)
        for field in fields:
            for term in found:
                rows, scores = columns[field, term]
                reached[rows] += WEIGHTS[field] * scores * (SINGLE if len(term) < len(word) and len(term) == 1 else 1.0)
        total += np.sqrt(reached)  # so that two words found once count more than one found twice
    some = np.flatnonzero(total)
    best = some[np.lexsort((some, -total[some]))][:top]
    records = atlas.records(best.tolist()) if len(best) else []

    def parts(field: str, feature: int) -> tuple[str, ...]:
        if field not in fields:
            return ()
        out: list[str] = []
        for word, found in words:
            out += terms.covered(word, [term for term in found if feature in columns[field, term][0]])
        return tuple(out)

    return [
        Hit(
            record=record,
            score=float(total[record.feature]),
            fires=parts("fires", record.feature),
            says=parts("says", record.feature),
            about=parts("about", record.feature),
            named=parts("named", record.feature),
            described=parts("described", record.feature),
            name=atlas.names_of(record.feature),
            description=_best(atlas.manifest.key, record.feature),
        )
        for record in records
    ]


def _named(atlas: Atlas) -> dict[str, Matrix]:
    """The user's names, scored as they are read: there are few, and they change."""
    import numpy as np

    found: dict[int, set[int]] = {}
    for name, feature in atlas.names.items():
        for term in terms.terms(name):
            found.setdefault(index.hashed(term), set()).add(feature)
    if not found:
        return {}
    order = sorted(found)
    features = [np.array(sorted(found[term]), np.int32) for term in order]
    begins = np.concatenate([[0], np.cumsum([len(part) for part in features])])
    rows = np.concatenate(features)
    return {"named": Matrix(np.array(order, np.uint64), begins, rows, np.full(len(rows), NAMED, np.float32))}


def _described(atlas: Atlas) -> Mapping[str, Matrix]:
    """The index of the explanations that are kept for the SAE, built where their file has changed."""
    key = atlas.manifest.key
    where = explanations.path(key)
    if not where.is_file():
        return {}
    facts = where.stat()
    state = {"bytes": facts.st_size, "time": facts.st_mtime_ns, "features": len(atlas)}

    def make() -> Mapping[str, Matrix]:
        import numpy as np

        told = {f: entries for f, entries in sorted(explanations.load(key).items()) if f < len(atlas)}
        collected = index.Collected()
        for entries in told.values():
            collected.add(term for e in entries for term in terms.terms(e.text))
        made = collected.matrix()
        rows = np.array(list(told), np.int32)
        return {"described": Matrix(made.terms, made.begins, rows[made.features], made.scores)}

    folder = index.place(atlas)
    return index.opened(folder.with_name(f"{folder.name}-described"), state, make)


def _best(key: str, feature: int) -> str:
    found = explanations.best(explanations.of(key, [feature]).get(feature, ()))
    return found.text if found else ""
