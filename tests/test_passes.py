"""Many texts through a model and an SAE, against one text at a time; and that no measurement takes half an hour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lancet.weights
from lancet import background, facts, passes
from lancet.model import Model
from lancet.sae import Sae, random_sae
from lancet.site import Site
from lancet.telling import counted
from lancet.tokens import Tokens

TEXTS = [
    "the cat sat on the mat",
    "a dog",
    "rain falls on the old house by the sea, and it falls on the mat too",
    "one",
    "the sea",
    "the old cat returned to the old house",
]
KINDS = ["standard", "topk", "temporal"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2()


def sae_of(model: Model, kind: str = "standard", width: int = 48) -> Sae:
    return random_sae(model.d_model, width, kind, seed=3, site=Site(2))  # type: ignore[arg-type]


def rows_of(model: Model) -> list[Tokens]:
    return [model.tokenize(text) for text in TEXTS]


class Told(list[str]):
    """`say` that keeps lines and steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, int, int]] = []

    def __call__(self, line: str) -> None:
        self.append(line)

    def step(self, text: str, done: int, of: int) -> None:
        self.steps.append((text, done, of))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(("together", "chunk"), [(2048, 8192), (20, 40), (1, 1)])
def test_equals_one_text_at_a_time(
    model: Model, kind: str, pieces: bool, together: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "TOGETHER", together)
    monkeypatch.setattr(passes, "CHUNK", chunk)
    if pieces:  # the encoder is converted a few columns at a time
        monkeypatch.setattr(lancet.weights, "COPY_BYTES", 0)
        monkeypatch.setattr(lancet.weights, "PIECE_BYTES", 9 * 4 * model.d_model)
    sae, rows = sae_of(model, kind), rows_of(model)
    assert sae.one_piece is not pieces
    found: dict[tuple[int, int], torch.Tensor] = {}
    for piece in passes.through(model, sae, rows, [Site(3)]):
        dense = piece.features.dense()
        for i, (text, position, token) in enumerate(
            zip(piece.text.tolist(), piece.position.tolist(), piece.ids.tolist(), strict=True)
        ):
            assert token == rows[text].ids[position]
            assert (text, position) not in found
            found[text, position] = torch.cat([dense[i], piece.values[Site(3)][i], piece.values[sae.site][i]])
    assert len(found) == sum(len(row) - 1 for row in rows)
    for text, row in enumerate(rows):
        values = model.values(model.batch([row]), [sae.site, Site(3)])
        keep = torch.arange(len(row)) > 0
        dense = sae.features(values[sae.site][0], keep).dense()
        for position in range(1, len(row)):
            wanted = torch.cat([dense[position - 1], values[Site(3)][0, position], values[sae.site][0, position]])
            torch.testing.assert_close(found[text, position], wanted, rtol=1e-4, atol=1e-4)


