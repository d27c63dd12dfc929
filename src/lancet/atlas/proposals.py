"""Names that are proposed out of an atlas alone, without a model: what a feature fires on, what the text around is
about, and what it makes likelier.

Words count by how far they set a feature apart: the share of its examples that have a word, times the logarithm of how
many times that is the share among all features' examples (a term's frequency against its frequency everywhere). A form
(punctuation, the place after a comma) is named where nearly all examples have it and other features' have it less. What
a feature makes likelier is told beside what it fires on where the two differ: a detector need not cause.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lancet.atlas import terms
from lancet.atlas.explanations import AUTO, Explanation, one_line

if TYPE_CHECKING:
    from lancet.atlas.atlas import Atlas

STRONGEST, WEAKER = 10, 2  # examples read of band 0, and of each other band
AT_ONCE = 2048  # features whose examples are in memory together
EVERYWHERE, DENSE = 0.5, 0.1  # of all tokens
NEARLY_ALL = 0.7  # of a feature's examples: a form is named from here on
LIFT = 2.0  # and where it is so many times what other features' examples have
TOPIC, TOPIC_LIFT = 0.3, 3.0  # the same for a word around the peak
FEW = 3  # examples; a word around the peaks of fewer is chance, and a name made from fewer says so
SAID_BY_MANY = 0.03  # of all features: a word that more of them make likelier (the, is) tells none of them apart
RARE = 0.12  # of the weight of the word that it fires on most: what has less is chance
FIRST = 0.7  # of a feature's firings on the first token of a text

_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CJK_RUN = re.compile(f"[{_CJK}]+")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_TAIL = re.compile(rf"[^\W_{_CJK}]+$")
_HEAD = re.compile(rf"^[^\W_{_CJK}]+")
_MARKS = {
    ",": "comma", ".": "full stop", ";": "semicolon", ":": "colon", "?": "question mark", "!": "exclamation mark",
    "(": "opening bracket", ")": "closing bracket", "-": "hyphen", "–": "dash", "—": "dash", "/": "slash",
    '"': "quotation mark", "“": "quotation mark", "”": "quotation mark", "'": "apostrophe", "’": "apostrophe",
    "，": "comma", "。": "full stop", "、": "listing comma", "：": "colon", "；": "semicolon", "？": "question mark",
    "！": "exclamation mark", "（": "opening bracket", "）": "closing bracket", "$": "dollar sign", "%": "per cent",
    "=": "equals sign", "{": "opening brace", "}": "closing brace", "[": "opening bracket", "]": "closing bracket",
    "<": "angle bracket", ">": "angle bracket", "#": "hash", "*": "asterisk", "_": "underscore", "@": "at sign",
}  # fmt: skip
_SQL = f"""
    WITH chosen AS (
        SELECT feature, band, rank, passage, peak::INT AS peak, first::INT AS first,
               octet_length(strengths)::INT AS n
        FROM examples
        WHERE feature >= ? AND feature < ?
              AND ((band = 0 AND rank < {STRONGEST}) OR (band > 0 AND rank < {WEAKER}))
    ), placed AS (
        SELECT feature, band, rank, peak, start, text,
               CASE WHEN first = 0 THEN 0 ELSE ends[first] END AS a,
               CASE WHEN peak = 0 THEN 0 ELSE ends[peak] END AS p, ends[peak + 1] AS q, ends[first + n] AS z
        FROM chosen JOIN passages USING (passage)
    )
    SELECT feature, substring(text, a + 1, p - a), substring(text, p + 1, q - p), substring(text, q + 1, z - q)
    FROM placed ORDER BY feature, band, rank
"""


@dataclass
class Seen:
    """What the examples of one feature hold: counts over `of` examples.

    Attributes:
        words, tokens: the word at the peak, and the token itself without spaces.
        kinds: what the token is: word, number, punctuation, line break, space.
        before: what stands before it: a mark, the start of a line, a word in quotes.
        around: words of the window but the peak's, each counted once an example.
        inner: tokens that are the end of a longer word, and those that begin one.
    """

    of: int = 0
    words: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    before: Counter[str] = field(default_factory=Counter)
    around: Counter[str] = field(default_factory=Counter)
    inner: Counter[str] = field(default_factory=Counter)


@dataclass
class Usual:
    """The mean share of a feature's examples that have something, over all features."""

    features: int = 0
    before: Counter[str] = field(default_factory=Counter)
    around: Counter[str] = field(default_factory=Counter)

    def add(self, seen: Seen) -> None:
        """Counts a feature in."""
        self.features += 1
        for total, own in ((self.before, seen.before), (self.around, seen.around)):
            for what, count in own.items():
                total[what] += count / seen.of  # type: ignore[assignment]

    def lift(self, total: Counter[str], what: str, share: float) -> float:
        """How many times the usual share this one is."""
        return share * self.features / max(total[what], 1e-9)


