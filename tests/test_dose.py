"""The dose: its table against a plain loop, its statistics against scipy, what decides and what does not, `auto`."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_edits import random_lab, with_facts

from lancet import dosing, intervals, prompts
from lancet.algebra import Direction
from lancet.baselines import gradient
from lancet.dose import Limits, Row, best, measured, score
from lancet.doses import parse, written
from lancet.edit import Edit, RowChange
from lancet.errors import UsageError
from lancet.fit import PRICE, Contexts, Words, fit, phrases, pursue
from lancet.generate import Sampling, choose, logits
from lancet.intervals import Interval
from lancet.lab import Lab
from lancet.model import Model
from lancet.saying import above, keywords
from lancet.sweep import Text, batch_rows, distance, repeats, surprises, write
from lancet.units import Amount

PROMPTS = ["The cat sat on", "The dog", "the mat and the cat and the"]


@pytest.fixture(scope="module")
def lab(tiny_gpt2: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Lab:
    made = random_lab(tiny_gpt2(seed=4), d_sae=64)
    return with_facts(made, tmp_path_factory.mktemp("facts") / "f.safetensors", [3.0] * 60, 6.0)


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCET_DATA", str(tmp_path / "data"))


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "of"), [(0, 10), (10, 10), (3, 40), (1, 1), (37, 40)])
def test_wilson_equals_scipy(hits: int, of: int) -> None:
    from scipy.stats import binomtest

    theirs = binomtest(hits, of).proportion_ci(0.95, method="wilson")
    ours = intervals.rate(hits, of)
    assert (ours.value, ours.low, ours.high) == pytest.approx((hits / of, theirs.low, theirs.high), abs=1e-12)


def test_bootstrap_agrees_with_scipy_and_draws_whole_groups() -> None:
    from scipy.stats import bootstrap

    rng = np.random.default_rng(3)
    values = rng.normal(2, 1, 60)
    theirs = bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=rng).confidence_interval
    ours = intervals.mean([*values, math.nan])
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    # Six texts of each prompt that say the same thing six times are ten observations, not sixty.
    means = rng.normal(0, 1, 10)
    grouped = intervals.mean(np.repeat(means, 6).tolist(), np.repeat(range(10), 6).tolist())
    theirs = bootstrap((means,), np.mean, n_resamples=5000, method="percentile", rng=rng).confidence_interval
    assert (grouped.low, grouped.high) == pytest.approx((theirs.low, theirs.high), abs=0.06)
    assert math.isnan(intervals.mean([math.nan]).value)
    one = intervals.mean([1.0, 2.0, 3.0, 4.0], [0, 0, 0, 0])  # a single prompt must not look like certainty
    assert one.low < 2 < 3 < one.high


def test_harmonic_mean_equals_scipy() -> None:
    from scipy.stats import hmean

    assert intervals.harmonic([0.3, 0.9, 0.5]) == pytest.approx(float(hmean([0.3, 0.9, 0.5])))
    assert intervals.harmonic([0.0, 1.0]) == 0


def test_score_is_the_harmonic_mean_within_the_limits_and_zero_beyond() -> None:
    limits = Limits(1.5, 0.1)
    assert score(0.8, 0.75, 0.05, limits) == pytest.approx(3 / (1 / 0.8 + 1 / 0.75 + 1 / 0.95))
    assert score(0.8, -0.4, 0.0, limits) == pytest.approx(3 / (1 / 0.8 + 2))  # plainer than plain is no merit
    assert score(1.0, 1.5001, 0.0, limits) == score(1.0, 0.0, 0.1, limits) == score(0.0, 0.0, 0.0, limits) == 0
    assert score(1.0, math.nan, 0.0, limits) == 0


# ---- what is measured on a text --------------------------------------------------------------------------------------


def test_repeats_and_distance_against_plain_definitions() -> None:
    assert repeats([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)  # 123 231 312 123
    assert repeats([5] * 6) == pytest.approx(3 / 4)
    assert repeats([1, 2]) == 0

    def slow(a: Sequence[int], b: Sequence[int]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(0)
    for _ in range(20):
        a, b = ([rng.randrange(3) for _ in range(rng.randrange(1, 6))] for _ in range(2))
        assert distance(a, b) == pytest.approx(slow(a, b) / max(len(a), len(b)))
    assert distance([], []) == 0
    assert distance([1], []) == 1


@pytest.mark.parametrize(
    ("words", "text", "says"),
    [
        (["rain"], "It began to Rain.", True),
        (["rain"], "the train was brainy", False),
        (["rain"], "rain_coat", False),
        (["Golden Gate"], "the golden gate!", True),
        (["can't"], "I can't.", True),
        (["<p>"], "a<p>b", True),
        (["雪"], "今天下雪了", True),
        (["snow", "ice"], "nothing of the kind, nice", False),
    ],
)
def test_keywords_are_whole_words(words: list[str], text: str, says: bool) -> None:
    assert keywords(words)([text]) == [says]


def test_a_detector_lets_one_neutral_sentence_in_fifty_through() -> None:
    from lancet import background

    neutral = background.neutral_sentences()[:300]
    place = {text: i for i, text in enumerate(neutral)}
    detect, threshold = above(lambda texts: torch.tensor([float(place.get(t, 1000)) for t in texts]))
    assert sum(detect(neutral)) <= 6
    assert 290 < threshold < 295
    assert detect(["something new", "  "]) == [True, False]


# ---- the table against a plain loop ----------------------------------------------------------------------------------


def alone(
    lab: Lab, prompt: str, edit: Edit | None, seed: int, tokens: int, sampling: Sampling
) -> tuple[list[int], float]:
    """One continuation without batch or cache, and its surprise by one pass a token."""
    start = lab.tokenize(prompt)
    change = lab.changes(edit, start, len(start) + tokens)
    ids: list[int] = []
    processors = sampling.processors()
    for step in range(tokens):
        row = replace(start, ids=(*start.ids, *ids))
        seen = torch.tensor([row.ids])
        out = logits(lab.model, [row], [change])[:, -1]
        token = int(choose(processors(seen, out.float()), [seed], step, sampling.temperature == 0)[0])
        if token in lab.model.ends:
            break
        ids.append(token)
    nats = []
    for i, token in enumerate(ids):
        out = lab.model.forward(torch.tensor([[*start.ids, *ids[:i]]]))[0, -1].float()
        nats.append(float(-out.log_softmax(-1)[token]))
    return ids, float(np.mean(nats)) if nats else math.nan


@pytest.mark.parametrize("rows_at_once", [7, 64])
def test_the_sweep_equals_a_plain_loop_without_batching(lab: Lab, rows_at_once: int) -> None:
    arms = {"low": "#3 += 0.2rn", "high": "#3 += 0.8rn", "set": "#5 = 2x @ generated"}
    sampling = Sampling()
    with torch.inference_mode():
        found = write(lab, arms, PROMPTS, (0, 7), 6, {"the": keywords(["the"])}, sampling, rows_at_once=rows_at_once)
        assert list(found) == ["plain", *arms]
        plain: dict[tuple[int, int], list[int]] = {}
        for arm, texts in found.items():
            assert [(t.prompt, t.seed) for t in texts] == [(p, s) for p in range(3) for s in (0, 7)]
            for text in texts:
                edit = Edit.parse(arms[arm]) if arm in arms else None
                ids, nats = alone(lab, PROMPTS[text.prompt], edit, text.seed, 6, sampling)
                plain.setdefault((text.prompt, text.seed), ids)
                assert list(text.ids) == ids
                assert text.nats == pytest.approx(nats, abs=1e-4, nan_ok=True)
                assert text.text == lab.model.decode(ids)
                assert text.repeats == repeats(ids)
                assert text.distance == pytest.approx(distance(ids, plain[text.prompt, text.seed]))
                assert text.says == {"the": keywords(["the"])([text.text])[0]}
    assert len({t.ids for t in found["high"]} & {t.ids for t in found["plain"]}) < 6  # the edits do something


def test_a_row_of_the_table_is_what_its_texts_say() -> None:
    texts = [
        Text("a", i // 2, i % 2, "", (1,), nats, 0.1 * i, 0.5, {"k": i > 1, "e": True})
        for i, nats in enumerate([3, 4, 5, math.nan])
    ]
    plain = [Text("plain", i // 2, i % 2, "", (1,), 2.0) for i in range(4)]
    row = measured("w", "#1 += 2", "2", texts, plain, Limits(9, 0.9))
    assert (row.rate.value, row.said["e"].value, row.extra.value) == (0.5, 1.0, pytest.approx(2.0))
    assert row.repeats.value == pytest.approx(0.15)
    assert row.score == pytest.approx(3 / (2 + 1 / (1 - 2 / 18) + 1 / 0.85))
    assert row.sign == "+="
    assert json.loads(json.dumps(row.to_json(texts=True)))["texts"][3]["nats"] is None


def test_surprise_is_given_the_prompt_without_a_prefix(lab: Lab) -> None:
    found = write(lab, {"told": None}, PROMPTS[:1], (0,), 6, {}, prefixes={"told": "The dog. "})
    (text,) = found["told"]
    direct = lab.generate("The dog. " + PROMPTS[0], tokens=6)
    assert text.ids == direct.ids
    assert text.nats == pytest.approx(surprises(lab.model, [(lab.tokenize(PROMPTS[0]), text.ids)])[0])


def test_batches_are_as_large_as_memory_allows(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from lancet import sweep

    assert batch_rows(lab.model, 50) == sweep.MOST_ROWS
    monkeypatch.setattr(sweep, "_free", lambda model: 4 * 1_000_000)
    few = batch_rows(lab.model, 50)
    kept = 2 * 4 * 4 * 16 * 50 * 4  # keys and values of 4 blocks, 4 heads of 16, 50 tokens, 4 bytes
    assert few == int(1_000_000 / (2 * kept + 40 * lab.model.d_vocab))
    monkeypatch.setattr(sweep, "_free", lambda model: 0)
    assert batch_rows(lab.model, 50) == 1


# ---- what decides ----------------------------------------------------------------------------------------------------


def row(rate: float, extra: float, width: float = 0.0, way: str = "w", amount: str = "1rn") -> Row:
    nothing = Interval(0, 0, 0)
    wide = Interval(extra, extra - width / 2, extra + width / 2)
    points = score(rate, extra, 0, Limits())
    return Row(way, f"#1 += {amount}", amount, {"k": Interval(rate, 0, 1)}, wide, wide, nothing, nothing, points)


def test_the_best_row_is_sure_of_its_limit() -> None:
    close, sure = row(1.0, 1.4, width=0.8), row(0.7, 1.0, width=0.8)
    assert close.score > sure.score
    assert best([close, sure], Limits()) is sure
    assert best([close], Limits()) is close
    assert best([row(1.0, 1.6), row(0.0, 0.0)], Limits()) is None


def test_the_dose_is_chosen_on_calibration_prompts_alone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """On calibration prompts one strength is good, on the others another: the first is recommended all the same."""
    calls: list[tuple[list[str], list[str], list[int]]] = []

    def fake(lab, arms, on, draws, tokens, detectors, sampling=None, say=None, rows_at_once=None, prefixes=None):
        calls.append((list(arms), list(on), list(draws)))
        good = "0.2rn" if len(calls) < 3 else "0.6rn"
        return {
            arm: [
                Text(arm, p, s, "x", (1,), 2.0, 0, 0, {"keywords": arm.endswith(good)})
                for p in range(len(on))
                for s in draws
            ]
            for arm in ("plain", *arms)
        }

    monkeypatch.setattr(dosing, "write", fake)
    found = lab.dose("#3", keywords=["cat"], strengths=["0.2rn", "0.4rn", "0.6rn"], operations=["add"])
    assert found.chosen and found.chosen.edit == "#3 += 0.2rn"
    assert found.reported and found.reported.edit == "#3 += 0.2rn" and found.reported.rate.value == 0
    first, again, second = calls
    assert first[1] == again[1] and set(first[2]).isdisjoint(again[2]) and set(again[0]) < set(first[0])
    assert set(first[1]).isdisjoint(second[1]) and set(first[2] + again[2]).isdisjoint(second[2])
    assert second[1] == list(prompts.REPORT)
    # Each baseline comes to the report at its own best calibration strength, and the prefix as it is.
    assert [name for name in second[0] if "orthogonal" in name] == ["orthogonal (Neuronpedia): (along #3) = 0.2rn"]
    assert lab.settled("#3 += auto")[0].amount == Amount.parse("0.2rn")


def test_prompts_reported_on_are_not_calibrated_on(lab: Lab) -> None:
    assert set(prompts.CALIBRATION).isdisjoint(prompts.REPORT)
    assert len(prompts.CALIBRATION) == len(prompts.REPORT) == 10
    with pytest.raises(UsageError, match="no calibration prompt is left"):
        lab.dose("#3", ["The cat"], keywords=["cat"], calibration=["The cat"])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "nothing to dose"),
        ({"target": "#3", "keywords": [" "]}, "empty entry"),
        ({"target": "#3", "keywords": "cat"}, "must be a list"),
        ({"target": "#3", "strengths": ["auto"]}, "amounts such as"),
        ({"target": "#3", "operations": ["scale"]}, "add or set"),
        ({"target": "#3", "seeds": 0}, "seeds must be at least 1"),
        ({"target": "#99"}, "#0 to #63"),
    ],
)
def test_wrong_requests_are_told(lab: Lab, how: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        lab.dose(**how)


# ---- auto ------------------------------------------------------------------------------------------------------------


def test_doses_read_and_write() -> None:
    both = parse("0.45rn; = 3x")
    assert both == {"+=": Amount(0.45, "rn"), "=": Amount(3, "x")}
    assert written(both) == "0.45rn; = 3x"
    assert parse(written({"=": Amount(-4)})) == {"=": Amount(-4)}
    assert parse("") == {}
    with pytest.raises(UsageError):
        parse("auto")


def test_auto_stands_for_the_dose_and_refuses_where_there_is_none(lab: Lab) -> None:
    from lancet import naming

    lab.name("cat", "#3")
    lab.name("pets", [(3, 1.0), (4, 2.0)])
    sae = lab.sae()
    with pytest.raises(UsageError, match=r"no dose of cat is known for \+=; find it with `lancet dose 'cat'`"):
        lab.generate("The cat", "cat += auto", tokens=2)
    naming.keep_dose(sae, "cat", "0.3rn")
    naming.keep_dose(sae, "pets", "0.4rn; = 0.2rn")
    for text, meant in (
        ("cat += auto", "cat += 0.3rn"),
        ("#3 += auto @ generated", "#3 += 0.3rn @ generated"),
        ("pets = auto", "pets = 0.2rn"),
    ):
        made = lab.generate("The cat", text, tokens=4)
        assert made.edits == (meant,)
        assert made.ids == lab.generate("The cat", meant, tokens=4).ids
    with pytest.raises(UsageError, match=r"for =; write cat \+= auto"):
        lab.settled("cat = auto")
    for wrong in ("cat *= auto", "#3 += 1 @ where cat > auto"):
        with pytest.raises(UsageError):
            lab.generate("The cat", wrong, tokens=2)
    lab.name("cat", "#5", force=True)
    with pytest.raises(UsageError, match="no dose"):  # the dose was another feature's
        lab.settled("cat += auto")


# ---- blends and baselines --------------------------------------------------------------------------------------------


@pytest.fixture
def neutral(monkeypatch: pytest.MonkeyPatch) -> None:
    from lancet import background

    texts = [
        f"{a} {b} sat on the mat and the dog, some other animal, sat on the cat {c}"
        for a in "abc"
        for b in "de"
        for c in "fghi"
    ]
    monkeypatch.setattr(background, "neutral_sentences", lambda count=0: texts)


def test_the_fit_descends_its_own_loss(lab: Lab, neutral: None) -> None:
    """Against the loss written out by hand, and: what it fits makes the words likelier."""
    contexts, sae = Contexts(lab, lab.sae()), lab.sae()
    words = Words(torch.tensor([40, 41]), torch.tensor([1.0, 0.5]))
    which = contexts.parts()[0]

    def by_hand(vector: torch.Tensor) -> float:
        total, surprise = [], []
        plain_entropy = []
        for row in contexts.ids.tolist():
            tokens = lab.tokenize("x")
            tokens = replace(
                tokens, ids=tuple(row), spans=((0, 0),) * len(row), roles=("start",) + ("text",) * (len(row) - 1)
            )
            plain = logits(lab.model, [tokens], [{}])[0, 1:].log_softmax(-1)
            plain_entropy.append(-(plain.exp() * plain).sum(-1).mean())
            if row not in contexts.ids[which].tolist():
                continue
            change: dict = {}
            if float(vector.norm()):
                edit = Edit(Direction(sae.writes, vector, "v"), "add", Amount(1.0))  # type: ignore[arg-type]
                change = lab.changes(edit, tokens, len(row))
                assert all(isinstance(c, RowChange) for c in change.values())
            told = logits(lab.model, [tokens], [change])[0, 1:].log_softmax(-1)
            p = told[:, 40].exp() + 0.5 * told[:, 41].exp()
            total.append(-(1 - (1 - p).prod()).log())
            surprise.append(-(told.exp() * plain).sum(-1).mean())
        return float(
            torch.stack(total).mean() + PRICE * (torch.stack(surprise).mean() - torch.stack(plain_entropy).mean())
        )

    vector = torch.randn(lab.model.d_model, generator=torch.Generator().manual_seed(0))
    for v in (torch.zeros_like(vector), vector):
        assert float(contexts.loss(v, words, which).detach()) == pytest.approx(by_hand(v), abs=2e-3)
    asked = phrases(lab, ["cat"])
    start = torch.randn(lab.model.d_model, generator=torch.Generator().manual_seed(2))
    parts = fit(lab, sae, start, asked, most=5)
    assert 1 <= len(parts) <= 5
    made = sum(weight * sae.rows(torch.tensor([i]))[0] for i, weight in parts)
    assert isinstance(made, torch.Tensor)
    wanted = contexts.shares(asked, made)
    start = start / start.norm() * 0.35 * lab.facts().norm
    every = torch.arange(len(contexts.ids))
    assert contexts.loss(made, wanted, every) < contexts.loss(start, wanted, every) - 0.05


def test_matching_pursuit_equals_scikit_learn(lab: Lab) -> None:
    from sklearn.linear_model import orthogonal_mp

    sae, vector = lab.sae(), torch.randn(lab.model.d_model, generator=torch.Generator().manual_seed(3))
    unit = torch.nn.functional.normalize(sae.rows(slice(0, sae.d_sae)).float(), dim=1)
    theirs = torch.as_tensor(orthogonal_mp(unit.t().double().numpy(), vector.double().numpy(), n_nonzero_coefs=7))
    features, weights = pursue(sae, vector, 7)
    ours = torch.zeros(sae.d_sae, dtype=torch.double).index_put((features,), weights.double())
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_the_likelihood_gradient_equals_finite_differences(lab: Lab) -> None:
    rows = [lab.tokenize(text) for text in PROMPTS]
    found = gradient(lab, lab.sae(), rows)
    vector = torch.randn(lab.model.d_model, generator=torch.Generator().manual_seed(1))
    vector /= vector.norm()

    def likelihood(amount: float) -> float:
        total, count = 0.0, 0
        for tokens in rows:
            edit = Edit(Direction(lab.sae().writes, vector, "v"), "add", Amount(amount))  # type: ignore[arg-type]
            told = lab.logits(tokens, edit if amount else None).double().log_softmax(-1)
            total += float(told[:-1].gather(1, torch.tensor(tokens.ids)[1:, None]).sum())
            count += len(tokens) - 1
        return total / count

    assert float(found @ vector) == pytest.approx((likelihood(0.02) - likelihood(-0.02)) / 0.04, rel=0.02, abs=1e-4)


def test_the_curve_is_drawn(lab: Lab, tmp_path: Path) -> None:
    how = {"keywords": ["the", "a", "e"], "strengths": ["0.2rn", "0.5rn"], "tokens": 4, "report_seeds": 1}
    found = lab.dose("#3", PROMPTS[:1], calibration=PROMPTS[1:], **how)
    assert found.plot(tmp_path / "dose.png").stat().st_size > 1000
    blend = " + ".join(f"{i + 1} * #{i}" for i in range(24))  # its picture is as wide as any other
    long = lab.dose(blend, PROMPTS[:1], calibration=PROMPTS[1:], **how)
    widths = [
        int.from_bytes(drawn.plot(tmp_path / "wide.png").read_bytes()[16:20], "big")  # where a PNG says it
        for drawn in (found, long)
    ]
    assert widths[1] < 1.5 * widths[0]
    told = json.loads(json.dumps(found.to_json()))
    assert next(r["way"] for r in told["report"]) == "plain"
    assert len(found.to_frame()) == len(found.calibration) + len(found.report)
    assert str(found).startswith("#3: ")
