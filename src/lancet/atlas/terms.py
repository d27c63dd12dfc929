"""What a text is searched by: words, and pairs of characters where a script writes no spaces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# Scripts that write no spaces between words: Chinese and Japanese, Thai, Lao, Burmese, Khmer.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_RUNS = re.compile(f"([{_UNSPACED}]+)|[^\\W_{_UNSPACED}]+")
_SIGNS = re.compile(f"[{_UNSPACED}]")
_WORDS = re.compile(f"[^\\W_{_UNSPACED}]+")


def terms(text: str) -> list[str]:
    """The terms of a text, in order: `The Bridges of 金门大桥` -> the, bridge, of, 金, 门, 大, 桥, 金门, 门大, 大桥."""
    out: list[str] = []
    for run in _RUNS.finditer(unicodedata.normalize("NFKC", text).casefold()):
        out += grams(run[0]) if run[1] else [stem(run[0])]
    return out


def whole(tokens: Iterable[str]) -> list[str]:
    """Those of some tokens that begin a word, or are of a script without spaces; all of them where none is: what a
    feature makes likelier is full of pieces of words (`ilepsy`), which say nothing alone."""
    given = list(tokens)
    return [token for token in given if token[:1] == " " or _SIGNS.search(token)] or given


def grams(run: str) -> list[str]:
    """Single characters and pairs of a run of a script without spaces."""
    return [*run, *(run[i : i + 2] for i in range(len(run) - 1))]


def stem(word: str) -> str:
    """A word without a plural's s: one search finds `bridge` and `bridges`."""
    if len(word) > 3 and word.endswith("s") and word[-2] not in "siu":
        return word[:-1]
    return word


def asked(query: str) -> list[tuple[str, list[str]]]:
    """The words of a query, and each one's terms, the telling ones first: of a run without spaces its pairs."""
    out: dict[str, list[str]] = {}
    for run in _RUNS.finditer(unicodedata.normalize("NFKC", query).casefold()):
        found = grams(run[0]) if run[1] else [stem(run[0])]
        out[run[0]] = sorted(dict.fromkeys(found), key=lambda term: -len(term)) if run[1] else found
    return list(out.items())


def covered(word: str, found: Iterable[str]) -> list[str]:
    """The parts of a word that some of its terms make up: 金门 and 大桥 of 金门大桥 where 门大 is lacking.

    Single characters count only where no pair was found.
    """
    have = set(found)
    if not have or stem(word) in have:
        return [word] if have else []
    pairs = [i for i in range(len(word) - 1) if word[i : i + 2] in have]
    if not pairs:
        return [character for character in dict.fromkeys(word) if character in have]
    out, begin = [], pairs[0]
    for at, after in zip(pairs, [*pairs[1:], len(word) + 1], strict=True):
        if after != at + 1:
            out.append(word[begin : at + 2])
            begin = after
    return out


def around(text: str, begin: int, end: int) -> str:
    """The word of a text that characters `begin` to `end` lie in; without spaces, one character more on either side."""
    if begin == end > 0:  # a token that is part of the character before it
        begin -= 1
    token = text[begin:end]
    begin += len(token) - len(token.lstrip())
    end -= len(token) - len(token.rstrip()) if token.strip() else 0
    if begin >= end:
        return ""
    if _WORDS.fullmatch(text, end - 1, end):
        if found := _WORDS.match(text, end):
            end = found.end()
    elif _SIGNS.match(text, end - 1) and _SIGNS.match(text, end):
        end += 1
    if _WORDS.fullmatch(text, begin, begin + 1):
        while begin > 0 and _WORDS.fullmatch(text, begin - 1, begin):
            begin -= 1
    elif begin > 0 and _SIGNS.match(text, begin) and _SIGNS.match(text, begin - 1):
        begin -= 1
    return text[begin:end]