def propose(atlas: Atlas) -> list[Explanation]:
    """One name for each feature that fired, by number; the same atlas gives the same names.

    Raises:
        DamagedError: the atlas' files cannot be read.
    """
    usual, kept = Usual(), {}
    for seen_by in _looked(atlas):
        for feature, seen in seen_by.items():
            usual.add(seen)
            # Rare words tell nothing later and would fill the memory.
            least = max(2, math.ceil(TOPIC * seen.of))
            seen.around = Counter({word: count for word, count in seen.around.items() if count >= least})
            kept[feature] = seen
    told = atlas.manifest
    first = told.positions[0] / max(1, sum(told.positions))
    rows = atlas.query(
        "SELECT feature, fired, density, positions, fires_tokens, fires_shares, effect_up, logit_up FROM features "
        "WHERE fired > 0 ORDER BY feature"
    )
    said = Counter(word for row in rows for word in _clean(terms.whole(row[6] or row[7] or [])))
    common = {word for word, count in said.items() if count > max(FEW, SAID_BY_MANY * len(rows))}
    out = []
    for feature, fired, density, positions, tokens, shares, effect, logit in rows:
        at_first = positions[0] / fired if first < FIRST / LIFT else 0.0
        fires = list(zip(tokens or [], shares or [], strict=False))
        says = [word for word in _clean(terms.whole(effect or logit or [])) if word not in common]
        out.append(_name(feature, density, at_first, fires, says, kept.get(feature, Seen()), usual))
    return out


# ---- looking ---------------------------------------------------------------------------------------------------------


def _looked(atlas: Atlas) -> Iterator[dict[int, Seen]]:
    """What examples hold, for some features at a time."""
    for begin in range(0, len(atlas), AT_ONCE):
        found: dict[int, Seen] = {}
        for feature, before, token, after in atlas.query(_SQL, [begin, begin + AT_ONCE]):
            _look(found.setdefault(feature, Seen()), before, token, after)
        yield found


def _look(seen: Seen, before: str, token: str, after: str) -> None:
    """Counts an example."""
    if not token:  # a further piece of a character that belongs to the token before
        before, token = before[:-1], before[-1:]
    core = token.strip()
    seen.of += 1
    kind = _kind(token, core)
    seen.kinds[kind] += 1
    seen.tokens[core.lower() if kind == "word" else core] += 1
    head = token[: len(token) - len(token.lstrip())]
    if kind == "word":
        left = _TAIL.search(before) if not head and _HEAD.match(core) else None
        right = _HEAD.match(after) if _TAIL.search(token) else None
        word = (left[0] if left else "") + core + (right[0] if right else "")
        seen.words[word.lower()] += 1
        if left:
            seen.inner[f"-{core.lower()}"] += 1
        elif right:
            seen.inner[f"{core.lower()}-"] += 1
    seen.before[_place(before + head)] += 1
    seen.around.update(set(words(before)) | set(words(after)))


def _kind(token: str, core: str) -> str:
    if not core:
        return "line break" if "\n" in token else "space"
    if any(c.isalpha() for c in core):
        return "word"
    return "number" if any(c.isdigit() for c in core) else "punctuation"


def _place(before: str) -> str:
    """What stands before a peak, in words."""
    text = before.rstrip(" \t")
    if text.endswith("\n"):
        return "start of line"
    if not text:
        return ""
    if name := _MARKS.get(text[-1]):
        return f"after {'an' if name[0] in 'aeiou' else 'a'} {name}"
    last = _TAIL.search(text)
    return f'after "{last[0].lower()}"' if last else ""


def words(text: str) -> Iterator[str]:
    """The words of a text in lower case; Chinese, which has no spaces, as pairs of characters."""
    for word in _WORD.findall(text.lower()):
        if word.isascii() or not _CJK_RUN.search(word):
            yield word
            continue
        for run in _CJK_RUN.findall(word):
            yield from (run[i : i + 2] for i in range(max(1, len(run) - 1)))


# ---- naming ----------------------------------------------------------------------------------------------------------


def _name(
    feature: int,
    density: float,
    at_first: float,
    fires: Sequence[tuple[str, float]],
    says: Sequence[str],
    seen: Seen,
    usual: Usual,
) -> Explanation:
    on = _fires_on(fires, seen)
    topic = _topic(seen, usual, on)
    name, formal = _form(density, at_first, seen, usual, on)
    if not name:
        name = ", ".join(on[:3]) if _telling(seen, on) else ""
    if not name and topic:
        name = f"text about {', '.join(topic[:3])}"
    elif not name:
        name = f"various, such as {', '.join(on[:3])}" if on else "various"
    if DENSE < density <= EVERYWHERE:
        name = f"on many tokens: {name}"
    agree = _share_words(on + topic, says)
    if says and not agree and not formal:
        name += f" (says: {', '.join(says[:2])})"
    parts = [
        f"fires on: {', '.join(on[:5])}" if on else "",
        f"around: {', '.join(topic[:4])}" if topic else "",
        f"says: {', '.join(says[:4])} ({'agrees' if agree else 'differs'})" if says else "",
        f"on {100 * density:.0f} % of tokens" if density > DENSE else "",
        f"from {seen.of} example{'s' * (seen.of != 1)} only" if seen.of < FEW else "",
    ]
    return Explanation(feature, one_line(name), AUTO, note=one_line("; ".join(part for part in parts if part)))


