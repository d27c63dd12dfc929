"""Edits against numbers worked out by hand: an SAE of three features in four dimensions, spans as exact sets of
positions, units against known facts, and every request that must be refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_edits import GREEDY, with_facts
from torch import Tensor

from lancet.algebra import Direction
from lancet.edit import BatchEdits, Edit, RowChange, Span
from lancet.errors import UnknownName, UsageError
from lancet.generate import Sampling
from lancet.grammar import parse_edit
from lancet.lab import Lab
from lancet.model import Model
from lancet.sae import Sae
from lancet.site import Site
from lancet.tokens import Tokens
from lancet.units import Amount, size

# Feature #0 writes along the first axis with length 1, #1 along the second with length 2, #2 has length 5.
ROWS = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, 4]])
X = [2.0, 3.0, 1.0, 5.0]  # lights #0 with 2, #1 with 3 - 1 = 2, #2 with 5


HERE = Site(1)


def hand_sae(site: Site = HERE, **changes: Any) -> Sae:
    columns = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]])
    biases = torch.tensor([0.0, -1.0, 0.0])
    return dataclasses.replace(Sae("hand", site, "standard", columns, ROWS.clone(), torch.zeros(4), biases), **changes)


@pytest.fixture(scope="module")
def model(tiny_gpt2: Callable[..., Model]) -> Model:
    return tiny_gpt2(n_layer=3, n_embd=4, n_head=1)


@pytest.fixture
def lab(model: Model) -> Lab:
    return Lab(model, [hand_sae()])


def moved(lab: Lab, edits: Any, x: list[float] = X, keep_error: bool = True) -> list[float]:
    """What the edits make of one value; they cover position 2 of a text of 4 tokens."""
    tokens = Tokens("abc", (0, 5, 6, 7), ((0, 0), (0, 1), (1, 2), (2, 3)), ("start", "text", "text", "text"))
    changes = lab.changes(edits, tokens, 4, keep_error)
    change = next(iter(changes.values()))
    if not change:
        return x
    assert change.any[2]
    return [round(v, 4) for v in change.new_value(torch.tensor([x]), torch.tensor([2]))[0].tolist()]


# ---- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ("#1 += 3", [2, 9, 1, 5]),  # 3 * (0, 2, 0, 0)
        ("#1 += -3", [2, -3, 1, 5]),
        ("#1 = 7", [2, 13, 1, 5]),  # 2 -> 7
        ("#1 = 2", [2, 3, 1, 5]),  # it is 2
        ("#0 = -10", [-10, 3, 1, 5]),
        ("#2 = 0", [2, 3, -14, -15]),  # - 5 * (0, 0, 3, 4)
        ("#2 *= 0", [2, 3, -14, -15]),
        ("#2 *= 1.2", [2, 3, 4, 9]),  # 5 -> 6
        ("#0 *= -1", [-2, 3, 1, 5]),
        ("#0 >= 6", [6, 3, 1, 5]),
        ("#0 >= 1", [2, 3, 1, 5]),
        ("#1 <= 0.5", [2, 0, 1, 5]),
        ("#1 <= 2.5", [2, 3, 1, 5]),
        (["#0 += 1", "#0 *= 3"], [9, 3, 1, 5]),  # (2 + 1) * 3
        (["#0 *= 3", "#0 += 1"], [7, 3, 1, 5]),
        (["#0 = 9", "#0 <= 4"], [4, 3, 1, 5]),
        (["#0 += 1", "#1 = 7", "#2 *= 0"], [3, 13, -14, -15]),
        (["#0 += 1", "#0 += 2 @ 1"], [3, 3, 1, 5]),  # the second is elsewhere
        ([], [2, 3, 1, 5]),
    ],
    ids=str,
)
def test_operations(lab: Lab, edits: Any, expected: list[float]) -> None:
    assert (moved(lab, edits) if edits else X) == expected


def test_a_feature_that_is_off_can_be_set_and_pushed_below_zero(lab: Lab) -> None:
    off = [-8.0, 0.0, 0.0, 0.0]  # no feature fires: #0 reads -8, and is 0
    assert moved(lab, "#0 = 5", off) == [-3, 0, 0, 0]
    assert moved(lab, "#0 *= 9", off) == off
    assert moved(lab, "#0 <= -2", off) == [-10, 0, 0, 0]
    assert moved(lab, "#0 += -2", off) == [-10, 0, 0, 0]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ("#0 = 7", [7, 4, 15, 20]),  # 7 * #0 + 2 * #1 + 5 * #2, and nothing else
        ("#1 *= 0", [2, 0, 15, 20]),
        ("#0 += 1", [3, 4, 15, 20]),
    ],
)
def test_the_blunt_form(lab: Lab, edit: str, expected: list[float]) -> None:
    assert moved(lab, edit, keep_error=False) == expected


def test_the_blunt_form_adds_the_bias(model: Model) -> None:
    biased = hand_sae(b_dec=torch.tensor([1.0, 1, 1, 1]))  # reads (1, 2, 0, 4): #0 1, #1 1, #2 4
    assert moved(Lab(model, [biased]), "#0 = 7", keep_error=False) == [8, 3, 13, 17]
    assert moved(Lab(model, [biased]), "#0 = 7") == [8, 3, 1, 5]


def test_a_centred_sae_leaves_the_mean(model: Model) -> None:
    centred = Lab(model, [hand_sae(centred=True)])  # the mean of X is 2.75: reads (-0.75, 0.25, -1.75, 2.25)
    assert moved(centred, "#2 = 0") == [2, 3, 1 - 2.25 * 3, 5 - 2.25 * 4]
    assert moved(centred, "#2 = 1", keep_error=False) == [2.75, 2.75, 5.75, 6.75]


def test_the_blunt_form_needs_one_sae(lab: Lab) -> None:
    for edits in ("(#0 - #1) += 1", ["#0 = 1", "(#0 - #1) += 1"]):
        with pytest.raises(UsageError, match="edit features of one SAE only"):
            lab.logits("abc", edits, keep_error=False)


# ---- directions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "expected"),
    [  # v = #0 - #1 = (1, -2, 0, 0); X . v / v . v = -4 / 5
        ("(#0 - #1) += 2", [4, -1, 1, 5]),
        ("(#0 - #1) = 2", [4.8, -2.6, 1, 5]),
        ("(#0 - #1) = 0", [2.8, 1.4, 1, 5]),
        ("(#0 - #1) *= 0", [2.8, 1.4, 1, 5]),
        ("(#0 - #1) *= 2", [1.2, 4.6, 1, 5]),
        ("(#0 - #1) >= 1", [3.8, -0.6, 1, 5]),
        ("(#0 - #1) >= -1", [2, 3, 1, 5]),
        ("(#0 - #1) <= -1.8", [1, 5, 1, 5]),
        ("unit(#2) += 10", [2, 3, 7, 13]),  # (0, 0, 0.6, 0.8)
        ("without(#0 + #1, #1) += 3", [5, 3, 1, 5]),
        ("(0.5 * #1 + #0 / 2) += 4", [4, 7, 1, 5]),
        ("-#0 += 3", [-1, 3, 1, 5]),
        (["(#0 - #1) += 2", "#0 = 7"], [9, -1, 1, 5]),  # both read the same value
    ],
    ids=str,
)
def test_directions(lab: Lab, edit: Any, expected: list[float]) -> None:
    assert moved(lab, edit) == expected


def test_setting_a_direction_sets_its_coordinate(lab: Lab) -> None:
    lab.name("love", 0)
    lab.name("romance", "#1")
    v = lab.direction("love - romance").vector
    x = torch.tensor(moved(lab, "(love - romance) = 1.5"))
    assert float(x @ v / (v @ v)) == pytest.approx(1.5, abs=1e-4)
    assert moved(lab, "love = 7") == [7, 3, 1, 5]


def test_recipes_of_directions_make_them_again(lab: Lab) -> None:
    d = lab.direction
    for made in (d("#0") - d("#1"), 2 * d("#0") / 4, -d("#2").unit(), (d("#0") + d("#1")).without(d("#0"))):
        assert torch.allclose(d(made.recipe).vector, made.vector)
    assert d("#0").cosine(d("#0 + #1")) == pytest.approx(1 / 5**0.5)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("2 * 3", "is a number, not a direction"),
        ("#0 * #1", "a direction \\* a direction has no meaning"),
        ("1 / #0", "a number / a direction has no meaning"),
        ("#0 + 1", "a direction \\+ a number has no meaning"),
        ("#0 / 0", "divided by zero"),
        ("#0 * (1 / 0)", "division by zero"),
        ("unit(#0 - #0)", "points nowhere"),
        ("without(#0, #1 - #1)", "points nowhere"),
    ],
)
def test_expressions_without_meaning(lab: Lab, expression: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        lab.direction(expression)


@pytest.mark.parametrize("sign", ["+=", "=", "*=", ">=", "<="])
@pytest.mark.parametrize("amount", ["3", "-1"])
def test_the_zero_vector_is_no_target(lab: Lab, sign: str, amount: str) -> None:
    with pytest.raises(UsageError, match="points nowhere"):
        lab.logits("abc", f"(#0 - #0) {sign} {amount}")


# ---- units -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def known(lab: Lab, tmp_path: Path) -> Lab:
    """The hand-made SAE with maxima 8, 0 (it never fired) and 2.5, and a typical norm of 50."""
    return with_facts(lab, tmp_path / "facts.safetensors", [8, 0, 2.5], 50.0)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ("#0 += 2x", [18, 3, 1, 5]),
        ("#0 = 0.5x", [4, 3, 1, 5]),
        ("#0 >= 0.5x", [4, 3, 1, 5]),
        ("#0 <= 0.125x", [1, 3, 1, 5]),
        ("#0 += -1x", [-6, 3, 1, 5]),
        ("#0 += 0.5rn", [27, 3, 1, 5]),  # what is added has length 25
        ("#1 += 0.5rn", [2, 28, 1, 5]),
        ("#2 += 0.5rn", [2, 3, 16, 25]),
        ("(#0 + #0) += 0.5rn", [27, 3, 1, 5]),
        ("(2 * #2) += -0.1rn", [2, 3, -2, 1]),
        ("#2 = 0.1rn", [2, 3, 1 - 4 * 3, 5 - 4 * 4]),  # an activation of 1 writes the length 5
    ],
)
def test_units(known: Lab, edit: str, expected: list[float]) -> None:
    assert moved(known, edit) == expected


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_rn_is_a_length_for_saes_that_normalise_tokens_too(model: Model, tmp_path: Path, normalize: str) -> None:
    """At a token whose norm is the typical one, and whose mean is 0, `0.5rn` moves the value by half of that norm."""
    sae = hand_sae(normalize=normalize, apply_b_dec_to_input=False)
    lab = with_facts(Lab(model, [sae]), tmp_path / "facts.safetensors", [8, 8, 8], 10.0)
    x = [5.0, -5.0, 5.0, -5.0]
    for edit, axis in (("#0 += 0.5rn", [1.0, 0, 0, 0]), ("#2 += 0.5rn", [0, 0, 0.6, 0.8])):
        change = torch.tensor(moved(lab, edit, x)) - torch.tensor(x)
        spread = 4 / 3 if normalize == "layer_norm" else 1  # std divides by n - 1
        assert torch.allclose(change, torch.tensor(axis) * 5 * spread**0.5, atol=1e-3)


def test_rn_for_decoder_norm_activations(model: Model, tmp_path: Path) -> None:
    sae = hand_sae(architecture="topk", k=3, rescale_by_decoder_norm=True)
    lab = with_facts(Lab(model, [sae]), tmp_path / "facts.safetensors", [8, 8, 8], 50.0)
    assert moved(lab, "#2 += 0.5rn") == [2, 3, 16, 25]
    assert moved(lab, "#2 += 5") == [2, 3, 4, 9]  # a unit of activation writes (0, 0, 0.6, 0.8)


@pytest.mark.parametrize("target", ["#1", "(#0 - #2)", "unit(#0)"])
def test_x_without_a_known_maximum(known: Lab, target: str) -> None:
    with pytest.raises(
        UsageError, match=r"2x needs the target's maximum activation, .* give a raw amount or one in rn"
    ):
        known.changes(f"{target} += 2x", known.tokenize("abc"), 4)


def test_scale_takes_no_unit() -> None:
    for amount in ("2x", "0.5rn"):
        with pytest.raises(UsageError, match=f"takes a plain factor, got {amount}"):
            Edit.parse(f"#0 *= {amount}")


@pytest.mark.parametrize("amount", ["inf", "-inf", "+inf", "infinity", "-Infinity", "nan", "NaN", "1e999", "-1e400x"])
def test_infinite_amounts_are_refused(amount: str) -> None:
    with pytest.raises(UsageError, match="finite number") as caught:
        Edit.parse(f"#0 += {amount}")
    assert "switch a feature off write `= 0`" in str(caught.value)
    assert "finite negative number" in str(caught.value)
    with pytest.raises(UsageError, match="write `= 0`"):
        Amount(float("nan"))


@pytest.mark.parametrize("amount", ["", "many", "2y", "0.5 r n", "x", "--3", "1,5"])
def test_what_is_not_an_amount(amount: str) -> None:
    with pytest.raises(UsageError, match="is not an amount; write a number, 2x"):
        Amount.parse(amount)


def test_an_amount_that_breaks_the_model_is_told(lab: Lab) -> None:
    for amount in ("1e38", "1e300"):
        with pytest.raises(UsageError, match="smaller amount"):
            lab.generate("abc", ["#0 += " + amount, "#2 += -" + amount], tokens=2, sampling=GREEDY)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", None), ("2GB", 2_000_000_000), ("1.5 GiB", 1610612736), ("500mb", 500_000_000), ("0", 0), ("12k", 12000)],
)
def test_sizes(text: str, expected: int | None) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 cups", "1e9", "2PB"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size; write auto, or a size such as 2GB"):
        size(text)


# ---- spans -----------------------------------------------------------------------------------------------------------

PLAIN = Tokens("abcde", (0, 5, 6, 7, 8, 9), ((0, 0),) * 6, ("start", *["text"] * 5))
CHAT_ROLES = ("start", "system", "marker", "user", "user", "marker", "assistant", "marker", "user", "marker")
CHAT = Tokens("", tuple(range(10)), ((0, 0),) * 10, CHAT_ROLES)


@pytest.mark.parametrize(
    ("span", "expected"),
    [  # a prompt of 6 tokens, 4 more to be generated
        ("all", {1, 2, 3, 4, 5, 6, 7, 8, 9}),
        ("prompt", {1, 2, 3, 4, 5}),
        ("generated", {5, 6, 7, 8, 9}),
        ("last", {5}),
        ("0", {0}),
        ("3", {3}),
        ("7", {7}),
        ("10", set()),
        ("500", set()),
        ("-1", {5}),
        ("-6", {0}),
        ("-7", set()),
        ("2:4", {2, 3}),
        ("4:2", set()),
        (":3", {1, 2}),
        ("0:3", {0, 1, 2}),
        ("0:", set(range(10))),
        (":", {1, 2, 3, 4, 5, 6, 7, 8, 9}),
        ("8:", {8, 9}),
        ("8:500", {8, 9}),
        ("500:", set()),
        ("-2:", {4, 5, 6, 7, 8, 9}),
        (":-2", {1, 2, 3}),
        ("-4:-1", {2, 3, 4}),
        ("-100:", {1, 2, 3, 4, 5, 6, 7, 8, 9}),  # runs over the beginning, and does not ask for the start token
        ("-100:-3", {1, 2}),
        (":-100", set()),
        (":-6", set()),
        ("2, 4, 8:", {2, 4, 8, 9}),
        ("last, 1:3", {1, 2, 5}),
        ("prompt, 7", {1, 2, 3, 4, 5, 7}),
        ("-1, 0", {0, 5}),
    ],
)
def test_spans_are_sets_of_positions(span: str, expected: set[int]) -> None:
    mask = parse_edit(f"#0 += 1 @ {span}").span.mask(PLAIN, 10)
    assert set(mask.nonzero()[:, 0].tolist()) == expected
    assert mask.dtype == torch.bool
    assert len(mask) == 10
    assert torch.equal(parse_edit(f"#0 += 1 @ {span}").span.mask(PLAIN, 400)[:10], mask)  # whatever is still to come


@pytest.mark.parametrize(
    ("span", "expected"),
    [  # markers are left alone
        ("system", {1}),
        ("user", {3, 4, 8}),
        ("assistant", {6, 10, 11}),
        ("user, system", {1, 3, 4, 8}),
        ("user, 0, last", {0, 3, 4, 8, 9}),
        ("all", set(range(1, 12))),
    ],
)
def test_spans_in_a_chat(span: str, expected: set[int]) -> None:
    assert set(parse_edit(f"#0 += 1 @ {span}").span.mask(CHAT, 12).nonzero()[:, 0].tolist()) == expected


def test_a_text_without_a_start_token_begins_at_0() -> None:
    bare = Tokens("abc", (5, 6, 7), ((0, 1), (1, 2), (2, 3)), ("text",) * 3)
    for span, expected in (("all", [0, 1, 2, 3]), ("prompt", [0, 1, 2]), (":2", [0, 1]), ("last", [2])):
        assert parse_edit(f"#0 += 1 @ {span}").span.mask(bare, 4).nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_roles_need_a_chat(lab: Lab, role: str) -> None:
    with pytest.raises(UsageError, match=f"@ {role} needs a chat, and the prompt is plain text"):
        lab.generate("abc", f"#0 += 1 @ {role}", tokens=2)


def values_under(lab: Lab, edits: Any, text: str = "abcdef") -> dict[Site, Tensor]:
    """The values of a text at the sites of the lab's SAEs as later blocks read them under edits."""
    tokens = lab.tokenize(text)
    found: dict[Site, Tensor] = {}
    batch = lab.model.batch([tokens])
    with torch.no_grad(), ExitStack() as stack:
        for site, change in lab.changes(edits, tokens, len(tokens)).items():
            edit = BatchEdits([change])
            edit.place([0], len(tokens))
            stack.enter_context(lab.model.at(site, edit))
        for sae in lab.saes:
            stack.enter_context(lab.model.at(sae.site, lambda x, s=sae.site: found.update({s: x[0].clone()})))
        lab.model.hf(input_ids=batch.ids)
    return found


