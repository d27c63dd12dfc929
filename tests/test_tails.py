"""Sorted values against plain loops: ties, zeros, features without entries, values beyond all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lancet.tails import Sorted

# Few distinct values, so that many tie, and two that only float32's last bit tells apart.
VALUES = (0.0, 0.0, 0.0, 0.25, 0.5, float(np.nextafter(np.float32(0.5), np.float32(1))), 1e-6, 3.0, 1e6)


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    """[population, d_sae] mostly zeros."""
    population, d_sae = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    cells = draw(st.lists(st.sampled_from(VALUES), min_size=population * d_sae, max_size=population * d_sae))
    return torch.tensor(cells).view(population, d_sae)


def sorted_of(table: Tensor) -> Sorted:
    member, feature = table.nonzero().unbind(1)
    return Sorted.of(feature, table[member, feature], table.shape[1], len(table), member)


@settings(max_examples=60, deadline=None)
@given(tables(), st.lists(st.sampled_from([-1.0, *VALUES, 2e6]), min_size=1, max_size=6))
def test_counts_and_surprise(table: Tensor, asked: list[float]) -> None:
    found, n = sorted_of(table), len(table)
    assert torch.equal(found.dense(torch.arange(table.shape[1])), table)
    for feature in range(table.shape[1]):
        which, value = torch.full((len(asked),), feature), torch.tensor(asked)
        column = table[:, feature]
        reach = [int((column >= v).sum()) for v in value]
        assert found.at_least(which, value).tolist() == reach
        assert found.at_least(which, value, above=True).tolist() == [int((column > v).sum()) for v in value]
        expected = [-math.log((count + 1) / (n + 1)) for count in reach]
        assert found.surprise(which, value).tolist() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(tables(), st.lists(st.sampled_from([*VALUES, 2e6]), min_size=1, max_size=6))
def test_auroc_is_scikit_learns(table: Tensor, positives: list[float]) -> None:
    found, d_sae = sorted_of(table), table.shape[1]
    scores = torch.tensor(positives)[:, None].expand(-1, d_sae).contiguous()
    told = found.auroc(scores, torch.arange(d_sae))
    labels = [1] * len(positives) + [0] * len(table)
    for feature in range(d_sae):
        column = np.concatenate([scores[:, feature].numpy(), table[:, feature].numpy()])
        assert float(told[feature]) == pytest.approx(roc_auc_score(labels, column), abs=1e-6)


def test_a_feature_without_entries_and_no_entries_at_all() -> None:
    empty = torch.zeros(0)
    found = Sorted.of(empty.long(), empty, 3, 5, empty.long())
    which = torch.tensor([0, 2])
    assert found.at_least(which, torch.tensor([0.0, 0.1])).tolist() == [5, 0]
    assert found.at_least(empty.long(), empty).tolist() == []
    assert found.auroc(torch.tensor([[1.0, 0.0]]), which).tolist() == [1.0, 0.5]
    assert found.begin.tolist() == [0, 0, 0, 0]


def test_a_million_features_and_no_dense_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    feature = torch.randint(0, 1_000_000, (20_000,), generator=generator)
    value = torch.rand(20_000, generator=generator) + 0.1
    found = Sorted.of(feature, value, 1_000_000, 2000, torch.arange(20_000) % 2000)
    asked = torch.tensor([int(feature[0]), 999_999])
    own = value[feature == feature[0]]
    assert found.at_least(asked, torch.tensor([0.05, 2.0])).tolist() == [len(own), 0]
    assert torch.equal(found.feature(), feature.sort().values)
