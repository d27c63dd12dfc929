"""What is counted of a corpus: against plain loops over dense activations, and the laws by which parts add up."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lancet.atlas import company, finish, statistics
from lancet.atlas.sketch import LEVELS, SomePairs, TokenMass, levels
from lancet.atlas.statistics import BINS, UNIT, Active, Layout, Statistics
from lancet.errors import DamagedError, LancetError

F, OCTAVE = 7, 4


def layout(seed: int, pieces: int = 12, longest: int = 60) -> Layout:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, pieces)
    piece = np.repeat(np.arange(pieces), lengths)
    position = np.concatenate([np.arange(1, n + 1) for n in lengths])
    hashes = rng.integers(0, 1 << 63, pieces).astype(np.uint64) * np.uint64(2)
    document = hashes[np.arange(pieces) // 2 * 2]  # two pieces each
    number = np.arange(pieces, dtype=np.int32) + seed * pieces
    return Layout(piece, position, rng.integers(0, 9, len(piece)), hashes, document, number)


def dense(seed: int, own: Layout, signed: bool = False) -> np.ndarray:
    """[tokens, F] float32, many equal values among them; the last feature never fires."""
    rng = np.random.default_rng(seed + 1000)
    value = np.round(rng.gamma(1.5, 1.0, (len(own.piece), F)), 1) * (rng.random((len(own.piece), F)) < 0.3)
    value[:, -1] = 0
    value[:, 0] *= rng.random(len(own.piece)) < 0.05
    if signed:
        value *= rng.choice([-1, 1], value.shape)
    return value.astype(np.float32)


def active(own: Layout, value: np.ndarray) -> Active:
    token, feature = value.nonzero()
    shuffled = np.random.default_rng(0).permutation(len(token))
    token, feature = token[shuffled], feature[shuffled]
    return Active.of(token, feature, value[token, feature], F, own)


def counted(seeds: list[int] | tuple[int, ...], signed: bool = False) -> Statistics:
    out = Statistics(F, OCTAVE)
    for seed in seeds:
        own = layout(seed)
        out.add(active(own, dense(seed, own, signed)))
    return out


def assert_same(a: Statistics, b: Statistics) -> None:
    left, right = a.arrays(), b.arrays()
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Bounds so small that a few tokens reach them."""
    patch.setattr(statistics, "DENSE", 0)
    patch.setattr(statistics, "TokenMass", lambda d_sae: TokenMass(d_sae, most=6))
    patch.setattr(statistics, "SomePairs", lambda d_sae: SomePairs(d_sae, most=5))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.mark.parametrize("signed", [False, True])
def test_counts_and_extremes(signed: bool) -> None:
    found = counted(range(4), signed)
    fired, total = np.zeros(F, int), np.zeros(F, int)
    histogram, positions = np.zeros((F, BINS), int), np.zeros((F, 10), int)
    seen: dict[int, list[float]] = defaultdict(list)
    for seed in range(4):
        own = layout(seed)
        for t, row in enumerate(dense(seed, own, signed)):
            for f, value in enumerate(row.tolist()):
                if value == 0:
                    continue
                fired[f] += 1
                total[f] += round(value * UNIT)
                seen[f].append(value)
                edges = [2.0**OCTAVE * 2 ** ((i - BINS) / 4) for i in range(BINS)]
                histogram[f, max((i for i in range(BINS) if edges[i] <= abs(value)), default=0)] += 1
                positions[f, min(9, int(own.position[t]).bit_length() - 1)] += 1
    np.testing.assert_array_equal(found.fired, fired)
    np.testing.assert_array_equal(found.total, total)
    np.testing.assert_array_equal(found.histogram, histogram)
    np.testing.assert_array_equal(found.positions, positions)
    assert found.maximum.tolist() == pytest.approx([max(seen[f], default=0) for f in range(F)])
    assert found.minimum.tolist() == pytest.approx([min(seen[f], default=0) for f in range(F)])
    assert found.tokens == sum(len(layout(seed).piece) for seed in range(4))


def peaks_of(feature: int, seeds: range, signed: bool) -> list[dict[str, Any]]:
    out = []
    for seed in seeds:
        own = layout(seed)
        value = dense(seed, own, signed)[:, feature]
        for p in range(len(own.hash)):
            inside = value[own.piece == p]
            if not inside.any():
                continue
            at = int(np.abs(inside).argmax())  # the first of equals
            window = []
            for t in range(at - 16, at + 16):
                share = inside[t] / inside[at] if 0 <= t < len(inside) else 0
                window.append(round(float(np.float32(np.clip(share, 0, 1)) * np.float32(255))))
            hash_, document = int(own.hash[p]), int(own.document[p])
            out.append({"value": inside[at], "at": at, "hash": hash_, "document": document, "window": window})
    return out


@pytest.mark.parametrize("signed", [False, True])
def test_examples(signed: bool) -> None:
    found, seeds = counted(range(5), signed), range(5)
    edges = finish.bounds(found)
    chosen = finish.examples(found, edges)
    size = finish.largest(found)
    for f in range(F):
        own = chosen["peak"]["feature"] == f
        got = [
            (
                int(band),
                int(rank),
                float(peak["value"]),
                int(peak["hash"]),
                int(peak["peak"]),
                peak["strengths"].tolist(),
            )
            for band, rank, peak in zip(chosen["band"][own], chosen["rank"][own], chosen["peak"][own], strict=True)
        ]
        peaks = peaks_of(f, seeds, signed)
        best: dict[int, dict[str, Any]] = {}
        for peak in sorted(peaks, key=lambda p: (-abs(p["value"]), p["hash"])):
            best.setdefault(peak["document"], peak)
        expected = [(0, rank, peak) for rank, peak in enumerate(list(best.values())[:20])]
        borders = [2.0**OCTAVE * 2 ** ((int(e) - BINS) / 4) for e in edges[f]]
        for band in range(1, 6):
            inside = [p for p in peaks if sum(abs(p["value"]) >= border for border in borders) == band - 1]
            inside.sort(key=lambda p: p["hash"])
            expected += [(band, rank, peak) for rank, peak in enumerate(inside[:5])]
        told = [(b, r, float(p["value"]), p["hash"], p["at"], p["window"]) for b, r, p in expected]
        assert got == told, f
        for fraction, border in zip(finish.FRACTIONS, borders, strict=True):
            if size[f]:
                assert abs(np.log2(border / (fraction * size[f]))) <= 0.1251


