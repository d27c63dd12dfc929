"""How many features are active: a coefficient of a sparsity loss is steered, a threshold is set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

GAIN = 0.01  # of one step; a tenfold L0 raises the coefficient by 2.3 %


class Controller:
    """An integral controller of the coefficient, in logarithms."""

    def __init__(self, target: float, start: float) -> None:
        self.target, self.value = target, start

    def update(self, l0: float) -> float:
        """The next coefficient after a step in which so many features were active a token."""
        self.value *= math.exp(GAIN * max(-1.0, min(1.0, math.log(max(l0, 1e-3) / self.target))))
        return self.value

    def state(self) -> dict[str, float]:
        """What `load` takes."""
        return {"value": self.value}

    def load(self, state: dict[str, float]) -> None:
        """Goes on from a state."""
        self.value = state["value"]


def calibrate(sae: Any, batches: Sequence[Tensor], k: float) -> None:
    """Sets a BatchTopK SAE's threshold so that k features are active a token, in the mean over some batches.

    Args:
        batches: [n, d_in] each, in the scale that the SAE is trained in.
    """
    import torch

    if not hasattr(sae, "topk_threshold"):
        return
    with torch.no_grad():
        tops = []
        for batch in batches:
            pre = sae.encode_with_hidden_pre(batch)[1]
            tops.append(pre.flatten().topk(min(pre.numel(), math.ceil(4 * k * len(batch)))).values)
        wanted = round(k * sum(map(len, batches)))
        values = torch.cat(tops).sort(descending=True).values
        sae.topk_threshold.fill_(max(0.0, float(values[min(wanted, len(values) - 1)])))
