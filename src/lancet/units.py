"""Amounts: a number and what it is counted in.

    80       raw activation
    2x       times the feature's maximum over a corpus
    0.5rn    times the site's typical residual norm: the length of what is added
    auto     the target's recommended dose (`lancet dose` finds it)

`x` and `rn` are what makes a strength carry over from one feature, SAE or model to another.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from lancet.errors import UsageError

Unit = Literal["raw", "x", "rn", "auto"]

_AMOUNT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(x|rn)?")


@dataclass(frozen=True)
class Amount:
    """A finite number in a unit.

    Raises:
        UsageError: NaN or infinite.
    """

    value: float
    unit: Unit = "raw"

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise UsageError(
                f"an amount must be a finite number, got {self.value}; to switch a feature off write `= 0`, to push it "
                f"below zero a finite negative number such as `= -10`"
            )

    @classmethod
    def parse(cls, text: str | float | Amount) -> Amount:
        """Reads `80`, `2x`, `0.5rn`, `auto` or a plain number.

        Raises:
            UsageError: anything else, infinities and NaN among them.
        """
        if isinstance(text, Amount):
            return text
        if isinstance(text, (int, float)):
            return cls(float(text))
        if text.strip() == "auto":
            return cls(1.0, "auto")
        match = _AMOUNT.fullmatch(text.strip())
        if match is None:
            if text.strip().lower().lstrip("+-") in ("inf", "infinity", "nan"):
                return cls(float(text))
            raise UsageError(
                f"{text!r} is not an amount; write a number, 2x (times its maximum), 0.5rn (of the norm) or auto"
            )
        unit: Unit = "raw" if match[2] is None else "x" if match[2] == "x" else "rn"
        return cls(float(match[1]), unit)

    def raw(self, maximum: float | None, norm: float | None, length: float) -> float:
        """The same as a raw activation.

        Args:
            maximum: the feature's maximum activation, None where it is not known.
            norm: the site's typical residual norm, None where it is not known.
            length: the L2 norm of what one unit of activation adds.

        Raises:
            UsageError: the unit needs a fact that is not known.
        """
        if self.unit == "auto":
            raise UsageError("auto stands for a dose, which only the amount of += and = can be; give a number here")
        if self.unit == "x":
            if not maximum:
                raise UsageError(
                    f"{self} needs the target's maximum activation, which is not known (it never fired on the text "
                    f"that was measured, or the target is not a single feature); give a raw amount or one in rn"
                )
            return self.value * maximum
        if self.unit == "rn":
            if not norm:
                raise UsageError(f"{self} needs the site's typical norm, which is not known; give a raw amount")
            if length <= 0:
                raise UsageError(f"{self} cannot be given to a target of length 0; choose another target")
            return self.value * norm / length
        return self.value

    def __str__(self) -> str:
        return "auto" if self.unit == "auto" else short(self.value) + ("" if self.unit == "raw" else self.unit)


_SIZE = re.compile(r"(\d+\.?\d*|\.\d+)\s*([kMGT]?)(i?)B?", re.IGNORECASE)


def size(text: str) -> int | None:
    """Bytes of a size such as `2GB`, `500MB`, `1.5GiB` or a plain number; None for `auto`.

    Raises:
        UsageError: anything else.
    """
    if text.strip().lower() == "auto":
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size; write auto, or a size such as 2GB, 500MB or 1.5GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))


_COUNT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmb]?)")
_TIMES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def count(text: str, what: str = "tokens") -> int:
    """`10M`, `250k`, `1.5B` or a plain number.

    Args:
        what: is counted.

    Raises:
        UsageError: anything else.
    """
    match = _COUNT.fullmatch(text.strip().lower().replace(",", "").replace("_", ""))
    if match is None or (found := round(float(match[1]) * _TIMES[match[2]])) < 1:
        raise UsageError(f"a number of {what} is written 10M, 250k or 1000, got {text!r}")
    return found


def width(text: str) -> int:
    """A number of features: a plain number, or `16k`, which is 16,384 as the field writes it.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(\d+)(k|m)?", text.strip().lower().replace(",", "").replace("_", ""))
    if match is None or (found := int(match[1]) * {None: 1, "k": 1 << 10, "m": 1 << 20}[match[2]]) < 1:
        raise UsageError(f"a number of features is written 16k (16,384), 1M or 5000, got {text!r}")
    return found


def short(value: float) -> str:
    """The shortest text that reads back as the same number: 80, 0.5, 1e-07, 0.1234567."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)