def test_reads_in_the_order_of_the_texts_and_ends_between_chunks(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out are the last texts, not the long ones."""
    monkeypatch.setattr(passes, "CHUNK", 24)
    monkeypatch.setattr(Sae, "tokens_at_once", 1)
    rows, told = rows_of(model), []
    all_ = [set(piece.text.tolist()) for piece in passes.through(model, sae_of(model), rows, told=told.append)]
    assert told == sorted(told) and told[-1] == len(rows) and len(told) > 2
    some = [set(piece.text.tolist()) for piece in passes.through(model, sae_of(model), rows, most=1)]
    assert set().union(*some) == set(range(told[0])) and len(some) < len(all_)


def test_work_counts_the_blocks_below_and_the_encoder(model: Model) -> None:
    sae = sae_of(model)
    block = sum(p.numel() for p in model.arch.decoder_layers[0].parameters())
    assert passes.work(model, sae) == 2 * block + sae.d_in * sae.d_sae
    wide = sae_of(model, width=480)
    assert passes.work(model, wide) - passes.work(model, sae) == sae.d_in * 432


def test_a_wide_sae_is_measured_on_less_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(model) * 50
    assert passes.affordable(model, sae_of(model), rows) == rows
    monkeypatch.setattr(passes, "LEAST", 30)
    monkeypatch.setattr(passes, "WORK", 0.0)
    kept = passes.affordable(model, sae_of(model), rows)
    assert kept == rows[: len(kept)] and sum(map(len, kept)) <= 30 < sum(map(len, rows[: len(kept) + 1]))
    monkeypatch.setattr(passes, "WORK", 100 * passes.work(model, sae_of(model)))
    kept = passes.affordable(model, sae_of(model), rows)
    assert 100 - max(map(len, rows)) < sum(map(len, kept)) <= 100
    monkeypatch.setattr(passes, "LEAST", 0)
    monkeypatch.setattr(passes, "WORK", 0.0)
    assert passes.affordable(model, sae_of(model), rows) == rows[:1]  # never nothing at all


def test_a_million_features_take_minutes_not_hours(model: Model) -> None:
    """By its multiplications: two cores do some 1e11 a second (4,159 tokens took 85 s)."""
    sae = sae_of(model)
    sae.W_enc, sae.W_dec = torch.empty(2304, 1_000_000, device="meta"), torch.empty(1_000_000, 2304, device="meta")
    row = model.tokenize("the cat sat on the mat " * 10)
    kept = passes.affordable(model, sae, [row] * 1000)
    tokens = sum(map(len, kept))
    assert tokens > 2000 and tokens * passes.work(model, sae) / 1e11 < 300


def test_facts_tell_how_far_they_are_and_on_what_they_stand(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "MEASURED_TEXTS", 12)
    told, sae = Told(), sae_of(model)
    found = facts.of(model, sae, say=told)
    never = int((found.maximum == 0).sum())
    assert told == [
        f"measuring how strong and how often the features of {sae.name} fire (once)",
        f"measured on {found.tokens:,} tokens of bundled text; {never} of 48 features never fired there",
    ]
    assert told.steps[0] == ("reading texts", 0, 12) and told.steps[-1] == ("reading texts", 12, 12)
    again = Told()
    assert facts.of(model, sae, say=again).tokens == found.tokens
    assert not again and not again.steps
    monkeypatch.setattr(passes, "WORK", 300 * passes.work(model, sae))
    monkeypatch.setattr(passes, "LEAST", 0)
    less = facts.measure(model, sae, facts.neutral_texts(12))
    assert 0 < less.tokens <= 300 < found.tokens


def test_facts_of_a_damaged_file_are_measured_anew(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "MEASURED_TEXTS", 2)
    sae = sae_of(model)
    found = facts.of(model, sae)
    (file,) = (facts.cache_dir() / "facts").iterdir()
    file.write_bytes(b"half")
    assert facts.of(model, sae).tokens == found.tokens
    assert file.stat().st_size > 100


def test_a_background_of_less_text_says_so(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, told = sae_of(model), Told()
    monkeypatch.setattr(passes, "LEAST", 200)
    monkeypatch.setattr(passes, "WORK", 0.0)
    found = background.of(model, sae, told)
    assert 1 <= found.maximum.population < background.SENTENCES
    assert len(found.examples) == found.maximum.population
    assert f"read {found.maximum.population} of them" in told[-1]
    assert int(found.seen.max()) <= found.maximum.population


def test_what_is_no_sparse_code_is_not_held(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "ENTRIES", 500)
    monkeypatch.setattr(background, "AT_ONCE", 4)
    found = background.measure(model, sae_of(model), TEXTS * 4)
    assert found.maximum.population == 4 and len(found.examples) == 4


def test_counting_ends_with_the_block() -> None:
    told = Told()

    def broken_off() -> None:
        with counted(told, "x", 9) as done:
            done(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert told.steps == [("x", 0, 9), ("x", 3, 9), ("x", 9, 9)]
    with counted(print, "x", 9) as done:  # a plain function is told lines alone
        done(1)
