"""Massive tokens: second start tokens in all but name, on which a model parks its attention.

Their norm is tens of times that of all others (Sun et al. 2024, "Massive Activations in Large Language Models"), so
that a handful decides every sum of squares: five of 16,900 tokens held 46 % of the variance of SmolLM2-135M at block
12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TIMES = 20  # the median norm


def ordinary(norms: Tensor, median: float | None = None) -> Tensor:
    """[tokens] bool: True where a norm is at most `TIMES` the median, that of these norms where none is given."""
    return norms <= TIMES * (norms.median() if median is None else median)
