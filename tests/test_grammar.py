"""The notation of edits: the examples of the documentation against the trees that they mean, texts against what they
are read back as, and the character at which a mistake is told against the character at which it was made."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lancet.algebra import Binary, Call, Expression, Number, Ref
from lancet.edit import Edit
from lancet.errors import UsageError
from lancet.grammar import parse_edit, parse_expression
from lancet.site import Site
from lancet.span import WORDS, Span
from lancet.units import Amount

LOVE, ROMANCE = Ref(name="love"), Ref(name="romance")


@pytest.mark.parametrize(
    ("text", "target", "operation", "amount", "span"),
    [
        ("#12345 += 80", Ref(index=12345), "add", Amount(80), ("all",)),
        ("bridge = 2x", Ref(name="bridge"), "set", Amount(2, "x"), ("all",)),
        ("refusal = 0", Ref(name="refusal"), "set", Amount(0), ("all",)),
        ("(love - romance) += 0.5rn @ generated", Binary("-", LOVE, ROMANCE), "add", Amount(0.5, "rn"), ("generated",)),
        ("blocks.8.hook_resid_pre#77 *= 3", Ref(index=77, site=Site(8)), "scale", Amount(3), ("all",)),
        ("resid_post.8#77 = 1", Ref(index=77, site=Site(8, "resid_post")), "set", Amount(1), ("all",)),
        ("hidden_states[6]#3 = 1", Ref(index=3, site=Site(6)), "set", Amount(1), ("all",)),
        ("model.layers.6.output#3 = 1", Ref(index=3, site=Site(6, "resid_post")), "set", Amount(1), ("all",)),
        ("#5 >= 40", Ref(index=5), "at_least", Amount(40), ("all",)),
        ("#5 <= 1e-3x", Ref(index=5), "at_most", Amount(0.001, "x"), ("all",)),
        ("#5 = -10", Ref(index=5), "set", Amount(-10), ("all",)),
        ("#5 += +.5 rn", Ref(index=5), "add", Amount(0.5, "rn"), ("all",)),
        ("#5+=-3@last", Ref(index=5), "add", Amount(-3), ("last",)),
        ("love+=3", LOVE, "add", Amount(3), ("all",)),
        ("柳叶刀 += 80", Ref(name="柳叶刀"), "add", Amount(80), ("all",)),
        ("x += 2x", Ref(name="x"), "add", Amount(2, "x"), ("all",)),
        ("rn = 3rn @ all", Ref(name="rn"), "set", Amount(3, "rn"), ("all",)),
        ("last = 1 @ last", Ref(name="last"), "set", Amount(1), ("last",)),
        ("unit = 1", Ref(name="unit"), "set", Amount(1), ("all",)),
        ("#1 = 1 @ 3", Ref(index=1), "set", Amount(1), (3,)),
        ("#1 = 1 @ -1", Ref(index=1), "set", Amount(1), (-1,)),
        ("#1 = 1 @ 2:5", Ref(index=1), "set", Amount(1), ((2, 5),)),
        ("#1 = 1 @ -4 : -1", Ref(index=1), "set", Amount(1), ((-4, -1),)),
        ("#1 = 1 @ :5", Ref(index=1), "set", Amount(1), ((None, 5),)),
        ("#1 = 1 @ 5:", Ref(index=1), "set", Amount(1), ((5, None),)),
        ("#1 = 1 @ :", Ref(index=1), "set", Amount(1), ((None, None),)),
        ("#1 = 1 @ user, 0, 2:, last", Ref(index=1), "set", Amount(1), ("user", 0, (2, None), "last")),
        ("  #1\t=\n1  ", Ref(index=1), "set", Amount(1), ("all",)),
    ],
)
def test_edits(text: str, target: Expression, operation: Any, amount: Amount, span: Any) -> None:
    assert parse_edit(text) == Edit.parse(text) == Edit(target, operation, amount, Span(span))


@pytest.mark.parametrize("word", WORDS)
def test_words_of_spans(word: str) -> None:
    assert parse_edit(f"#1 += 2 @ {word}").span == Span((word,))


A, B, C = Ref(name="a"), Ref(name="b"), Ref(name="c")


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a", A),
        ("((a))", A),
        ("#12", Ref(index=12)),
        ("a - b - c", Binary("-", Binary("-", A, B), C)),
        ("a - (b - c)", Binary("-", A, Binary("-", B, C))),
        ("a + b * 2", Binary("+", A, Binary("*", B, Number(2)))),
        ("(a + b) * 2", Binary("*", Binary("+", A, B), Number(2))),
        ("a / 2 / 4", Binary("/", Binary("/", A, Number(2)), Number(4))),
        (
            "0.6 * #12 + 0.4 * #77",
            Binary("+", Binary("*", Number(0.6), Ref(index=12)), Binary("*", Number(0.4), Ref(index=77))),
        ),
        ("-a", Binary("*", Number(-1), A)),
        ("+a", A),
        ("-2 * a", Binary("*", Number(-2), A)),
        ("a - -b", Binary("-", A, Binary("*", Number(-1), B))),
        ("#12-3*#4", Binary("-", Ref(index=12), Binary("*", Number(3), Ref(index=4)))),
        ("unit(bridge)", Call("unit", (Ref(name="bridge"),))),
        ("without(a, unit(b - c))", Call("without", (A, Call("unit", (Binary("-", B, C),))))),
        ("resid_pre.8#1 - resid_pre.8#2", Binary("-", Ref(index=1, site=Site(8)), Ref(index=2, site=Site(8)))),
    ],
)
def test_expressions(text: str, tree: Expression) -> None:
    assert parse_expression(text) == tree
    assert parse_expression(str(tree)) == tree


# ---- there and back --------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
sites = st.builds(Site, st.integers(0, 99), st.sampled_from(["resid_pre", "resid_post"]))
refs = st.one_of(
    st.builds(Ref, index=st.integers(0, 10**6), site=st.none() | sites),
    st.builds(Ref, name=st.sampled_from(["love", "x", "rn", "all", "unit", "inf", "a_1", "柳叶刀", "naïve", "e5"])),
)  # fmt: skip
expressions: st.SearchStrategy[Any] = st.recursive(
    refs | st.builds(Number, finite),
    lambda inner: st.one_of(
        st.builds(Binary, st.sampled_from("+-*/"), inner, inner),
        st.builds(Call, st.just("unit"), st.tuples(inner)),
        st.builds(Call, st.just("without"), st.tuples(inner, inner)),
    ),
    max_leaves=5,
)
ends = st.none() | st.integers(-500, 500)
spans = st.lists(st.sampled_from(WORDS) | st.integers(-500, 500) | st.tuples(ends, ends), min_size=1, max_size=3)


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    operation = draw(st.sampled_from(["add", "set", "scale", "at_least", "at_most"]))
    unit = "raw" if operation == "scale" else draw(st.sampled_from(["raw", "x", "rn"]))
    return Edit(draw(expressions), operation, Amount(draw(finite), unit), Span(tuple(draw(spans))))  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(edits())
def test_an_edit_reads_back_as_itself(edit: Edit) -> None:
    assert parse_edit(str(edit)) == edit
    assert str(parse_edit(str(edit))) == str(edit)


@given(finite)
def test_amounts_read_back_as_themselves(value: float) -> None:
    for unit in ("raw", "x", "rn"):
        amount = Amount(value, unit)  # type: ignore[arg-type]
        again = Amount.parse(str(amount))
        assert again == amount
        assert math.copysign(1, again.value) == math.copysign(1, value)


def test_amounts_are_written_short() -> None:
    said = {Amount(80): "80", Amount(0.5, "rn"): "0.5rn", Amount(2.0, "x"): "2x", Amount(-1e-7): "-1e-07"}
    assert [str(amount) for amount in said] == list(said.values())
    assert Amount.parse(80) == Amount.parse(" 80 ") == Amount.parse(Amount(80)) == Amount(80.0)
    assert str(Amount(0.1234567)) == "0.1234567"


def test_plain_edits_are_written_as_people_write_them() -> None:
    for text in ("#12 += 80", "bridge = 2x", "(love - romance) += 0.5rn @ generated", "#1 *= 0 @ user, 3, -4:, :2"):
        assert str(Edit.parse(text)) == text


# ---- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = [  # the text, the wrong character's first occurrence from `after` on ("" for the end), and what is said
    ("#12 += ", "", 0, "a number"),
    ("#12", "", 0, "one of += = *= >= <="),
    ("#12 + 80", "", 0, "one of += = *= >= <="),
    ("+= 80", "+", 0, "a name or a number"),
    ("#x += 3", "x", 0, "a whole number"),
    ("#12.5 += 3", "1", 0, "a whole number"),
    ("#-12 += 3", "-", 0, "a whole number"),
    ("#12 == 80", "=", 5, "a number"),
    ("#12 => 80", ">", 0, "a number"),
    ("#12 -= 80", "-", 0, "one of += = *= >= <="),
    ("love += two", "t", 0, "a number"),
    ("love romance += 3", "r", 0, "one of += = *= >= <="),
    ("love & hate += 3", "&", 0, "+ or -"),
    ("(love - romance += 3", "+", 0, ")"),
    ("love - romance) += 3", ")", 0, "one of += = *= >= <="),
    ("() += 3", ")", 0, "a name"),
    ("a * * b += 3", "*", 3, "a name"),
    ("#12 += 80y", "y", 0, "x or rn"),
    ("#12 += 3 4", "4", 0, "@"),
    ("#12 += 80 generated", "g", 0, "@"),
    ("#12 += 80；", "；", 0, "@"),
    ("#1 += 3, #2 += 4", ",", 0, "@"),
    ("#12 += 80 @", "", 0, "a whole number"),
    ("#12 += 80 @ 1.5", "1", 8, "a whole number"),
    ("#12 += 80 @ 1:2:3", ":", 14, ","),
    ("#12 += 80 @ last all", "a", 14, ","),
    ("#12 += 80 @ last, everywhere", "e", 10, "no span everywhere; there are all, prompt"),
    ("unt(love) += 3", "u", 0, "no function unt; there are unit, without and mean_difference"),
    ("2 * unit(a, b) += 3", "u", 0, "unit takes one argument"),
    ("a - without(a) += 3", "w", 0, "without takes two arguments"),
    ("#12 *= 2x", "2", 3, "takes a plain factor, got 2x"),
    ("#12 += inf", "i", 0, "write `= 0`"),
    ("#12 += 1e999", "1", 3, "write `= 0`"),
    ("blocks.8.hook_scores#3 += 2", "b", 0, "sites of kind 'hook_scores' are not supported"),
    ("#5 - bloks[8]#3 += 2", "b", 0, "'bloks[8]' is not a site"),
    ("#12 +=\n 3 q", "q", 0, "@"),
]


@pytest.mark.parametrize(("text", "character", "after", "said"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_mistakes_are_told_at_their_character(text: str, character: str, after: int, said: str) -> None:
    at = text.index(character, after) if character else len(text)
    with pytest.raises(UsageError) as caught:
        parse_edit(text)
    first, shown, caret = str(caught.value).split("\n")
    assert said in first
    assert f"at character {at + 1} ({character!r})" in first if character else "(the end)" in first
    assert shown == "  " + text.replace("\n", " ")
    assert caret == "  " + " " * at + "^"


def test_the_caret_counts_wide_characters_twice() -> None:
    with pytest.raises(UsageError) as caught:
        parse_edit("柳叶刀 ++ 80")
    first, _, caret = str(caught.value).split("\n")
    assert "at character 10 (the end)" in first
    assert caret == "  " + " " * (len("柳叶刀 ++ 80") + 3) + "^"


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_nothing(text: str) -> None:
    with pytest.raises(UsageError, match="the edit is empty; write for example `#12 \\+= 80`"):
        parse_edit(text)
