"""The concept bench: 60 concepts with labelled sentence templates, and longer passages without labels.

It knows its own notation (choices, slots, escapes; see `assets/bench/README.md`) and nothing about models. One
template in ten is held out: it is never trained on, and everything is scored on it.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

Part = Literal["train", "heldout", "all"]
HELD_OUT_EVERY = 10

# Doubled brackets are taken first, from the left, so that `[[[1|2], 3]]` is a list that begins with a choice.
_CHOICE = re.compile(r"\[\[|\]\]|\[([^\[\]]*\|[^\[\]]*)\]")
_SLOT = re.compile(r"\{\{|\}\}|\{(name2|name|city|day|month|number|color|food)\}")
_DOUBLED = {"[[": "[", "]]": "]", "{{": "{", "}}": "}"}


@dataclass(frozen=True)
class Concept:
    """One concept: its keywords (matched case-insensitively as whole words) and its templates, in file order."""

    name: str
    about: str
    keywords: tuple[str, ...]
    templates: tuple[str, ...]

    def part(self, part: Part) -> tuple[str, ...]:
        """The templates of one part; every tenth, counted from the tenth, is held out."""
        return select(self.templates, part)


def select(templates: tuple[str, ...], part: Part) -> tuple[str, ...]:
    """The templates of one part of a file."""
    if part == "all":
        return templates
    held = part == "heldout"
    return tuple(t for i, t in enumerate(templates) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held)


@cache
def concepts() -> dict[str, Concept]:
    """All concepts by name."""
    found = {}
    for entry in sorted(_root().joinpath("concepts").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".txt"):
            concept = _parse(entry.read_text(encoding="utf-8"))
            found[concept.name] = concept
    return found


@cache
def passages() -> dict[str, tuple[str, ...]]:
    """Theme -> passage templates."""
    found = {}
    for entry in sorted(_root().joinpath("passages").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".txt"):
            lines = entry.read_text(encoding="utf-8").splitlines()[1:]
            found[entry.name.removesuffix(".txt")] = tuple(line for line in lines if line.strip())
    return found


def expand(template: str, rng: random.Random) -> str:
    """One text out of a template: choices first, then slots (one value each throughout), then the escapes."""
    text = _CHOICE.sub(lambda match: match[0] if match[1] is None else rng.choice(match[1].split("|")), template)
    values: dict[str, str] = {}

    def fill(match: re.Match[str]) -> str:
        slot = match[1]
        if slot is None:
            return match[0]
        if slot not in values:
            pool = _slots()["name" if slot == "name2" else slot]
            other = values.get("name" if slot == "name2" else "name2" if slot == "name" else "")
            values[slot] = rng.choice([value for value in pool if value != other])
        return values[slot]

    text = _SLOT.sub(fill, text)
    for doubled, single in _DOUBLED.items():
        text = text.replace(doubled, single)
    return text.replace("\\n", "\n").replace("\\t", "    ")


def sentences(part: Part, per_concept: int, seed: int) -> Iterator[tuple[str, str]]:
    """(concept, text): `per_concept` texts for each concept, its templates taken in a shuffled round."""
    for name, concept in concepts().items():
        rng = random.Random(f"{seed} {name}")
        templates = list(concept.part(part))
        rng.shuffle(templates)
        for i in range(per_concept):
            yield name, expand(templates[i % len(templates)], rng)


def neutral_texts(count: int, seed: int = 0) -> list[str]:
    """Everyday texts of many kinds out of the passages: the bundled text that facts are measured on."""
    rng = random.Random(seed)
    templates = [template for lines in passages().values() for template in lines]
    return [expand(template, rng) for template in rng.sample(templates, min(count, len(templates)))]


@cache
def _slots() -> dict[str, list[str]]:
    return tomllib.loads(_root().joinpath("slots.toml").read_text(encoding="utf-8"))


def _parse(text: str) -> Concept:
    header: dict[str, str] = {}
    templates = []
    for line in text.splitlines():
        if line.startswith("# ") and not templates and ":" in line:
            key, _, value = line[2:].partition(":")
            header[key] = value.strip()
        elif line.strip():
            templates.append(line)
    keywords = tuple(word.strip() for word in header["keywords"].split(",") if word.strip())
    return Concept(header["concept"], header["about"], keywords, tuple(templates))


def _root():
    return files("lancet").joinpath("assets", "bench")
