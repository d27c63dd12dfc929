"""Names for features from a language model at a server, and how well each name tells where its feature fires.

A name is asked for with examples of all bands, the tokens where the feature is active marked. Its detection score (the
method of arXiv 2410.13928, "detection") is measured on examples that were not shown: the same model gets the name and
windows of text, in some of which the feature fires and in as many of which it is silent, shuffled and unmarked, and
says of each whether it fires. The score is the balanced accuracy: the mean of the shares told rightly among the firing
and among the silent windows, 0.5 by chance.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lancet.atlas.completions import Message
from lancet.atlas.explanations import one_line

if TYPE_CHECKING:
    from lancet.atlas.atlas import Atlas, Example, Record

SHOWN = {0: 8, 5: 2, 4: 2, 3: 2, 2: 2, 1: 2}  # band -> examples in the question for a name
WINDOWS = 10  # firing ones in the question for a score, and as many silent ones
FEWEST = 3  # of either kind; a score on fewer says nothing
ACTIVE = 0.5  # of the window's peak: from here on a token is marked
LONGEST_NAME = 120  # characters
ASKED_AGAIN = 2  # times after an answer that makes no sense


@dataclass(frozen=True)
class Evidence:
    """What is known of one feature, as it is asked about.

    Attributes:
        feature: its index.
        shown: windows for the question for a name, tokens marked, the strongest first, with their bands.
        fires, says: the tokens that it fires on most, and those that it makes likelier.
        windows: (text, whether it fires there), shuffled, none of them shown.
    """

    feature: int
    shown: tuple[tuple[int, str], ...]
    fires: tuple[str, ...]
    says: tuple[str, ...]
    windows: tuple[tuple[str, bool], ...]


@dataclass
class Named:
    """What came of asking about one feature.

    Attributes:
        text: the name, "" where none could be had.
        score: balanced accuracy, None where it was not measured.
        asked: over how many windows.
        why: what went wrong, "" where nothing did.
    """

    feature: int
    text: str = ""
    score: float | None = None
    asked: int = 0
    why: str = ""


Ask = Callable[[Sequence[Message]], str]


# ---- what is shown ---------------------------------------------------------------------------------------------------


def evidence(atlas: Atlas, record: Record, examples: Sequence[Example], seed: int = 0) -> Evidence:
    """Chooses examples for both questions; no window is in both.

    Args:
        examples: all of the feature's.
        seed: of the draw of windows and of their order.
    """
    draw = random.Random(f"{seed}:{record.feature}")  # a string: the same on every platform
    bands: dict[int, list[Example]] = {}
    for example in examples:
        bands.setdefault(example.band, []).append(example)
    shown, rest, seen = [], [], set()
    for band, count in SHOWN.items():
        own = [e for e in bands.get(band, []) if e.hash not in seen]
        # Every second one is shown, so that windows of the same strength are left for the score.
        taken = own[::2][:count]
        shown += taken
        seen |= {e.hash for e in taken}
        rest.append([e for e in own if e not in taken])
    kept: dict[int, Example] = {}
    order = [e for row in zip(*(_padded(group) for group in rest), strict=True) for e in row if e is not None]
    for e in order:  # by turns of each band, so that weak firings count as strong ones do
        if e.hash not in seen:
            kept.setdefault(e.hash, e)
    fires = list(kept.values())[:WINDOWS]
    silent = atlas.silent(record.feature, len(fires), seed) if len(fires) >= FEWEST else []
    windows = [(_plain(e), True) for e in fires] + [(_plain(e), False) for e in silent]
    draw.shuffle(windows)
    return Evidence(
        record.feature,
        tuple((e.band, marked(e)) for e in shown),
        tuple(_token(token) for token in record.fires_tokens[:5]),
        tuple(_token(token) for token in (record.effect_up or record.logit_up) if _readable(token))[:8],
        tuple(windows) if len(silent) >= FEWEST else (),
    )


def _padded(group: Sequence[Example], length: int = 40) -> list[Example | None]:
    return [*group[:length], *[None] * (length - len(group[:length]))]


def marked(example: Example) -> str:
    """A window as one line, its active tokens as [[token]], the strongest as [[*token*]]."""
    out = []
    for i, (token, strength) in enumerate(zip(example.tokens, example.strengths, strict=True)):
        if i == example.peak:
            out.append(f"[[*{token}*]]")
        elif token and strength >= ACTIVE * example.value > 0:
            out.append(f"[[{token}]]")
        else:
            out.append(token)
    return _line("".join(out))


def _plain(example: Example) -> str:
    return _line(example.text)


def _line(text: str) -> str:
    """Line breaks are seen, and cannot be taken for the end of an example."""
    return text.replace("\r", "").replace("\n", "⏎").replace("\t", " ").strip(" ")


def _readable(token: str) -> bool:
    """Whether a token is text: pieces of characters are not."""
    return "\ufffd" not in token and token.replace("\n", "").isprintable()


def _token(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)


# ---- the questions ---------------------------------------------------------------------------------------------------

NAMER = (
    "You describe features of a language model. A feature is a number that the model computes at every token; it is "
    "zero at most tokens. From pieces of text you work out what makes it active. In each piece, tokens where it is "
    "active stand in double brackets, [[so]], and the most active one as [[*so*]]; ⏎ is a line break. The feature can "
    "see only what comes before a token, and the token itself.\n"
    "Look for the one thing that the marked tokens share: a word, a kind of word, a meaning, a form, a place in the "
    "sentence, or what the text before them is about. Weak examples show where it ends. Prefer what is specific and "
    "true of nearly all pieces to what sounds grand; say so when only the form is shared."
)
JUDGE = (
    "You are given the description of a feature of a language model, a number that is zero at most tokens, and "
    "numbered pieces of text. Judge for each piece whether the feature is active at any token of it, going by the "
    "description alone. ⏎ is a line break. Any number of the pieces can be active."
)


def name_question(about: Evidence, language: str = "English") -> list[Message]:
    """The messages that ask for a name."""
    parts = []
    strong = [text for band, text in about.shown if band == 0]
    if strong:
        parts.append("The strongest examples:\n" + "\n".join(f"- {text}" for text in strong))
    weak = [(band, text) for band, text in about.shown if band]
    if weak:
        told = "\n".join(f"- ({20 * (band - 1)} to {20 * band} %) {text}" for band, text in weak)
        parts.append(f"Others, with how strong they are compared to the strongest:\n{told}")
    if about.fires:
        parts.append(f"Most of its activity is on the tokens {', '.join(about.fires)}.")
    if about.says:
        parts.append(
            f"When it is active, the model is more likely to write {', '.join(about.says)} next. This may have nothing "
            f"to do with when it is active."
        )
    parts.append(
        f"Name it in {language}, in at most eight words, without saying that it is a feature or that something is "
        f'active. Answer with JSON alone: {{"name": "..."}}'
    )
    return [{"role": "system", "content": NAMER}, {"role": "user", "content": "\n\n".join(parts)}]


def score_question(name: str, about: Evidence) -> list[Message]:
    """The messages that ask in which windows a feature of this name fires."""
    pieces = "\n".join(f"{number}. {text}" for number, (text, _) in enumerate(about.windows, 1))
    ask = (
        f"Description: {name}\n\n{pieces}\n\nAnswer with JSON alone, true or false for each of the "
        f'{len(about.windows)} pieces: {{"1": true, "2": false, ...}}'
    )
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": ask}]


# ---- the answers -----------------------------------------------------------------------------------------------------


def json_in(answer: str) -> dict[str, Any] | None:
    """The last JSON object of an answer, whatever stands around it; None where there is none."""
    text = re.sub(r"(?s)<think>.*?(</think>|$)", "", answer)
    found, decoder, at = None, json.JSONDecoder(), 0
    while (at := text.find("{", at)) >= 0:
        try:
            told, end = decoder.raw_decode(text, at)
        except ValueError:
            at += 1
            continue
        found, at = (told if isinstance(told, dict) else found), end
    return found


def name_in(answer: str) -> str:
    """The name of an answer.

    Raises:
        ValueError: there is none; says what is wrong.
    """
    told = json_in(answer)
    if told is None:
        raise ValueError("there was no JSON object in it")
    name = told.get("name")
    if not isinstance(name, str) or not any(c.isalnum() or not c.isspace() for c in name):
        raise ValueError('"name" was no text')
    name = one_line(name).strip().rstrip(".") or one_line(name)
    if len(name) > LONGEST_NAME:
        raise ValueError(f'"name" had {len(name)} characters, at most {LONGEST_NAME} are allowed')
    return name


_TRUE, _FALSE = {"true", "yes", "1"}, {"false", "no", "0"}


def verdicts_in(answer: str, count: int) -> list[bool]:
    """[count] which windows are said to fire.

    Raises:
        ValueError: not every window has a verdict, or others have; says what is wrong.
    """
    told = json_in(answer)
    if told is None:
        raise ValueError("there was no JSON object in it")
    given: Mapping[str, Any] = {str(key).strip(): value for key, value in told.items()}
    wanted = [str(number) for number in range(1, count + 1)]
    if missing := [number for number in wanted if number not in given]:
        raise ValueError(f"{len(missing)} of the {count} pieces had no answer (the first is {missing[0]})")
    if more := set(given) - set(wanted):
        raise ValueError(f"there were answers for pieces that do not exist, such as {sorted(more)[0]!r}")
    out = []
    for number in wanted:
        word = str(given[number]).strip().lower()
        if word not in _TRUE | _FALSE:
            raise ValueError(f"the answer for {number} was {given[number]!r}, not true or false")
        out.append(word in _TRUE)
    return out


def balanced_accuracy(said: Sequence[bool], true: Sequence[bool]) -> float:
    """The mean of the shares told rightly of either kind; both must occur."""
    right = {kind: [s == t for s, t in zip(said, true, strict=True) if t is kind] for kind in (True, False)}
    return sum(sum(found) / len(found) for found in right.values()) / 2


# ---- one feature -----------------------------------------------------------------------------------------------------


def named(about: Evidence, ask: Ask, language: str = "English", name: str = "") -> Named:
    """Asks for a name (unless one is given) and for its score.

    Args:
        ask: messages to the text of an answer; what it raises goes through, save after the name: see `Half`.
    """
    out = Named(about.feature, name)
    try:
        if not name:
            out.text = _tried(name_question(about, language), name_in, ask)
        if about.windows:
            said = _tried(score_question(out.text, about), lambda text: verdicts_in(text, len(about.windows)), ask)
            out.score = round(balanced_accuracy(said, [fires for _, fires in about.windows]), 4)
            out.asked = len(about.windows)
    except NonsenseError as error:
        out.why = str(error)
    except Exception as error:
        raise Half(out) from error
    return out


class Half(Exception):  # noqa: N818 - a result that was cut short
    """Something stopped the questions about a feature; `done` is what is known so far, the cause is chained."""

    def __init__(self, done: Named) -> None:
        super().__init__()
        self.done = done


class NonsenseError(Exception):
    """No answer made sense."""


def _tried(messages: list[Message], read: Callable[[str], Any], ask: Ask) -> Any:
    """The meaning of an answer; one that makes none is said to make none, and asked for again."""
    why = ""
    for _ in range(1 + ASKED_AGAIN):
        answer = ask(messages)
        try:
            return read(answer)
        except ValueError as error:
            why = str(error)
            messages = [
                *messages,
                {"role": "assistant", "content": answer[:2000] or "(nothing)"},
                {"role": "user", "content": f"That cannot be used: {why}. Answer with the JSON object alone."},
            ]
    raise NonsenseError(why)
