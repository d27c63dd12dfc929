"""The one notation for edits and expressions: in Python strings, on the command line, in recipes, in the web page.

    edit        target sign amount [@ span]
    target      an expression of #numbers and names: bridge, #12, blocks.8.hook_resid_pre#77, (love - romance), with
                unit(a), without(a, b), mean_difference("like.txt", "unlike.txt")
    sign        +=  =  *=  >= (at least)  <= (at most)
    amount      80, 2x, 0.5rn, auto (the recommended dose)
    span        all, prompt, generated, last, assistant, user, system, 3, 2:5, several with commas;
                after that, or instead of it, a condition: where #77 > 5, where bridge < 0.5x

Errors point at the character.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any
from unicodedata import east_asian_width

from lancet.algebra import FUNCTIONS, Binary, Call, Expression, Number, Ref, Text
from lancet.edit import SIGNS, Edit
from lancet.errors import UsageError
from lancet.site import Site
from lancet.span import WORDS, Condition, Span
from lancet.units import Amount

GRAMMAR = r"""
edit: expression SIGN amount ("@" span)?
?expression: term | expression PLUS term
?term: factor | term TIMES factor
?factor: number | reference | "(" expression ")" | call | PLUS factor -> signed
call: NAME "(" argument ("," argument)* ")"
?argument: expression | text
text: TEXT
number: NUMBER
reference: SITE? "#" INT -> numbered
         | SITE "#" NAME -> named
         | NAME -> named
amount: PLUS? (NUMBER UNIT? | INFINITE) | AUTO
span: part ("," part)* where? | where
where: _WHERE expression RELATION amount
part: NAME -> word
    | signed_int -> position
    | signed_int? ":" signed_int? -> slice
signed_int: PLUS? INT

SIGN: "+=" | "*=" | ">=" | "<=" | "="
RELATION: />(?!=)/ | /<(?!=)/
_WHERE.3: /where\b/
PLUS.2: /[+-](?!=)/
TIMES: /[*\/](?!=)/
UNIT.2: "x" | "rn"
INFINITE.3: /(inf(inity)?|nan)\b/i
AUTO.3: /auto\b/
SITE.3: /[A-Za-z_][\w.\[\]]*(?=#)/
NUMBER.1: /\d+\.\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+/
INT.2: /\d+(?![\d.eE])/
NAME: /[^\W\d]\w*/
TEXT: /"[^"\n]*"|'[^'\n]*'/
%ignore /\s+/
"""

_SAID = {
    "SIGN": "one of += = *= >= <=", "NUMBER": "a number", "INT": "a whole number", "NAME": "a name", "SITE": "a site",
    "PLUS": "+ or -", "TIMES": "* or /", "UNIT": "x or rn", "LPAR": "(", "RPAR": ")", "COMMA": ",", "COLON": ":",
    "AT": "@", "__ANON_0": "@", "HASH": "#", "RELATION": "> or <",
    "_WHERE": "where", "$END": "the end", "INFINITE": "", "AUTO": "auto",
    "TEXT": "a file's name in quotes",
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


def parse_span(text: str) -> Span:
    """A span from its notation: `generated`, `2:5, -1`, `assistant where #77 > 5`.

    Raises:
        UsageError: with a caret under the character at fault.
    """
    return _span(_tree(text, "span", "span"), text)


def _expression(tree: Any, text: str) -> Expression:
    children = tree.children
    match tree.data:
        case "number":
            return Number(float(children[0]))
        case "named":
            return Ref(name=str(children[-1]), site=_site(children[0], text) if len(children) == 2 else None)
        case "text":
            return Text(str(children[0])[1:-1])
        case "numbered":
            return Ref(index=int(children[-1]), site=_site(children[0], text) if len(children) == 2 else None)
        case "call":
            return _call(children[0], children[1:], text)
        case "signed":
            inner = _expression(children[1], text)
            if str(children[0]) == "+":
                return inner
            return Number(-inner.value) if isinstance(inner, Number) else Binary("*", Number(-1.0), inner)
        case _:
            return Binary(str(children[1]), _expression(children[0], text), _expression(children[2], text))


def _call(name: Any, arguments: list[Any], text: str) -> Call:
    function = FUNCTIONS.get(str(name))
    if function is None:
        *others, last = FUNCTIONS
        raise fault(text, name.start_pos, "expression", f"no function {name}; there are {', '.join(others)} and {last}")
    if not function.least <= len(arguments) <= function.most:
        allowed = sorted({function.least, function.most})
        count = " or ".join("one argument" if n == 1 else "two arguments" for n in allowed)
        raise fault(text, name.start_pos, "expression", f"{name} takes {count}")
    for argument in arguments:
        if (argument.data == "text") != function.files:
            takes = "files' names in quotes" if function.files else "directions, not files' names"
            raise fault(text, argument.meta.start_pos, "expression", f"{name} takes {takes}")
    return Call(str(name), tuple(_expression(argument, text) for argument in arguments))


def _site(token: Any, text: str) -> Site:
    try:
        return Site.parse(str(token))
    except UsageError as error:
        raise fault(text, token.start_pos, "expression", str(error)) from None


def _amount(tree: Any) -> Amount:
    return Amount.parse("".join(map(str, tree.children)))


def _span(tree: Any, text: str) -> Span:
    parts: list[Any] = []
    where = None
    for part in tree.children:
        if part.data == "where":
            where = _condition(part, text)
        elif part.data == "word":
            word = str(part.children[0])
            if word == "where":
                raise fault(text, part.meta.end_pos, "span", "where needs a condition, such as where #77 > 5")
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
    return Span(tuple(parts) or Span().parts, where)


def _condition(tree: Any, text: str) -> Condition:
    target, relation, amount = tree.children
    try:
        return Condition(_expression(target, text), str(relation) == ">", _amount(amount))
    except UsageError as error:
        if "\n" in str(error):
            raise
        raise fault(text, amount.meta.start_pos, "span", str(error)) from None


def _int(tree: Any) -> int:
    return int("".join(map(str, tree.children)))