@pytest.mark.parametrize(
    ("span", "touched"),
    [("all", range(1, 7)), ("0", [0]), ("2:4", [2, 3]), ("last", [6]), ("generated", [6]), ("9:", [])],
)
def test_only_the_span_is_touched(lab: Lab, span: str, touched: Any) -> None:
    site = lab.saes[0].site
    plain = values_under(lab, None)[site]
    edited = values_under(lab, f"#1 += 3 @ {span}")[site]
    expected = plain.clone()
    expected[list(touched)] += torch.tensor([0, 6.0, 0, 0])
    assert torch.equal(edited, expected)


def test_two_edits_at_different_sites(model: Model) -> None:
    first, second = Site(1), Site(2, "resid_post")
    lab = Lab(model, [hand_sae(first), hand_sae(second, name="late")])
    early, late = f"{first}#0 += 3 @ 2", f"{second}#1 = 9 @ 4"
    plain, only_early, both = (values_under(lab, edits) for edits in (None, [early], [late, early]))
    assert torch.equal(only_early[first][2] - plain[first][2], torch.tensor([3.0, 0, 0, 0]))
    assert torch.equal(both[first], only_early[first])
    lit = lab.saes[1].encode(only_early[second])  # the later edit reads what the earlier one left
    change = torch.zeros(7, 4)
    change[4, 1] = (9 - lit[4, 1]) * 2
    assert torch.allclose(both[second], only_early[second] + change, atol=1e-5)
    assert not torch.allclose(only_early[second], plain[second], atol=1e-3)


