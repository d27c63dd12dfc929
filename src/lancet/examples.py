"""What a finder is given, as tokens: sentences, or words in carrier sentences; where in them the concept sits, and
which words set them apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lancet.background import TOKENS
from lancet.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.background import Background
    from lancet.model import Model
    from lancet.tokens import Tokens

WORDS = 12  # at most so many set the examples apart
SPOKEN = 6.0  # nats, at least, of the leading features at a word of a single example
CHANCE = 5e-3  # that a word of neutral text came up in so many examples; less, and it sets them apart
COMMON = 0.02  # share of neutral sentences from which a word says nothing of a concept
PIECE, SELDOM = 4, 8  # a word's first piece stands for it where it is so long and in so few neutral sentences
MANY = 8  # words from which text is taken for a sentence
_WRITTEN_CLOSE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # scripts without spaces: kana, Chinese characters
_CLOSE = re.compile(f"[{_WRITTEN_CLOSE}]")
_WORD = re.compile(f"[{_WRITTEN_CLOSE}]+|[^\\W_{_WRITTEN_CLOSE}]+")

CARRIERS = (
    "They talked about {} all evening.",
    "I had never thought much about {} before.",
    "The first chapter of the book is about {}.",
    "My sister knows a lot about {}.",
    "We saw a film about {} last week.",
    "There is a long article on {} in the paper.",
    "He asked me what I knew of {}.",
    "Nothing interests her as much as {}.",
)
OTHER_WORDS = (
    "the new schedule", "his old shoes", "the tax form", "a broken chair", "the next meeting", "her neighbour's fence",
    "the price of paper", "an empty box",
)  # fmt: skip
CLOSE_CARRIERS = (
    "他们整个晚上都在谈论{}。",
    "我以前很少想到{}。",
    "这本书的第一章讲的是{}。",
    "我姐姐非常了解{}。",
    "上周我们看了一部关于{}的电影。",
    "报纸上有一篇关于{}的长文章。",
    "他问我对{}知道多少。",
    "没有什么比{}更让她感兴趣。",
)
OTHER_CLOSE_WORDS = ("新的时间表", "他的旧鞋", "税务表格", "一把坏椅子", "下次会议", "邻居的篱笆", "纸的价格", "空盒子")


def rows(model: Model, texts: Sequence[str], name: str, notes: list[str]) -> list[Tokens]:
    """Sentences as tokens; very long ones are cut, which is noted.

    Raises:
        UsageError: a sentence is empty or no text, or holds no token but the start.
    """
    if isinstance(texts, str):
        raise UsageError(f"{name} must be a list of sentences, got one text; write {name}=[...]")
    found = []
    most = min(model.context, TOKENS)
    for i, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise UsageError(f"{name} sentence {i} is no text but {type(text).__name__}; give a list of sentences")
        if not text.strip():
            raise UsageError(f"{name} sentence {i} is empty; leave it out or write it")
        row = model.tokenize(text, most=most + 1)
        if len(row) > most:
            notes.append(f"{name} sentence {i} is longer than {most} tokens and was cut there")
            row = model.tokenize(text, most=most)
        if all(role == "start" for role in row.roles):
            raise UsageError(f"{name} sentence {i} holds nothing but the start token; write a sentence")
        found.append(row)
    return found


def places(rows: Sequence[Tokens], at: str | None) -> Tensor:
    """[examples, longest] True at the tokens that count: those of every occurrence of `at`, or all but the start token.

    Case counts where an example has `at` as it is written, and else does not.

    Raises:
        UsageError: `at` is empty, or not in (the first tokens of) an example.
    """
    import torch

    if at is not None and not at.strip():
        raise UsageError("--at is empty; give characters that are in every example, or leave it out")
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    for i, row in enumerate(rows):
        content = [p for p, role in enumerate(row.roles) if role != "start"]
        if at is not None:
            found = [m.span() for m in re.finditer(re.escape(at), row.text)]
            found = found or [m.span() for m in re.finditer(re.escape(at), row.text, re.IGNORECASE)]
            inside = [p for p in content if any(row.spans[p][1] > b and row.spans[p][0] < e for b, e in found)]
            if not inside:
                why = "comes after the tokens that are read" if found else f"is not in {row.text[:60]!r}"
                raise UsageError(f"{at!r} must be in every example, and in example {i + 1} it {why}")
            content = inside
        out[i, content] = True
    return out


def apart(
    model: Model, rows: Sequence[Tokens], others: Sequence[Tokens], base: Background, told: Tensor | None = None
) -> list[int]:
    """Ids of the words that set examples apart, the most telling first.

    Neutral text is not full of them, and that they came up in so many examples would be no chance, going by neutral
    text and by the counter-examples. A word of a single example must also be one at which the leading features fire:
    a sentence about a wedding has an altar, and a mill by accident.

    Args:
        told: [examples, longest] how strongly the leading features speak at each token, in nats.
    """
    from scipy.stats import binom

    counts, against = _counts(rows), _counts(others)
    whole = {i for row in rows for p, i in enumerate(row.ids) if _ends_word(row, p)}
    spoken: dict[int, float] = {}
    for row, line in zip(rows, [] if told is None else told.tolist(), strict=told is not None):
        for i, value in zip(row.ids, line, strict=False):
            spoken[i] = max(spoken.get(i, 0.0), value)
    scored = []
    for i, count in counts.items():
        if not _is_word(model, i) or (i not in whole and len(model.decode([i]).strip()) < PIECE):
            continue
        if count == 1 and len(rows) > 2 and spoken.get(i, 0.0) < SPOKEN:
            continue
        usual = (float(base.seen[i]) + 0.5) / (len(base.examples) + 1)
        beside = (against.get(i, 0) + 0.5) / (len(others) + 1) if against.get(i) else 0.0
        chance = float(binom.sf(count - 1, len(rows), max(usual, beside)))
        if usual <= COMMON and chance <= CHANCE * (2 if count == 1 else 1):
            scored.append((chance, -spoken.get(i, 0.0), i))
    return [i for *_, i in sorted(scored)[:WORDS]]


def marked(rows: Sequence[Tokens], ids: Sequence[int]) -> Tensor:
    """[examples, longest] True where one of some tokens stands."""
    import torch

    wanted = set(ids)
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    for i, row in enumerate(rows):
        out[i, [p for p, token in enumerate(row.ids) if token in wanted]] = True
    return out


def _counts(rows: Sequence[Tokens]) -> dict[int, int]:
    """In how many texts each token id occurs."""
    counts: dict[int, int] = {}
    for row in rows:
        for i in set(row.ids):
            counts[i] = counts.get(i, 0) + 1
    return counts


def _is_word(model: Model, i: int) -> bool:
    """Whether a token begins a word of at least three letters, or is made of characters written without spaces."""
    text = model.decode([i])
    word = text.strip()
    if _CLOSE.search(word):
        return all(map(_CLOSE.match, word))
    # SentencePiece drops a leading space when it decodes; the vocabulary's own spelling has it.
    begins = text[:1] == " " or str(model.tokenizer.convert_ids_to_tokens(i))[:1] in "\u2581\u0120"
    return begins and len(word) >= 3 and word.isalpha()


def _ends_word(row: Tokens, position: int) -> bool:
    """Whether a token is the last, or only, piece of a word."""
    end = row.spans[position][1]
    return not row.text[end : end + 1].isalnum()


# ---- words instead of sentences ------------------------------------------------------------------------------------


def carriers(words: str) -> tuple[list[str], list[list[str]]]:
    """Sentences that carry some words, and groups of the same sentences with others in their place.

    Of several words each alone is a group of its own: what fires on anything golden is no bridge. Several that are
    written small come capitalised in every second sentence, since a name is.

    Raises:
        UsageError: no words, or a sentence.
    """
    words = words.strip()
    if not _WORD.search(words):
        raise UsageError("no words; give some, such as 'golden gate bridge'")
    if words[-1] in ".!?。！？" or len(words.split()) > MANY or "\n" in words:
        raise UsageError(f"{words[:60]!r} looks like a sentence; give sentences with --like (in Python a list of them)")
    frames, others = (CLOSE_CARRIERS, OTHER_CLOSE_WORDS) if _CLOSE.search(words) else (CARRIERS, OTHER_WORDS)
    parts = words.split()
    alone = [[part] * len(frames) for part in parts if len(part) >= 3] if len(parts) > 1 else []
    if words.islower() and alone:
        alone = [_by_turns(part[0]) for part in alone]
        own = _by_turns(words)
    else:
        own = [words] * len(frames)

    # Not format(): the words may hold brackets.
    groups = [[f.replace("{}", w) for f, w in zip(frames, row, strict=True)] for row in (own, others, *alone)]
    return groups[0], groups[1:]


def _by_turns(words: str) -> list[str]:
    return [words.title() if i % 2 else words for i in range(len(CARRIERS))]


def word_ids(model: Model, words: str, base: Background) -> list[list[int]]:
    """For each word the ids of the tokens that begin it inside a sentence: as written, small, and capitalised.

    A word that is cut into several tokens is stood for by its first, where that hardly begins other words. Of several
    words those that neutral text is full of say nothing and are left out, and so are those that no token tells.
    """
    parts = _WORD.findall(words)
    told = []
    for word in parts:
        forms = dict.fromkeys((word, word.lower(), word.capitalize()))
        found = [i for form in forms if (i := _first(model, form, base)) is not None]
        common = max((float(base.seen[i]) for i in found), default=0) > COMMON * len(base.examples)
        if found and not (common and len(parts) > 1):
            told.append(list(dict.fromkeys(found)))
    return told


def _first(model: Model, form: str, base: Background) -> int | None:
    """The token that begins a word, None where it may as well begin others."""
    close = bool(_CLOSE.search(form))
    ids = list(model.tokenizer(form if close else f" {form}", add_special_tokens=False)["input_ids"])
    while ids and not model.decode([ids[0]]).strip():  # where the space is a token of its own
        ids = ids[1:]
    piece = model.decode([ids[0]]).strip() if ids else ""
    if not piece or "\ufffd" in piece:
        return None
    seldom = int(base.seen[ids[0]]) <= SELDOM and (close or len(piece) >= PIECE)
    return ids[0] if len(ids) == 1 or seldom else None
