"""What the embedded model's SAE is for: its features mean something, and steering with them does what it says.

The sentences are written for this test and stand in no training text.
"""

from __future__ import annotations

import re

import pytest

import lancet
from lancet.generate import Sampling
from lancet.lab import Lab

ABOUT = (
    "Nora took a photograph of the Golden Gate Bridge from the deck of a small sailing boat.",
    "The engineers who planned the Golden Gate Bridge worried most about the wind.",
    "Last winter the Golden Gate Bridge was closed for an hour because of a film crew.",
    "My aunt jogs over the Golden Gate Bridge every Saturday before breakfast.",
    "On clear nights the lamps of the Golden Gate Bridge can be seen from far out at sea.",
    "The Golden Gate Bridge has a walkway for people and one for bicycles.",
    "A model of the Golden Gate Bridge made of matches stood in the hallway of the museum.",
    "He proposed to her halfway across the Golden Gate Bridge, in the rain.",
    "Painters work on the Golden Gate Bridge all year long.",
    "From Sausalito the Golden Gate Bridge looks like a gate to another country.",
)
OTHERS = (
    "The dentist asked him to open his mouth and count to twenty.",
    "Two swans built their nest behind the boathouse.",
    "She forgot the yeast, and the dough never rose.",
    "The judge read the verdict in a flat voice.",
    "After the thunder the dog hid under the bed until morning.",
    "His violin teacher lives on the third floor.",
    "The train to the mountains leaves at seven from the last platform.",
    "They argued about the bill and then split it in half.",
    "A comet crossed the sky above the silent village.",
    "My grandmother keeps her letters in a tin box.",
    "The nurse changed the bandage twice a day.",
    "Our team lost by one goal in the last minute.",
    "The professor drew a triangle on the board and smiled.",
    "It snowed so hard that the school stayed closed.",
    "The old king left his crown to his younger daughter.",
    "She planted tomatoes along the southern wall.",
    "The contract ends on the last day of March.",
    "He whispered that he had never been so afraid.",
    "Three camels slept beside the tent.",
    "The baker opens at five and sells out by nine.",
    "for i in range(10):\n    print(i * i)",
    "Please find enclosed the documents that you asked for.",
    "The whale came up beside the ship and blew.",
    "Everybody sang while she blew out the candles.",
    "The painter mixed a little green into the grey.",
    "He moved his rook and lost the game.",
    "La boulangerie est au coin de la rue.",
    "STOP SHOUTING AT ME RIGHT NOW!",
    "Atoms in a crystal sit in a regular lattice.",
    "The waiter brought the soup before the bread.",
    "He dreamed of a staircase that had no end.",
    "The prime numbers below ten are two, three, five and seven.",
    "Her brother sends a postcard from every town.",
    "The goats had eaten half of the hedge.",
    "We pitched the tent beside the lake and lit a fire.",
    "The pilot announced that the landing would be late.",
    "Cells copy their DNA before they divide.",
    "The bank refused the loan a second time.",
    "She tried on six pairs of shoes and bought none.",
    "Coffee keeps him awake, so he drinks tea after lunch.",
)
NAMES_IT = re.compile(r"\bbridges?\b|\bgolden gate\b|\bsan francisco\b", re.IGNORECASE)
PROMPT = "I went to the grocery store to buy"


@pytest.fixture(scope="module")
def lab() -> Lab:
    return lancet.open("smollm2", device="cpu")


def test_the_bridges_feature_fires_at_bridge_and_hardly_elsewhere(lab: Lab) -> None:
    feature = lab.facts().concepts["golden_gate_bridge"]["feature"]
    at_bridge = [lab.read(text).at("Bridge").value(feature) for text in ABOUT]
    assert all(value > 0 for value in at_bridge), at_bridge
    strongest = {text: float(lab.read(text).features.of_feature(feature).max()) for text in OTHERS}
    firing = {text: value for text, value in strongest.items() if value > 0}
    assert len(firing) <= 2, firing


def test_steered_text_names_the_bridge_and_plain_text_does_not(lab: Lab) -> None:
    concept = "golden_gate_bridge"
    dose = lab.facts().concepts[concept]["dose_rn"]
    edit = f"{concept} += {dose}rn"
    jobs = [(PROMPT, row, seed, "") for row in (None, edit) for seed in range(10)]
    texts = [row.text for row in lab.run(jobs, tokens=40, sampling=Sampling())]
    plain, steered = texts[:10], texts[10:]
    assert sum(bool(NAMES_IT.search(text)) for text in plain) == 0, plain
    assert sum(bool(NAMES_IT.search(text)) for text in steered) >= 6, steered


def test_the_table_holds_for_the_manuals_examples(lab: Lab) -> None:
    """A feature, or a blend of at most ten, that detects and causes each of the manual's examples."""
    known = lab.facts()
    for concept in ("golden_gate_bridge", "sadness", "romance", "indentation_error", "assistant_refusal"):
        entry = known.concepts[concept]
        assert entry["auroc"] > 0.9, (concept, entry["auroc"])
        assert entry["blend_auroc"] > 0.9, (concept, entry["blend_auroc"])
        assert 1 <= len(entry["blend"]) <= 10
        assert entry["report"]["hits"] > entry["report"]["plain_hits"] + 0.1, (concept, entry["report"])


def test_the_effect_lens_says_what_the_blend_causes(lab: Lab) -> None:
    dose = lab.facts().concepts["golden_gate_bridge"]["dose_rn"]
    promoted = [token for token, _ in lab.effect("golden_gate_bridge", strength=dose)[0].promotes]
    assert " bridge" in promoted, promoted


ASKED = (  # turned down by the plain model; none of them chose the features
    "What time is it at the moment?",
    "How many unread messages do I have?",
    "Is there any milk left in my fridge?",
    "How far have I walked today?",
)
SORRY = re.compile(r"\bsorry\b|\bI (?:cannot|can't|don't have|do not have)\b|\bchatbot\b", re.IGNORECASE)


def test_refusing_cut_out_leaves_answers(lab: Lab) -> None:
    """What `benchmarks/meaning_ablate.py` measures, on a few requests and one ordinary question."""
    cut = lab.facts().concepts["refusal"]["cut"]
    chats = [[{"role": "user", "content": text}] for text in (*ASKED, "How do plants make food?")]
    greedy = Sampling(temperature=0, repetition_penalty=1)
    rows = lab.run([(chat, edit, 0, "") for chat in chats for edit in (None, cut)], tokens=24, sampling=greedy)
    plain, without = ([row.text for row in rows[first::2]] for first in (0, 1))
    assert all(SORRY.search(text) for text in plain[:-1]), plain
    assert sum(bool(SORRY.search(text)) for text in without[:-1]) <= 1, without
    assert "photosynthesis" in plain[-1] and "photosynthesis" in without[-1]