def test_numbers_without_a_site_are_the_first_saes(model: Model) -> None:
    lab = Lab(model, [hand_sae(Site(1)), hand_sae(Site(2), name="late")])
    assert list(lab.changes("#0 += 1", PLAIN, 6)) == [Site(1)]
    assert list(lab.changes("blocks.2.hook_resid_pre#0 += 1", PLAIN, 6)) == [Site(2)]
    assert list(lab.changes("resid_pre.2#0 += 1", PLAIN, 6)) == [Site(2)]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_two_saes_at_one_site(model: Model) -> None:
    with pytest.raises(UsageError, match=r"two SAEs at one site \(blocks.1.hook_resid_pre"):
        Lab(model, [hand_sae(), hand_sae(name="other")])


def test_directions_at_different_sites_never_mix(model: Model) -> None:
    lab = Lab(model, [hand_sae(Site(1)), hand_sae(Site(2), name="late")])
    a, b = "blocks.1.hook_resid_pre#0", "blocks.2.hook_resid_pre#0"
    for mixed in (f"({a} - {b}) += 1", f"({a} + 2 * {b}) = 1", f"without({a}, {b}) *= 0"):
        with pytest.raises(UsageError, match=r"lives at .* never mix"):
            lab.changes(mixed, PLAIN, 6)
    for mix in (Direction.__add__, Direction.__sub__, Direction.without, Direction.cosine):
        with pytest.raises(UsageError, match="never mix"):
            mix(lab.direction(a), lab.direction(b))


