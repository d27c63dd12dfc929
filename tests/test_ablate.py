"""Ablations against plain loops: distributions, losses and rankings one pass at a time, controls in number and length,
conditions cached and uncached, and directions removed by hand from every block's output."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures_edits import GREEDY, generated, longer, random_lab
from torch import Tensor

from lancet.ablate import kl
from lancet.algebra import Direction
from lancet.cli.ablate import run, verdict
from lancet.controls import activity, draw, matched
from lancet.cut import Cut
from lancet.edit import Edit
from lancet.errors import UsageError
from lancet.forced import answer_losses
from lancet.grammar import parse_edit, parse_span
from lancet.lab import Lab
from lancet.model import Model
from lancet.sae import random_sae
from lancet.site import Site
from lancet.span import Condition, Gate, Span

TEXT = "The dog sat on the mat and the cat"


@pytest.fixture(scope="module")
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2()


@pytest.fixture(scope="module")
def lab(model: Model) -> Lab:
    return random_lab(model, "jumprelu", d_sae=256)


def strongest(lab: Lab, count: int, text: str = TEXT) -> list[int]:
    """The features that fire most often in a text."""
    return lab.read(text).features.feature.bincount(minlength=256).topk(count).indices.tolist()


def by_hand(lab: Lab, edits: Any, text: str = TEXT) -> tuple[Tensor, float]:
    """Next-token log-probabilities and the loss, from one uncached pass of `Lab.logits`."""
    tokens = lab.tokenize(text)
    chance = lab.logits(tokens, edits).log_softmax(-1)
    loss = [-float(chance[p, tokens.ids[p + 1]]) for p in range(len(tokens) - 1)]
    return chance[-1], sum(loss) / len(loss)


# ---- one ablation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", ["all", "-3:", "last", "generated", "where #{0} > 0.5"])
@pytest.mark.parametrize("to", [0, "-2"])
def test_numbers_against_single_passes(lab: Lab, span: str, to: Any) -> None:
    a, b, c = strongest(lab, 3)
    span = span.format(c)
    found = lab.ablate(TEXT, [a, f"#{b}"], to=to, span=span, controls=0, tokens=6, sampling=GREEDY)
    edits = [f"#{a} = {to} @ {span}", f"#{b} = {to} @ {span}"]
    assert found.what == tuple(str(parse_edit(edit)) for edit in edits)
    before, loss_before = by_hand(lab, None)
    after, loss_after = by_hand(lab, edits)
    divergence = sum(float(p.exp() * (p - q)) for p, q in zip(before, after, strict=True))
    assert found.cut.kl == pytest.approx(divergence, abs=1e-5)
    assert (found.plain.loss, found.cut.loss) == pytest.approx((loss_before, loss_after), abs=1e-5)
    assert found.plain.kl == 0
    change = after.exp() - before.exp()
    for movers, sign in ((found.up, 1), (found.down, -1)):
        expected = (sign * change).topk(10)
        got = [sign * (m.after - m.before) for m in movers]
        assert got == pytest.approx(expected.values.tolist(), abs=1e-5)
        first = int(expected.indices[0])
        assert movers[0].token == lab.model.decode([first])
        assert movers[0].before == pytest.approx(float(before[first].exp()), abs=1e-5)
    assert found.likeliest[0].token == lab.model.decode([int(before.argmax())])
    assert found.continuations["plain"].ids == lab.generate(TEXT, None, 6, GREEDY).ids
    assert found.continuations["cut"].ids == lab.generate(TEXT, edits, 6, GREEDY).ids


def test_surprise_is_the_plain_models(lab: Lab) -> None:
    feature = strongest(lab, 1)
    found = lab.ablate(TEXT, feature, to=-8, controls=1, tokens=5, sampling=GREEDY)
    for damage, name in ((found.plain, "plain"), (found.cut, "cut"), (found.controls[0], "control")):
        ids = found.continuations[name].ids
        tokens = longer(lab.tokenize(TEXT), ids)
        chance = lab.logits(tokens).log_softmax(-1)
        begin = len(tokens) - len(ids)
        loss = [-float(chance[p - 1, tokens.ids[p]]) for p in range(begin, len(tokens))]
        assert damage.surprise == pytest.approx(sum(loss) / len(loss), abs=1e-4)


def test_answers_of_many_lengths(lab: Lab) -> None:
    prompts = [lab.tokenize(text) for text in (TEXT, "a", "the dog sat")]
    answers = [[5, 6, 7], [9], []]
    changes = [lab.changes("#3 += 4", prompt, len(prompt) + 3) for prompt in prompts]
    got = answer_losses(lab.model, prompts, answers, changes)
    for row, prompt, answer in zip(got, prompts, answers, strict=True):
        whole = longer(prompt, answer)
        chance = lab.logits(whole, "#3 += 4").log_softmax(-1)
        expected = [-float(chance[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]
        assert row[: len(answer)].tolist() == pytest.approx(expected, abs=1e-4)
        assert bool(row[len(answer) :].isnan().all())


def test_results_are_json_and_a_frame(lab: Lab) -> None:
    found = lab.ablate(TEXT, strongest(lab, 2), controls=3, tokens=0)
    told = json.loads(json.dumps(found.to_json()))
    assert told["cut"]["surprise"] is None and told["continuations"] == []
    assert len(told["controls"]) == 3
    assert len(found.to_frame()) == 5
    assert str(found).startswith("without #")
    assert 0 <= told["stands_out"] <= 3


def test_what_cannot_be_cut(lab: Lab) -> None:
    for how, message in (
        ({"targets": []}, "nothing to cut"),
        ({"targets": [3], "to": "1rn", "everywhere": True}, "leave out the amount"),
        ({"targets": [3], "span": "where #2 > 0", "everywhere": True}, "has no condition"),
        ({"targets": [3, 3], "everywhere": True}, "name each only once"),
        ({"targets": [9999]}, "9999"),
        ({"targets": [3], "controls": -1}, "at least 0"),
        ({"targets": ["#3 - #3"]}, "zero vector"),
        ({"targets": [3], "span": "nowhere"}, "no span nowhere"),
    ):
        with pytest.raises(UsageError, match=message):
            lab.ablate(TEXT, **how)


# ---- controls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [0, -3])
@pytest.mark.parametrize("everywhere", [False, True])
def test_controls_move_as_far_as_the_ablation(lab: Lab, to: float, everywhere: bool) -> None:
    if everywhere and to:
        return
    tokens = lab.tokenize(TEXT)
    cut = Cut.of(lab, strongest(lab, 2), tokens, len(tokens), to, "all", everywhere)
    found = activity(lab.model, lab.sae(), [tokens], [cut.mask])
    generator = torch.Generator().manual_seed(1)
    others = [draw(found, t, generator, cut.found[0][1:] + cut.found[1][1:]) for t in (1, 2)]  # type: ignore[index]
    control = matched(cut.instead([(lab.sae(), f) for f in others], [f"#{f}" for f in others]).changes(), cut.changes())
    x = torch.randn(len(tokens), lab.model.d_model, generator=generator) * 2
    positions = torch.arange(len(tokens))
    for site, real in cut.changes().items():
        inside = positions[1:]
        length = (real.new_value(x[1:], inside) - x[1:]).norm(dim=-1)
        moved = control[site].new_value(x[1:], inside) - x[1:]
        assert torch.allclose(moved.norm(dim=-1), length, rtol=1e-4, atol=1e-5)
        assert float(length.max()) > 0.1
        own = cut.instead([(lab.sae(), f) for f in others], ["", ""]).changes()[site].new_value(x[1:], inside) - x[1:]
        lit = own.norm(dim=-1) > 1e-3
        cosine = torch.nn.functional.cosine_similarity(own[lit], moved[lit])
        assert torch.allclose(cosine, torch.ones_like(cosine)[: len(cosine)] * (length[lit] > 0), atol=1e-3)


def test_controls_are_as_many_and_as_active(lab: Lab) -> None:
    targets = strongest(lab, 3)
    found = lab.ablate(TEXT, targets, controls=8, tokens=0)
    tokens = lab.tokenize(TEXT)
    values = lab.read(TEXT).features.dense()[1:]
    names = [damage.features for damage in found.controls]
    assert len(set(names)) > 1
    mass = values.sum(0)
    for damage in found.controls:
        drawn = [int(name[1:]) for name in damage.features]
        assert len(set(drawn)) == 3 and not set(drawn) & set(targets)
        for feature, told in zip(drawn, damage.activity, strict=True):
            assert told == pytest.approx(float(mass[feature]) / (len(tokens) - 1), rel=1e-4)
        for feature, target in zip(drawn, targets, strict=True):
            others = [f for f in range(256) if f not in targets and mass[f] > 0]
            nearer = [
                f
                for f in others
                if abs(mass[f].log() - mass[target].log()) < abs(mass[feature].log() - mass[target].log())
            ]
            assert len(nearer) < 20 + 2  # of the 20 nearest, but for those that were drawn before


def test_a_silent_feature_has_silent_controls(lab: Lab) -> None:
    mass = lab.read(TEXT).features.dense()[1:].sum(0)
    silent = int((mass == 0).nonzero()[0, 0])
    found = lab.ablate(TEXT, silent, to=-3, controls=4, tokens=0)
    for damage in found.controls:
        assert float(mass[int(damage.features[0][1:])]) == 0
        assert damage.kl > 0
    nothing = lab.ablate(TEXT, silent, to=0, controls=2, tokens=0)
    assert nothing.cut.kl < 1e-6 and all(damage.kl < 1e-6 for damage in nothing.controls)


def test_controls_written_cached_equal_uncached(lab: Lab) -> None:
    tokens = lab.tokenize(TEXT)
    cut = Cut.of(lab, strongest(lab, 2), tokens, len(tokens) + 6, -2, "all")
    other = cut.instead([(lab.sae(), 5), (lab.sae(), 9)], ["#5", "#9"])
    changes = matched(other.changes(), cut.changes())
    ids, cached = generated(lab.model, [tokens], [changes], 6)
    from lancet.generate import logits

    whole = logits(lab.model, [longer(tokens, ids[0][:-1])], [changes])[0, len(tokens) - 1 :]
    assert float((whole - cached[0]).abs().max()) <= 1e-4 * float(whole.abs().max())


def test_a_direction_has_directions_as_controls(lab: Lab) -> None:
    a, b, _ = strongest(lab, 3)
    found = lab.ablate(TEXT, [f"#{a} - #{b}"], controls=3, tokens=0)
    assert found.cut.activity == (None,)
    assert found.what == (f"(#{a} - #{b}) = 0",)
    made = lab.ablate(TEXT, lab.direction(f"#{a} - #{b}"), controls=0, tokens=0)
    assert made.cut.kl == pytest.approx(found.cut.kl, rel=1e-5)


def test_the_verdict(lab: Lab) -> None:
    found = lab.ablate(TEXT, strongest(lab, 1), controls=2, tokens=0)
    weak = [dataclasses.replace(d, kl=0.0) for d in found.controls]
    strong = [dataclasses.replace(d, kl=1e6) for d in found.controls]
    assert "an effect" in verdict(dataclasses.replace(found, controls=weak))
    assert "no more than damage" in verdict(dataclasses.replace(found, controls=strong))
    assert "not known" in verdict(dataclasses.replace(found, controls=[]))


# ---- a removal at every layer ----------------------------------------------------------------------------------------


def test_a_removal_at_every_layer_against_a_plain_loop(lab: Lab) -> None:
    a, b = strongest(lab, 2)
    rows = torch.stack([lab.direction(f"#{f}").vector for f in (a, b)])
    projector = rows.t() @ torch.linalg.pinv(rows.t())  # not orthogonal to each other
    tokens = lab.tokenize(TEXT)
    handles, seen = [], []

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        new = x - x @ projector
        new[:, 0] = x[:, 0]  # the start token is left alone
        seen.append(new)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handles = [block.register_forward_hook(hook) for block in lab.model.hf.transformer.h]  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            chance = lab.model.hf(torch.tensor([tokens.ids])).logits[0].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == lab.model.n_layers
    found = lab.ablate(TEXT, [a, b], everywhere=True, controls=2, tokens=4)
    plain, _ = by_hand(lab, None)
    assert found.cut.kl == pytest.approx(float(kl(plain, chance[-1])), rel=1e-3)
    loss = [-float(chance[p, tokens.ids[p + 1]]) for p in range(len(tokens) - 1)]
    assert found.cut.loss == pytest.approx(sum(loss) / len(loss), abs=1e-4)
    assert "out of every block" in found.what[0]
    value = lab.model.values(lab.model.batch([tokens]), [Site(2, "resid_post")])
    assert float((value[Site(2, "resid_post")][0, 1:] @ rows.t()).abs().max()) > 0.1  # there was something to remove
    assert max(float((x[0, 1:] @ rows.t()).abs().max()) for x in seen) < 1e-3


# ---- one at a time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [None, "mat"])
@pytest.mark.parametrize("to", [0, -1])
def test_each_against_one_by_one(lab: Lab, at: str | None, to: float) -> None:
    ranking = lab.ablate_each(TEXT, at, to=to)
    tokens = lab.tokenize(TEXT)
    positions = list(ranking.spot.positions)
    place = max(positions)
    lit = lab.read(TEXT).features.dense()[positions].amax(0)
    assert {part.feature for part in ranking.parts} == set(lit.nonzero()[:, 0].tolist())
    before = lab.logits(tokens).log_softmax(-1)
    found = []
    for part in ranking.parts:
        where = ", ".join(map(str, positions))
        after = lab.logits(tokens, f"#{part.feature} = {to} @ {where}").log_softmax(-1)
        near, far = (float((before[p].exp() * (before[p] - after[p])).sum()) for p in (place, -1))
        assert part.kl == pytest.approx(near, abs=1e-4)
        assert part.kl_end == pytest.approx(far, abs=1e-4)
        assert part.value == pytest.approx(float(lit[part.feature]), rel=1e-4)
        change = after[place].exp() - before[place].exp()
        assert part.up.after - part.up.before == pytest.approx(float(change.max()), abs=1e-5)
        assert part.down.after - part.down.before == pytest.approx(float(change.min()), abs=1e-5)
        found.append(near)
    assert [part.kl for part in ranking.parts] == sorted((part.kl for part in ranking.parts), reverse=True)
    assert max(found) > 1e-3
    told = json.loads(json.dumps(ranking.to_json()))
    assert [x["feature"] for x in told["features"]] == [part.feature for part in ranking.parts]
    assert len(ranking.to_frame()) == len(ranking.parts)


def test_each_shares_its_passes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = lab.model.forward
    monkeypatch.setattr(lab.model, "forward", lambda *a, **k: calls.append(a[0].shape) or forward(*a, **k))
    ranking = lab.ablate_each(TEXT)
    assert len(calls) <= 3 + -(-len(ranking.parts) // 64)  # reading, what comes before, and a row for each
    assert all(shape[1] == 1 for shape in calls if shape[0] > 1)


# ---- where another feature fires -------------------------------------------------------------------------------------


def test_conditions_are_read_and_written() -> None:
    edit = parse_edit("#3 = 0 @ where #77 > 5")
    assert edit.span == Span(where=Condition(parse_edit("#77 = 0").target, True, parse_edit("#1 = 5").amount))
    for text in ("#3 = 0 @ where #77 > 5", "#3 = 0 @ generated, 2 where (a - b) < 0.5x", "#3 = 0 @ where a > -2rn"):
        assert str(parse_edit(text)) == text
        assert parse_edit(str(parse_edit(text))) == parse_edit(text)
    assert parse_span("last where #1 > 0").parts == ("last",)
    for text, said in (
        ("#3 = 0 @ where", "where needs a condition"),
        ("#3 = 0 @ where #77", "> or <"),
        ("#3 = 0 @ where #77 = 5", "> or <"),
        ("#3 = 0 @ where #77 >= 5", "> or <"),
        ("#3 = 0 @ wherever", "no span wherever"),
        ("#3 = 0 @ where #77 > inf", "finite"),
    ):
        with pytest.raises(UsageError, match=said):
            parse_edit(text)


@pytest.mark.parametrize(
    "edit", ["#{0} = -4 @ where #{1} > {t}", "#{0} += 9 @ where #{1} < {t}", "#{0} += 9 @ 2: where (#{1} - #{2}) > 0.1"]
)
def test_conditions_hold_token_by_token(lab: Lab, edit: str) -> None:
    a, b, c = strongest(lab, 3)
    tokens = lab.tokenize(TEXT)
    x = lab.model.values(lab.model.batch([tokens]), [lab.sae().site])[lab.sae().site][0]
    activations = lab.sae().encode(x)
    threshold = float(activations[1:, b].median())
    edit = edit.format(a, b, c, t=f"{threshold:.4f}")
    change = lab.changes(edit, tokens, len(tokens))[lab.sae().site]
    positions = torch.arange(1, len(tokens))[change.any[1:]]
    moved = (change.new_value(x[positions], positions) - x[positions]).norm(dim=-1) > 0
    if "(" in edit:
        vector = lab.direction(f"#{b} - #{c}").vector
        expected = x[positions] @ vector / vector.square().sum() > 0.1
    else:
        fires = activations[positions, b]
        expected = fires > float(f"{threshold:.4f}") if ">" in edit else fires < float(f"{threshold:.4f}")
        if "= -4" not in edit:
            expected = expected.clone()
    assert moved.tolist() == expected.tolist()
    assert bool(moved.any()) and not bool(moved.all())


def without_condition(edit: str) -> Edit:
    parsed = parse_edit(edit)
    return dataclasses.replace(parsed, span=dataclasses.replace(parsed.span, where=None))


@pytest.mark.parametrize("keep_error", [True, False])
def test_conditions_cached_equal_uncached(model: Model, keep_error: bool) -> None:
    from lancet.generate import logits

    saes = [random_sae(model.d_model, 128, "jumprelu", site=Site(layer), seed=layer) for layer in (1, 2)]
    lab = Lab(model, saes)
    tokens = lab.tokenize(TEXT)
    forced = list(lab.tokenize("a return of the dog, of values").ids[1:13])
    text = longer(tokens, forced[:-1])
    dense = [lab.read(text, sae=str(sae.site)).features.dense()[len(tokens) :] for sae in saes]
    b, a = (part.std(0).argsort(descending=True).tolist() for part in dense)  # those that change from token to token
    middle = [part.median(0).values.tolist() for part in dense]
    early, late = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
    for edit in (
        f"{late}#{a[3]} += 6 @ where {early}#{b[0]} > {middle[0][b[0]]:.3f}",
        f"{early}#{b[3]} += 6 @ where {early}#{b[1]} > {middle[0][b[1]]:.3f}",
        f"{late}#{a[0]} = -9 @ generated where {late}#{a[1]} < {middle[1][a[1]]:.3f}",
    ):
        changes = lab.changes(edit, tokens, len(tokens) + 12, keep_error)
        _, cached = generated(model, [tokens], [changes], 12, [forced])
        whole, never, every = (
            logits(model, [text], [change])[0, len(tokens) - 1 :]
            for change in (
                changes,
                {},
                lab.changes(without_condition(edit), tokens, len(tokens) + 12, keep_error),
            )
        )
        assert float((whole - cached[0]).abs().max()) <= 1e-4 * float(whole.abs().max())
        assert not torch.allclose(whole, never, atol=1e-3) and not torch.allclose(whole, every, atol=1e-3)


def test_a_condition_sees_the_unedited_value(model: Model) -> None:
    """An edit at the condition's own site, at the same tokens, changes nothing of what it decides there."""
    from lancet.generate import logits

    saes = [random_sae(model.d_model, 128, "jumprelu", site=Site(layer), seed=layer) for layer in (1, 2)]
    lab = Lab(model, saes)
    b = (
        lab.read(TEXT, sae="blocks.1.hook_resid_pre")
        .features.feature.bincount(minlength=128)
        .topk(1)
        .indices.tolist()[0]
    )
    gated = f"blocks.2.hook_resid_pre#3 += 9 @ -2 where blocks.1.hook_resid_pre#{b} > 0.05"
    off = f"blocks.1.hook_resid_pre#{b} = -5 @ -2"
    tokens = lab.tokenize(TEXT)
    both = logits(model, [tokens], [lab.changes([off, gated], tokens, len(tokens))])[0, -2:]
    open_ = logits(model, [tokens], [lab.changes([off, "blocks.2.hook_resid_pre#3 += 9 @ -2"], tokens, len(tokens))])[
        0, -2:
    ]
    shut = logits(model, [tokens], [lab.changes([off], tokens, len(tokens))])[0, -2:]
    fires = bool(lab.read(TEXT, sae="blocks.1.hook_resid_pre").features.dense()[-2, b] > 0.05)
    assert torch.equal(both, open_ if fires else shut)
    assert not torch.equal(open_, shut)


