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


def f1(scores: np.ndarray, positive: np.ndarray, threshold: float) -> float:
    """F1 of calling positive what scores at least `threshold`: 2 TP / (2 TP + FP + FN), 0 where there is no TP.

    Args:
        scores: [n]; positive: [n] bool.
    """
    called = scores >= threshold
    true = int((called & positive).sum())
    return 2 * true / max(1, int(called.sum()) + int(positive.sum()))


def best_threshold(scores: np.ndarray, positive: np.ndarray) -> float:
    """The threshold of the highest F1, half way between two neighbouring scores; the higher one of several as good.

    Args:
        scores: [n]; positive: [n] bool, at least one of them True.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order].astype(np.float64)
    true = np.cumsum(positive[order])
    value = 2 * true / (np.arange(1, len(ordered) + 1) + int(positive.sum()))
    last = np.append(ordered[:-1] > ordered[1:], True)  # ties are called together
    best = int(np.argmax(np.where(last, value, -1)))
    below = ordered[best + 1] if best + 1 < len(ordered) else ordered[best]
    middle = (ordered[best] + below) / 2
    return float(middle if middle > below else ordered[best])  # neighbours between which no number lies