@pytest.mark.parametrize("edit", ["#3 += 1", "#99999999 = 0", "(#0 - #3) += 1", "blocks.1.hook_resid_pre#3 *= 2"])
def test_index_out_of_range(lab: Lab, edit: str) -> None:
    with pytest.raises(UsageError, match=r"no feature #\d+ in hand; it has #0 to #2"):
        lab.generate("abc", edit, tokens=1)


def test_a_site_without_an_sae(lab: Lab) -> None:
    with pytest.raises(UsageError, match=r"no SAE at blocks.2.hook_resid_pre is open; open are blocks.1"):
        lab.generate("abc", "blocks.2.hook_resid_pre#0 += 1", tokens=1)
    with pytest.raises(UsageError, match="no SAE is open"):
        Lab(lab.model, []).generate("abc", "#0 += 1", tokens=1)


def test_unknown_names(known: Lab) -> None:
    known.name("bridge", 0)
    known.name("shopping", 1)
    for edit in ("brigde += 1", "(bridge - brigde) += 1"):
        with pytest.raises(
            UnknownName, match="unknown feature name 'brigde'; nearest: bridge; or give its number"
        ) as caught:
            known.changes(edit, PLAIN, 6)
        assert caught.value.nearest == ["bridge"]


def test_a_mistyped_name_measures_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lancet.facts.of", lambda *_: pytest.fail("facts were measured"))
    with pytest.raises(UnknownName, match="unknown feature name 'bridge'; none are known"):
        lab.changes("bridge += 1", PLAIN, 6)
    lab.name("bridge", 0)
    assert lab.changes("bridge += 1", PLAIN, 6)