@pytest.mark.parametrize("exact", [True, False])
def test_company_and_tokens(exact: bool, request: pytest.FixtureRequest) -> None:
    if not exact:
        request.getfixturevalue("small")
    found, seeds = counted(range(4)), range(4)
    assert isinstance(found.pairs, SomePairs) is not exact
    values = np.concatenate([dense(seed, layout(seed)) for seed in seeds])
    ids = np.concatenate([layout(seed).ids for seed in seeds])
    level = levels(np.concatenate([layout(seed).uid for seed in seeds]))
    lit = values != 0
    company_of: dict[int, list[tuple[int, float]]] = defaultdict(list)
    firings: list[int] = []
    for feature, other, share, fired in company.together(found):
        firings += fired.tolist()
        for f, o, s in zip(feature.tolist(), other.tolist(), share.tolist(), strict=True):
            company_of[f].append((o, s))
    held = found.fires.by_token()
    for f in range(F):
        own = lit[:, f]
        floor = 0  # the smallest level from which on no more than the bound fire
        while not exact and (own & (level >= floor)).sum() > 5:
            floor += 1
        sample = own & (level >= floor)
        assert firings[f] == sample.sum()
        expected = []
        for o in range(F):
            both = int((sample & lit[:, o]).sum())
            if o != f and both:
                share = both / sample.sum()
                expected.append((-share * np.sqrt(own.sum() / lit[:, o].sum()), o, share))
        assert [o for o, _ in company_of[f]] == [o for _, o, _ in sorted(expected)]
        assert [s for _, s in company_of[f]] == pytest.approx([s for *_, s in sorted(expected)])
        floor = 0
        while not exact and len(set(zip(level[own & (level >= floor)], ids[own & (level >= floor)], strict=True))) > 6:
            floor += 1
        mass: dict[int, int] = defaultdict(int)
        for t in np.flatnonzero(own & (level >= floor)):
            mass[int(ids[t])] += round(float(values[t, f]) * UNIT)
        got = [(int(t), int(m)) for g, t, m in zip(*held, strict=True) if g == f]
        assert got == sorted(mass.items(), key=lambda item: (-item[1], item[0]))


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 4), st.integers(0, 4), st.booleans())
def test_parts_add_up_in_any_order(order: list[int], first: int, second: int, bounded: bool) -> None:
    """Associative and commutative: any order of shards, any two cuts, merged from the left and from the right."""
    with pytest.MonkeyPatch.context() as patch:
        if bounded:
            make_small(patch)
        a, b = sorted((first, second))
        parts = [counted(order[:a]), counted(order[a:b]), counted(order[b:])]
        whole = counted(range(5))
        left, right = copy.deepcopy(parts), copy.deepcopy(parts)
        left[0].merge(left[1])
        left[0].merge(left[2])
        right[1].merge(right[2])
        right[1].merge(right[0])
        assert_same(left[0], whole)
        assert_same(right[1], whole)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(2.0**-30, 2.0**30, width=32), min_size=1, max_size=20), st.integers(-8, 12))
def test_bins(sizes: list[float], octave: int) -> None:
    found = statistics.bins(np.array(sizes, np.float32), octave)
    for size, index in zip(sizes, found.tolist(), strict=True):
        exact = 4 * (np.log2(size) - octave) + BINS
        near = abs(exact - round(exact)) < 1e-5
        assert index == np.clip(np.floor(exact), 0, BINS - 1) or near


def test_levels() -> None:
    uid = np.array([(1 << 64) - 1, 1 << 63, 1 << 62, 1 << 40, 0], np.uint64)
    assert levels(uid).tolist() == [0, 0, 1, 23, LEVELS - 1]


@pytest.mark.parametrize("exact", [True, False])
def test_files(tmp_path: Path, exact: bool, request: pytest.FixtureRequest) -> None:
    """What is written and read goes on as what was not, and the same statistics give the same bytes."""
    if not exact:
        request.getfixturevalue("small")
    counted([0, 1]).save(tmp_path / "a", done=[0, 1])
    loaded, told = Statistics.load(tmp_path / "a")
    assert told["done"] == [0, 1]
    own = layout(2)
    loaded.add(active(own, dense(2, own)))
    assert_same(loaded, counted([2, 1, 0]))
    loaded.save(tmp_path / "b")
    counted([1, 2, 0]).save(tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    (tmp_path / "b").write_bytes((tmp_path / "b").read_bytes()[:-1])
    with pytest.raises(DamagedError):
        Statistics.load(tmp_path / "b")


def test_nothing_fires() -> None:
    own = layout(0)
    found = Statistics(F, OCTAVE)
    found.add(active(own, np.zeros((len(own.piece), F), np.float32)))
    assert found.tokens == len(own.piece)
    assert not found.fired.any()
    assert len(finish.examples(found, finish.bounds(found))["peak"]) == 0


def test_what_is_not_finite_is_refused() -> None:
    own = layout(0)
    value = dense(0, own)
    value[3, 3] = np.inf
    with pytest.raises(LancetError, match="not finite"):
        active(own, value)
