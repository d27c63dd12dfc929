"""Linear probes on a model's own values, what needs no SAE: ridge regression, whose direction is shrunk LDA's.

Least squares on a label gives the direction of linear discriminant analysis, and with a ridge that of LDA with the
same multiple of the identity added to its covariance (Hastie, Tibshirani, Friedman, The Elements of Statistical
Learning, 4.3). One decomposition serves every label and every ridge, and tells what each line would score had it been
left out, which is what a threshold is chosen on and the ridge itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean squared singular value of the centred values


@dataclass(frozen=True)
class Probes:
    """One probe for each label, all with one ridge.

    Attributes:
        centre: [d] mean of the values.
        ways: [d, m] directions; base: [m] what the mean scores.
        left_out: [n, m] what each line scores with the probe of all other lines.
        ridge: what was added to the sum of squares (`alpha` of scikit-learn's Ridge).
    """

    centre: np.ndarray
    ways: np.ndarray
    base: np.ndarray
    left_out: np.ndarray
    ridge: float

    def scores(self, values: np.ndarray) -> np.ndarray:
        """[n, m] of values [n, d]."""
        return (values - self.centre) @ self.ways + self.base


def fit(values: np.ndarray, labels: np.ndarray) -> Probes:
    """Probes of all labels, with the one of RIDGES that predicts left-out lines best.

    Args:
        values: [n, d], n at least 2; labels: [n, m] bool.
    """
    x, y = values.astype(np.float64), labels.astype(np.float64)
    centre, base = x.mean(0), y.mean(0)
    u, s, v = np.linalg.svd(x - centre, full_matrices=False)
    inside = u.T @ (y - base)
    best: tuple[float, np.ndarray, float] | None = None
    for share in RIDGES:
        ridge = share * max(float((s**2).mean()), 1e-30)
        kept = s**2 / (s**2 + ridge)
        hat = 1 / len(x) + (u**2 @ kept)[:, None]
        left_out = (base + u @ (kept[:, None] * inside) - hat * y) / np.maximum(1 - hat, 1e-12)
        error = float(((left_out - y) ** 2).sum())
        if best is None or error < best[0]:
            best = error, left_out, ridge
    assert best is not None
    _, left_out, ridge = best
    return Probes(centre, v.T @ ((s / (s**2 + ridge))[:, None] * inside), base, left_out, ridge)