def test_names(known: Lab) -> None:
    known.name("bridge", 0)
    known.name("span", "bridge")  # a second name of the same feature
    known.name("mix", "0.5 * #0 + #1")
    known.name("arrow", known.direction("#2"))
    assert moved(known, "span = 7") == [7, 3, 1, 5]
    assert moved(known, "mix += 2") == [3, 7, 1, 5]
    assert moved(known, "arrow += 1") == [2, 3, 4, 9]
    assert known.feature("span").index == 0
    assert known.feature("bridge").maximum == 8
    with pytest.raises(UsageError, match="'mix' is a direction"):
        known.feature("mix")
    for bad in ("two words", "3d", "", "a-b"):
        with pytest.raises(UsageError, match="is not a name; use letters"):
            known.name(bad, 0)
    with pytest.raises(UnknownName, match="nearest: bridge"):
        known.name("wrong", "brdge")
    with pytest.raises(UsageError, match="no feature #3"):
        known.name("wrong", 3)
    with pytest.raises(UsageError, match="no feature #-1"):
        known.name("wrong", -1)
    assert "wrong" not in known.names


def test_concepts_of_the_card_are_names(lab: Lab, tmp_path: Path) -> None:
    concepts = {"bridge": {"feature": 2, "auroc": 0.9}, "mood": {"feature": 0, "blend": [[0, 0.5], [1, 2.0]]}}
    known = with_facts(lab, tmp_path / "facts.safetensors", [8, 0, 2.5], 50.0, concepts=concepts)
    assert moved(known, "bridge = 0") == [2, 3, -14, -15]
    assert moved(known, "mood += 2") == [3, 11, 1, 5]  # 0.5 * #0 + 2 * #1
    assert moved(known, "mood += 0.5rn") != X
    known.name("bridge", 0)  # the user's own names come first
    assert moved(known, "bridge = 0") == [0, 3, 1, 5]
    with pytest.raises(UnknownName, match="nearest: mood"):
        known.changes("mod += 1", PLAIN, 6)


def test_generation_beyond_the_context(lab: Lab) -> None:
    with pytest.raises(UsageError, match="exceed the context of 256; ask for at most 252 tokens"):
        lab.generate("abc", tokens=253)
    for count in (0, -5):
        with pytest.raises(UsageError, match=f"new tokens must be at least 1, got {count}"):
            lab.generate("abc", "#0 += 1", tokens=count)
        with pytest.raises(UsageError, match=f"new tokens must be at least 1, got {count}"):
            next(lab.stream("abc", "#0 += 1", tokens=count))


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"repetition_penalty": 0},
    ],
    ids=str,
)
def test_sampling_out_of_range(setting: dict[str, Any]) -> None:
    name, value = next(iter(setting.items()))
    with pytest.raises(UsageError, match=f"{name} must be .*, got {value}"):
        Sampling(**setting)


def test_row_changes_that_do_nothing_are_false(lab: Lab) -> None:
    for edits in ("#0 += 0", "#0 *= 1", "#0 = 9 @ 40:", "(#0 - #1) += 0"):
        assert not next(iter(lab.changes(edits, PLAIN, 6).values()))
    assert not RowChange([])
    assert Span() == Span(("all",))
    assert next(iter(lab.changes("#0 = 0", PLAIN, 6).values()))