def test_conditions_that_cannot_be(model: Model) -> None:
    saes = [random_sae(model.d_model, 64, kind, site=Site(layer)) for layer, kind in ((1, "standard"), (2, "temporal"))]
    lab = Lab(model, saes)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="computed after it"):
        lab.logits(
            TEXT, "blocks.1.hook_resid_pre#3 = 0 @ where (blocks.2.hook_resid_pre#3 - blocks.2.hook_resid_pre#4) > 1"
        )
    with pytest.raises(UsageError, match="depends on the tokens before"):
        lab.logits(TEXT, "blocks.2.hook_resid_pre#3 += 1 @ where blocks.2.hook_resid_pre#3 > 1")
    gate = Gate(Direction(Site(1), torch.ones(model.d_model), "d"), 0.0, True)
    assert gate.site == Site(1)


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Opened:
    """Stands for the options that say what is opened."""

    lab: Lab

    def open(self) -> Lab:
        return self.lab


def command(lab: Lab, features: list[str], **how: Any) -> None:
    settings: dict[str, Any] = {"each": False, "at": None, "span": "all", "to": "0", "everywhere": False, "controls": 2}
    settings |= {"tokens": 3, "chat": False, "top": 4, "sampling": GREEDY, "json": True} | how
    run(TEXT, features, choice=Opened(lab), **settings)  # type: ignore[arg-type]


