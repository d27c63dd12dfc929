"""How well numbers tell one thing from another."""

from __future__ import annotations

import numpy as np


def auroc(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column, ties counted half.

    Args:
        scores: [n, m]; positive: [n] bool.

    Returns:
        [m]; NaN where all or none are positive.
    """
    return auroc_of_ranks(ranks(scores), positive)


def ranks(scores: np.ndarray) -> np.ndarray:
    """[n, m] ranks of each column from 1, ties sharing their mean: computed once, used for many labellings."""
    from scipy.stats import rankdata

    return rankdata(scores, axis=0)


def auroc_of_ranks(ranked: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """`auroc` from ranks that are already there (the Mann-Whitney statistic)."""
    n = int(positive.sum())
    other = len(positive) - n
    if n == 0 or other == 0:
        return np.full(ranked.shape[1], np.nan)
    return (ranked[positive].sum(0) - n * (n + 1) / 2) / (n * other)
