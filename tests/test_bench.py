"""The bench's own notation: every template of every file expands to plain text, the same for the same seed, and
held-out templates stay apart."""

from __future__ import annotations

import random
import re

import pytest

from lancet import bench

TEMPLATES = [t for concept in bench.concepts().values() for t in concept.templates]
TEMPLATES += [t for theme in bench.passages().values() for t in theme]
CODE = [t for t in TEMPLATES if re.search(r"\[\[|\]\]|\{\{|\}\}", t)]


def test_sixty_concepts_with_keywords() -> None:
    concepts = bench.concepts()
    assert len(concepts) == 60
    assert list(concepts) == sorted(concepts)
    for name, concept in concepts.items():
        assert concept.name == name
        assert concept.about
        assert len(concept.keywords) >= 3, name
        assert all(word == word.strip() and word for word in concept.keywords), name
        assert len(concept.templates) >= 50, name
        assert not any(template.startswith("#") for template in concept.templates), name


def test_passages() -> None:
    passages = bench.passages()
    assert len(passages) == 9
    assert not any(line.startswith("# theme") for lines in passages.values() for line in lines)


@pytest.mark.parametrize("name", bench.concepts())
def test_parts_are_disjoint_and_make_up_all(name: str) -> None:
    concept = bench.concepts()[name]
    train, heldout, whole = concept.part("train"), concept.part("heldout"), concept.part("all")
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(whole)
    assert whole == concept.templates
    assert len(heldout) == len(whole) // bench.HELD_OUT_EVERY
    assert heldout[0] == whole[bench.HELD_OUT_EVERY - 1]


def test_no_template_is_held_out_here_and_trained_on_there() -> None:
    files = [c.templates for c in bench.concepts().values()] + list(bench.passages().values())
    train, heldout = ({t for lines in files for t in bench.select(lines, part)} for part in ("train", "heldout"))
    assert not train & heldout


@pytest.mark.parametrize("seed", [0, 1])
def test_prose_expands_to_plain_text(seed: int) -> None:
    for template in set(TEMPLATES) - set(CODE):
        text = bench.expand(template, random.Random(seed))
        assert text, template
        assert not re.search(r"[\[\]{}|\\]", text), (template, text)


@pytest.mark.parametrize("seed", [0, 1])
def test_code_keeps_only_its_literal_brackets(seed: int) -> None:
    assert 10 < len(CODE) < len(TEMPLATES) // 10
    for template in CODE:
        text = bench.expand(template, random.Random(seed))
        assert not re.search(r"[|\\]", text), (template, text)
        for doubled in ("[[", "]]", "{{", "}}"):
            # No brackets of choices and slots are left: what remains are the doubled ones, halved.
            assert text.count(doubled[0]) == template.count(doubled), (template, text)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("a [x|x] b", {"a x b"}),
        ("[|very ]odd", {"odd", "very odd"}),
        ("[[1, [2|3]]]", {"[1, 2]", "[1, 3]"}),
        ("[[[2|3], 1]]", {"[2, 1]", "[3, 1]"}),
        ("[[a|b]]", {"[a|b]"}),
        ("ages[[name]] {{name}} {{}}", {"ages[name] {name} {}"}),
        ("f(x):\\n\\treturn x", {"f(x):\n    return x"}),
    ],
)
def test_notation(template: str, wanted: set[str]) -> None:
    assert {bench.expand(template, random.Random(seed)) for seed in range(30)} == wanted


@pytest.mark.parametrize("template", ["{name} {name2}", "{name2} {name}", "{{{name}}}{{{name2}}}"])
def test_the_two_names_differ(template: str) -> None:
    for seed in range(200):
        first, second = re.findall(r"\w+", bench.expand(template, random.Random(seed)))
        assert first != second


def test_a_slot_has_one_value_throughout() -> None:
    for seed in range(50):
        text = bench.expand("{city} {city}|{name2} {name} {name2}|{[food|color]}", random.Random(seed))
        city, names, slot_in_choice = text.split("|")
        assert len(set(city.split())) == 1
        assert len(set(names.split())) == 2
        assert "{" not in slot_in_choice


def test_same_seed_same_text() -> None:
    first = list(bench.sentences("train", 3, seed=5))
    assert first == list(bench.sentences("train", 3, seed=5)) != list(bench.sentences("train", 3, seed=6))
    assert [name for name, _ in first] == [name for name in bench.concepts() for _ in range(3)]


def test_more_sentences_than_templates_go_round_again() -> None:
    counts = dict.fromkeys(bench.concepts(), 0)
    for name, text in bench.sentences("heldout", 20, seed=0):
        counts[name] += bool(text)
    assert set(counts.values()) == {20}
