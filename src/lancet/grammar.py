"""The one notation for edits and expressions: in Python strings, on the command line, in recipes, in the web page.

    edit        target sign amount [@ span]
    target      an expression of #numbers and names: bridge, #12, blocks.8.hook_resid_pre#77, (love - romance)
    sign        +=  =  *=  >= (at least)  <= (at most)
    amount      80, 2x, 0.5rn
    span        all, prompt, generated, last, assistant, user, system, 3, 2:5, several with commas

Errors point at the character.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any
from unicodedata import east_asian_width

from lancet.algebra import FUNCTIONS, Binary, Call, Expression, Number, Ref
from lancet.edit import SIGNS, WORDS, Edit, Span
from lancet.errors import UsageError
from lancet.site import Site
from lancet.units import Amount

GRAMMAR = r"""
edit: expression SIGN amount ("@" span)?
?expression: term | expression PLUS term
?term: factor | term TIMES factor
?factor: number | reference | "(" expression ")" | call | PLUS factor -> signed
call: NAME "(" expression ("," expression)* ")"
number: NUMBER
reference: SITE? "#" INT -> numbered
         | NAME -> named
amount: PLUS? (NUMBER UNIT? | INFINITE)
span: part ("," part)*
part: NAME -> word
    | signed_int -> position
    | signed_int? ":" signed_int? -> slice
signed_int: PLUS? INT

SIGN: "+=" | "*=" | ">=" | "<=" | "="
PLUS.2: /[+-](?!=)/
TIMES: /[*\/](?!=)/
UNIT.2: "x" | "rn"
INFINITE.3: /(inf(inity)?|nan)\b/i
SITE.3: /[A-Za-z_][\w.\[\]]*(?=#)/
NUMBER.1: /\d+\.\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+/
INT.2: /\d+(?![\d.eE])/
NAME: /[^\W\d]\w*/
%ignore /\s+/
"""

_SAID = {
    "SIGN": "one of += = *= >= <=", "NUMBER": "a number", "INT": "a whole number", "NAME": "a name", "SITE": "a site",
    "PLUS": "+ or -", "TIMES": "* or /", "UNIT": "x or rn", "LPAR": "(", "RPAR": ")", "COMMA": ",", "COLON": ":",
    "AT": "@", "__ANON_0": "@", "HASH": "#", "$END": "the end", "INFINITE": "",
}  # fmt: skip


@cache
def _parser(start: str) -> Any:
    from lark import Lark

    return Lark(GRAMMAR, start=start, parser="earley", lexer="dynamic", propagate_positions=True)


def _tree(text: str, start: str, what: str) -> Any:
    from lark.exceptions import UnexpectedInput

    if not text.strip():
        raise UsageError(f"the {what} is empty; write for example `#12 += 80`")
    try:
        return _parser(start).parse(text)
    except UnexpectedInput as error:
        at = getattr(error, "pos_in_stream", None)
        column = at if isinstance(at, int) and at >= 0 else len(text)
        allowed = getattr(error, "allowed", None) or getattr(error, "expected", None) or set()
        names = sorted({_SAID.get(str(name), str(name).lower()) for name in allowed} - {""})
        raise fault(text, min(column, len(text)), what, f"expected {' or '.join(names)}" if names else "") from None


def fault(text: str, column: int, what: str, why: str) -> UsageError:
    """A UsageError whose second and third lines show the text with a caret under the character at fault."""
    got = repr(text[column]) if column < len(text) else "the end"
    shown = re.sub(r"\s", " ", text)
    indent = "".join("  " if east_asian_width(character) in "WF" else " " for character in shown[:column])
    return UsageError(f"cannot read the {what} at character {column + 1} ({got}): {why}\n  {shown}\n  {indent}^")


def parse_edit(text: str) -> Edit:
    """An Edit from its notation.

    Raises:
        UsageError: with a caret under the character at fault.
    """
    target, sign, amount, *span = _tree(text, "edit", "edit").children
    try:
        return Edit(
            _expression(target, text),
            SIGNS[str(sign)],
            _amount(amount),
            _span(span[0], text) if span else Span(),
        )
    except UsageError as error:
        if "\n" in str(error):
            raise
        raise fault(text, amount.meta.start_pos, "edit", str(error)) from None


def parse_expression(text: str) -> Expression:
    """An expression from its notation: `love - romance`.

    Raises:
        UsageError: with a caret under the character at fault.
    """
    return _expression(_tree(text, "expression", "expression"), text)


def _expression(tree: Any, text: str) -> Expression:
    children = tree.children
    match tree.data:
        case "number":
            return Number(float(children[0]))
        case "named":
            return Ref(name=str(children[0]))
        case "numbered":
            return Ref(index=int(children[-1]), site=_site(children[0], text) if len(children) == 2 else None)
        case "call":
            name = str(children[0])
            if name not in FUNCTIONS:
                raise fault(
                    text, children[0].start_pos, "expression", f"no function {name}; there are unit and without"
                )
            if len(children) - 1 != FUNCTIONS[name]:
                count = "one argument" if FUNCTIONS[name] == 1 else "two arguments"
                raise fault(text, children[0].start_pos, "expression", f"{name} takes {count}")
            return Call(name, tuple(_expression(child, text) for child in children[1:]))
        case "signed":
            inner = _expression(children[1], text)
            if str(children[0]) == "+":
                return inner
            return Number(-inner.value) if isinstance(inner, Number) else Binary("*", Number(-1.0), inner)
        case _:
            return Binary(str(children[1]), _expression(children[0], text), _expression(children[2], text))


def _site(token: Any, text: str) -> Site:
    try:
        return Site.parse(str(token))
    except UsageError as error:
        raise fault(text, token.start_pos, "expression", str(error)) from None


def _amount(tree: Any) -> Amount:
    return Amount.parse("".join(map(str, tree.children)))


def _span(tree: Any, text: str) -> Span:
    parts: list[Any] = []
    for part in tree.children:
        if part.data == "word":
            word = str(part.children[0])
            if word not in WORDS:
                raise fault(text, part.children[0].start_pos, "span", f"no span {word}; there are {', '.join(WORDS)}")
            parts.append(word)
        elif part.data == "position":
            parts.append(_int(part.children[0]))
        else:
            begin_end: list[int | None] = [None, None]
            colon = text.index(":", part.meta.start_pos)
            for child in part.children:
                begin_end[child.meta.start_pos > colon] = _int(child)
            parts.append(tuple(begin_end))
    return Span(tuple(parts))


def _int(tree: Any) -> int:
    return int("".join(map(str, tree.children)))
