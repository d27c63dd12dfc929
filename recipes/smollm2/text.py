"""The texts that the bundled SAE is trained on and scored on: the bench, novels, and what the model itself wrote.

Every chat in the template begins with the same system turn of 21 tokens; one in twenty keeps it. The tokens after it
then have values that lie 4.1 % of their variance from those of chats as they are used (48 chats; 2.6 % with the turn
kept, since corpora are read with plain text's start token); the first SAE
explained 88.1 % of them instead of 88.7.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lancet import bench
from lancet.files import read_json, whole_file, write_json
from lancet.model import Model

TEXTS = "texts.json"
FILES = {"train": "corpus.jsonl", "heldout": "heldout.jsonl"}
CHAT_LINE = re.compile(r"User: (.*?)\nAssistant: (.*)", re.DOTALL)


def as_chat(model: Model, text: str) -> str | None:
    """A `User: ... Assistant: ...` passage in the model's own template, None for any other text."""
    turns = re.split(r"\n(?=User: |Assistant: )", text)
    messages = []
    for turn in turns:
        who, _, said = turn.partition(": ")
        if who not in ("User", "Assistant") or not said:
            return None
        messages.append({"role": who.lower(), "content": said})
    if not messages:
        return None
    return str(model.tokenizer.apply_chat_template(messages, tokenize=False)).rstrip("\n")


def system_turn(model: Model) -> str:
    """What the template puts before every chat that has no system turn of its own."""
    chat = str(model.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
    return chat[: chat.index("<|im_start|>user")]


def without_system_turns(texts: list[str], turn: str, kept: int) -> list[str]:
    """The texts, of which one in `kept` keeps the system turn that it begins with."""
    return [text if i % kept == 0 else text.removeprefix(turn) for i, text in enumerate(texts)]


def novel_pieces(folder: Path, names: list[str], words: int) -> Iterator[str]:
    """Paragraphs of novels, short ones joined and long ones cut, at most `words` words each."""
    for name in names:
        piece: list[str] = []
        for paragraph in (folder / name).read_text(encoding="utf-8").splitlines():
            tokens = paragraph.split()
            while tokens:
                if piece and len(piece) + len(tokens) > words:
                    yield " ".join(piece)
                    piece = []
                piece += tokens[:words]
                tokens = tokens[words:]
        if piece:
            yield " ".join(piece)


def build(model: Model, recipe: dict[str, Any], novels: Path, self_written: Path) -> dict[str, list[str]]:
    """{"train": texts, "heldout": texts}, both shuffled, nothing in both."""
    settings, rng = recipe["text"], random.Random(recipe["seed"])
    train: list[str] = []
    heldout: list[str] = []

    files = sorted(path.name for path in novels.glob("*.txt"))
    rng.shuffle(files)
    kept = settings["heldout_novels"]
    words = int(settings["piece_tokens"] * 0.72)
    pieces = list(novel_pieces(novels, files[kept:], words))
    rng.shuffle(pieces)
    train += pieces[: settings["novel_tokens"] // settings["piece_tokens"]]
    apart = list(novel_pieces(novels, files[:kept], words))
    rng.shuffle(apart)
    heldout += apart[:1600]

    for name, concept in bench.concepts().items():
        rounds = settings["concept_rounds"] + settings["manual_rounds"] * (name in settings["manual"])
        for template in concept.part("train"):
            train += {bench.expand(template, rng) for _ in range(rounds)}
        heldout += [bench.expand(template, rng) for template in concept.part("heldout")]
    for theme, templates in bench.passages().items():
        for template in bench.select(templates, "train"):
            train += {bench.expand(template, rng) for _ in range(settings["passage_rounds"])}
        heldout += [bench.expand(template, rng) for template in bench.select(templates, "heldout")]
        if theme == "chat":
            chats = [*bench.select(templates, "train")]
            for name in ("assistant_refusal", "assistant_helpful"):
                chats += bench.concepts()[name].part("train")
            for template in chats:
                rendered = {as_chat(model, bench.expand(template, rng)) for _ in range(settings["chat_rounds"])}
                train += [text for text in rendered if text]

    for i, line in enumerate(self_written.read_text(encoding="utf-8").splitlines()):
        text = json.loads(line)["text"]
        (heldout if i % 10 == 9 else train).append(text)
    train = sorted(set(train))
    heldout = sorted(set(heldout) - set(train))
    rng.shuffle(train)
    rng.shuffle(heldout)
    turn, kept = system_turn(model), settings["system_turn_kept"]
    return {
        "train": without_system_turns(train, turn, kept),
        "heldout": without_system_turns(heldout, turn, kept),
    }


def write(texts: dict[str, list[str]], work: Path) -> None:
    """Writes `work/texts.json`."""
    write_json(work / TEXTS, texts)
    print({part: len(lines) for part, lines in texts.items()}, flush=True)


def corpus(work: Path, part: str) -> Path:
    """One part of the texts as JSONL, a {"text"} a line, written from `work/texts.json` where it is not there yet."""
    path = work / FILES[part]
    if not path.is_file():
        texts = read_json(work / TEXTS)[part]
        with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path
