"""GPT-2's real tokenizer: where words lie, and characters that are cut into several tokens.

LANCET_GPT2_TOKENIZER names a folder with its files (vocab.json and merges.txt).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fixtures_families import WIDTH
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

import lancet
from lancet.sae import random_sae
from lancet.site import Site
from lancet.tokens import Tokens

FOLDER = os.environ.get("LANCET_GPT2_TOKENIZER", "")
pytestmark = pytest.mark.skipif(
    not Path(FOLDER or "?").is_dir(), reason="LANCET_GPT2_TOKENIZER does not name a folder with GPT-2's tokenizer"
)
SENTENCE = "The Golden Gate Bridge is located in San Francisco."
PIECES = ("<|endoftext|>", "The", "ĠGolden", "ĠGate", "ĠBridge", "Ġis", "Ġlocated", "Ġin", "ĠSan", "ĠFrancisco", ".")
CHINESE = "柳叶刀读出了“金门大桥”在旧金山。"


@pytest.fixture(scope="module")
def lab() -> lancet.Lab:
    tokenizer = GPT2TokenizerFast.from_pretrained(FOLDER, local_files_only=True)
    hf = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=WIDTH, n_head=4))
    return lancet.Lab((hf, tokenizer), random_sae(WIDTH, 64, site=Site(1)))


def test_the_manuals_sentence(lab: lancet.Lab) -> None:
    reading = lab.read(SENTENCE)
    vocabulary = json.loads((Path(FOLDER) / "vocab.json").read_text(encoding="utf-8"))
    assert reading.tokens.ids == tuple(vocabulary[piece] for piece in PIECES)
    assert [reading.tokens.piece(i) for i in (0, 1, 4, 10)] == ["", "The", " Bridge", "."]
    assert reading.at("Bridge").positions == (4,)
    assert reading.at("San Francisco").positions == (8, 9)


def bytes_of(tokens: Tokens, tokenizer: object) -> str:
    return tokenizer.decode(list(tokens.ids[1:]))  # type: ignore[attr-defined]


def test_chinese_characters_of_several_tokens(lab: lancet.Lab) -> None:
    reading = lab.read(CHINESE)
    tokens = reading.tokens
    assert len(tokens) > len(CHINESE) + 1  # GPT-2 has no token for most of them
    assert "".join(tokens.piece(i) for i in range(len(tokens))) == CHINESE
    assert bytes_of(tokens, lab.model.tokenizer) == CHINESE
    cut = 0
    for at, character in enumerate(CHINESE):
        of = [i for i in range(1, len(tokens)) if tokens.spans[i][0] <= at < tokens.spans[i][1]]
        assert of, character
        cut += len(of) > 1
        if CHINESE.count(character) == 1:
            assert reading.at(character).positions == tuple(of)
    assert cut >= 8
    for word in ("柳叶刀", "金门大桥", "旧金山"):
        begin = CHINESE.index(word)
        of = [i for i in range(1, len(tokens)) if set(range(*tokens.spans[i])) & set(range(begin, begin + len(word)))]
        assert reading.at(word).positions == tuple(of), word
        assert "".join(tokens.piece(i) for i in of) == word