def _fires_on(fires: Sequence[tuple[str, float]], seen: Seen) -> list[str]:
    """What it fires on, the most telling first: words of the examples, and tokens by their share of the activation."""
    weights: Counter[str] = Counter()
    for word, count in seen.words.items():
        weights[word] += count / max(1, seen.of)  # type: ignore[assignment]
    for token, share in fires:
        core = token.strip().lower()
        # A piece of a word says less than the words that it is a piece of.
        if core and not any(core in word for word in seen.words if word != core and len(core) < 3):
            weights[core] += share  # type: ignore[assignment]
    if not any(_letters(word) for word in weights):
        return [core for core, _ in seen.tokens.most_common(5) if core]
    out: list[str] = []
    most = max(weights.values(), default=0)
    for word, weight in sorted(weights.items(), key=lambda item: (-round(item[1], 6), item[0])):
        if _letters(word) and weight >= RARE * most and not any(_kin(word, other) for other in out):
            out.append(word)
    return out[:5]


def _telling(seen: Seen, on: Sequence[str]) -> bool:
    """Whether a few words (and their forms) make up most of the examples' peaks."""
    if not seen.of:
        return bool(on)
    shares = [sum(count for word, count in seen.words.items() if _kin(word, own)) / seen.of for own in on[:3]]
    return bool(shares) and (shares[0] >= 0.4 or sum(shares) >= 0.6)


def _form(density: float, at_first: float, seen: Seen, usual: Usual, on: Sequence[str]) -> tuple[str, bool]:
    """A name by form alone, where that is what the evidence says: (the name or "", whether it is of pure form)."""
    if density > EVERYWHERE:
        return "almost everywhere", True
    if at_first >= FIRST:
        return "first token of a text", True
    if not seen.of:
        return "", False
    kind, count = seen.kinds.most_common(1)[0]
    if kind != "word" and count >= NEARLY_ALL * seen.of:
        token, own = max(seen.tokens.items(), key=lambda item: (item[1], item[0]))
        if kind in ("line break", "space"):
            return f"{kind}s", True
        alone = own >= 0.6 * seen.of
        if kind == "number":
            return (f"the number {token}" if alone else "numbers"), True
        return (f"{_MARKS[token]} {token}" if token in _MARKS else token) if alone else "punctuation", True
    if seen.inner:
        part, count = max(seen.inner.items(), key=lambda item: (item[1], item[0]))
        own = len(part.strip("-")) > 1
        many = len(seen.words) >= 5 and max(seen.words.values()) < 0.4 * seen.of
        if own and count >= 0.6 * seen.of and (many or not _telling(seen, on)):
            return f"{part}, a part of words", False
    if not _telling(seen, on):
        place, count = max(seen.before.items(), key=lambda item: (item[1], item[0]))
        share = count / seen.of
        if place and share >= NEARLY_ALL and usual.lift(usual.before, place, share) >= LIFT:
            return place, True
    return "", False


def _topic(seen: Seen, usual: Usual, on: Sequence[str]) -> list[str]:
    """Words around the peaks that set the feature apart, the most telling first."""
    scores: dict[str, float] = {}
    for word, count in seen.around.items():
        share = count / seen.of
        lift = usual.lift(usual.around, word, share)
        if (
            count >= FEW
            and share >= TOPIC
            and lift >= TOPIC_LIFT
            and _letters(word)
            and not any(_kin(word, own) for own in on)
        ):
            scores[word] = share * math.log(lift)
    out: list[str] = []
    for word in sorted(scores, key=lambda w: (-round(scores[w], 6), w)):
        if not any(_kin(word, other) for other in out):
            out.append(word)
    return out[:5]


def _clean(tokens: Iterable[str]) -> list[str]:
    """Tokens that are words, each once whatever its case and form."""
    out: list[str] = []
    for token in tokens:
        core = token.strip().lower()
        good = core.isalpha() and (len(core) > 1 or bool(_CJK_RUN.search(core)))
        if good and not any(_kin(core, other) for other in out):
            out.append(core)
    return out


def _letters(word: str) -> bool:
    return any(c.isalpha() for c in word)


def _kin(one: str, other: str) -> bool:
    """Whether two words are forms of one (bridge, bridges), as far as their letters tell; in Chinese, whether one
    holds the other."""
    if one == other:
        return True
    if _CJK_RUN.search(one) or _CJK_RUN.search(other):
        return one in other or other in one
    short, long = sorted((one, other), key=len)
    return len(short) >= 3 and long.startswith(short) and len(long) - len(short) <= 3 and long[len(short) :] in _ENDINGS


_ENDINGS = {"s", "es", "d", "ed", "'s", "’s", "ing", "r", "er", "ly", "n", "en"}


def _share_words(fired: Sequence[str], said: Sequence[str]) -> bool:
    return any(_kin(one, other) for one in fired for other in said)