def test_the_command_in_json(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = strongest(lab, 2)
    command(lab, [str(a), f"#{b}"], at="mat")
    told = json.loads(capsys.readouterr().out)
    tokens = lab.tokenize(TEXT)
    where = ", ".join(map(str, tokens.holding("mat")))
    assert told["what"] == [f"#{a} = 0 @ {where}", f"#{b} = 0 @ {where}"]
    after, _ = by_hand(lab, told["what"])
    before, _ = by_hand(lab, None)
    assert told["cut"]["kl"] == pytest.approx(float(kl(before, after)), abs=1e-5)
    command(lab, [str(a)], each=True, at="mat")
    (only,) = json.loads(capsys.readouterr().out)["features"]
    assert only["feature"] == a


def test_the_command_in_words(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = strongest(lab, 2)
    command(lab, [str(a), str(b)], json=False, to="-2")
    out = capsys.readouterr().out
    assert f"#{a}, #{b} = -2" in out and "control 2" in out and "of 2 controls" in out
    command(lab, [], json=False, each=True)
    assert "KL at the end" in capsys.readouterr().out


def test_the_command_refuses(lab: Lab) -> None:
    for features, how, message in (
        ([], {}, "name the features"),
        (["3"], {"span": "last", "at": "mat"}, "leave out one"),
        (["3"], {"each": True, "span": "last"}, "leave out --span"),
        (["3"], {"to": "much"}, "not an amount"),
        (["3"], {"top": 0}, "at least 1"),
        (["3"], {"at": "zebra"}, "does not occur"),
    ):
        with pytest.raises(UsageError, match=message):
            command(lab, features, **how)
