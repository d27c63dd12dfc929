"""What would grow with the corpus, kept in bounded memory and yet exact: samples that depend on the text alone.

A token's **level** is the number of leading zeros of a hash of its piece and position: half of all tokens have level 0,
a quarter level 1, and so on. Of each feature only tokens from its own **floor** up are counted, and the floor is the
smallest at which no more than a bound's worth is held. Rare features are so counted whole, frequent ones on a fair
sample. What lies above a floor is counted exactly, and floors of parts never lie above the floor of the whole: hence
merging is exact, associative and commutative.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LEVELS = 32
TOKEN_BITS = 20  # of a token's id in a key
KEYS = 8 << 20  # (feature, level, token) masses held in all
MOST_KEYS, LEAST_KEYS = 1024, 32  # of one feature
FIRINGS = 2 << 20  # firings counted with their company in all
MOST_FIRINGS, LEAST_FIRINGS = 64, 8  # of one feature
DENSE = 8660  # features up to which a matrix of all pairs is held: 300 MB
WAITING = 2 << 20  # entries that wait at least, before they are merged
BLOCK = 512  # features of a block of the matrix of pairs


def mixed(hash_: Array, position: Array) -> Array:
    """[n] uint64 of pieces' hashes and positions in them, spread evenly (the finaliser of SplitMix64)."""
    x = hash_ + (position.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def levels(uid: Array) -> Array:
    """[n] leading zeros of the upper 32 bits, at most LEVELS - 1."""
    exponent = np.frexp((uid >> np.uint64(32)).astype(np.float64))[1]
    return np.minimum(32 - exponent, LEVELS - 1).astype(np.uint8)


def raised(count: Array, floor: Array, most: int) -> Array:
    """[d_sae] the smallest levels, none below `floor`, from which on no more than `most` are held.

    Args:
        count: [d_sae, LEVELS] how many are held at each level; what lies below `floor` is not looked at.
    """
    above = count[:, ::-1].cumsum(1)[:, ::-1] > most  # True up to some level, False from there on
    return np.maximum(floor, above.sum(1).astype(np.uint8))


class TokenMass:
    """How much of each feature's activation lies on which token: integers (units of 2^-20) by feature, level and token.

    Attributes:
        key: sorted, (feature * LEVELS + level) << TOKEN_BITS | token id; mass: int64 of each.
        floor: [d_sae] uint8.
    """

    def __init__(self, d_sae: int, most: int = 0) -> None:
        self.d_sae = d_sae
        self.most = most or max(LEAST_KEYS, min(MOST_KEYS, KEYS // d_sae))
        self.key = self.mass = np.empty(0, np.int64)
        self.floor = np.zeros(d_sae, np.uint8)
        self._waiting: list[tuple[Array, Array]] = []

    def add(self, feature: Array, token: Array, level: Array, mass: Array) -> None:
        """Firings: [n] each."""
        keep = level >= self.floor[feature]
        key = (feature[keep].astype(np.int64) * LEVELS + level[keep]) << TOKEN_BITS | token[keep]
        self._add(key, mass[keep])

    def _add(self, key: Array, mass: Array) -> None:
        self._waiting.append((key, mass))
        if sum(len(key) for key, _ in self._waiting) > max(WAITING, len(self.key) // 2):
            self.settle()

    def merge(self, other: TokenMass) -> None:
        """Takes another's masses in."""
        other.settle()
        np.maximum(self.floor, other.floor, out=self.floor)
        self._add(other.key, other.mass)

    def settle(self) -> None:
        """Merges what waits."""
        key, mass = (np.concatenate(parts) for parts in zip((self.key, self.mass), *self._waiting, strict=True))
        self._waiting = []
        keep = (key >> TOKEN_BITS) % LEVELS >= self.floor[key >> TOKEN_BITS + 5]
        key, mass = key[keep], mass[keep]
        order = key.argsort(kind="stable")
        key, mass = key[order], mass[order]
        if len(key):
            starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
            key, mass = key[starts], np.add.reduceat(mass, starts)
        held = np.bincount(key >> TOKEN_BITS, minlength=self.d_sae * LEVELS).reshape(self.d_sae, LEVELS)
        self.floor = raised(held, self.floor, self.most)
        keep = (key >> TOKEN_BITS) % LEVELS >= self.floor[key >> TOKEN_BITS + 5]
        self.key, self.mass = key[keep], mass[keep]

    def by_token(self) -> tuple[Array, Array, Array]:
        """(feature, token, mass) with levels summed up: by feature, then the most first, then by token."""
        self.settle()
        feature, token = self.key >> TOKEN_BITS + 5, self.key & (1 << TOKEN_BITS) - 1
        order = (feature << TOKEN_BITS | token).argsort(kind="stable")
        feature, token, mass = feature[order], token[order], self.mass[order]
        if not len(feature):
            return feature, token, mass
        starts = np.flatnonzero(np.r_[True, (feature[1:] != feature[:-1]) | (token[1:] != token[:-1])])
        feature, token, mass = feature[starts], token[starts], np.add.reduceat(mass, starts)
        order = np.lexsort((token, -mass, feature))
        return feature[order], token[order], mass[order]


class AllPairs:
    """On how many tokens each two features fire together: the whole matrix, [d_sae, d_sae] int32."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.count = np.zeros((d_sae, d_sae), np.int32)

    def add(self, by_token: Any, by_feature: Any, uid: Array) -> None:
        """The same firings as CSR matrices of ones, [tokens, d_sae] and [d_sae, tokens]."""
        for first in range(0, self.d_sae, BLOCK):
            part = by_feature[first : first + BLOCK] @ by_token
            self.count[first : first + BLOCK] += part.toarray()

    def merge(self, other: AllPairs) -> None:
        """Takes another's counts in."""
        self.count += other.count

    def settle(self) -> None:
        """Nothing waits here."""


class SomePairs:
    """Tokens that are kept with all that fires there, so many that each feature has its share of firings among them.

    Attributes:
        uid: [rows] of the kept tokens, sorted; indptr: [rows + 1]; feature: what fires on each.
        floor: [d_sae] uint8; a feature's firings on tokens of lower level, which were kept for others, do not count.
    """

    def __init__(self, d_sae: int, most: int = 0) -> None:
        self.d_sae = d_sae
        self.most = most or max(LEAST_FIRINGS, min(MOST_FIRINGS, FIRINGS // d_sae))
        self.uid, self.size, self.feature = np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int32)
        self.floor = np.zeros(d_sae, np.uint8)
        self._waiting: list[tuple[Array, Array, Array]] = []

    def add(self, by_token: Any, by_feature: Any, uid: Array) -> None:
        """Firings as a CSR matrix [tokens, d_sae]; `uid` [tokens]."""
        size = np.diff(by_token.indptr)
        self._add(uid, size, by_token.indices)

    def _add(self, uid: Array, size: Array, feature: Array) -> None:
        self._waiting.append(self._kept(uid, size.astype(np.int64), feature))
        if sum(len(feature) for *_, feature in self._waiting) > max(WAITING, len(self.feature) // 2):
            self.settle()

    def _kept(self, uid: Array, size: Array, feature: Array) -> tuple[Array, Array, Array]:
        """The tokens that some feature that fires there has above its floor."""
        counts = np.repeat(levels(uid), size) >= self.floor[feature]
        keep = np.bincount(np.repeat(np.arange(len(uid)), size)[counts], minlength=len(uid)) > 0
        return uid[keep], size[keep], feature[np.repeat(keep, size)]

    def merge(self, other: SomePairs) -> None:
        """Takes another's tokens in."""
        other.settle()
        np.maximum(self.floor, other.floor, out=self.floor)
        self._add(other.uid, other.size, other.feature)

    def settle(self) -> None:
        """Merges what waits."""
        parts = zip((self.uid, self.size, self.feature), *self._waiting, strict=True)
        uid, size, feature = (np.concatenate(part) for part in parts)
        self._waiting = []
        order = uid.argsort(kind="stable")
        at = np.repeat((size.cumsum() - size)[order], size[order])  # where each token's features begin
        within = np.arange(len(feature)) - np.repeat(size[order].cumsum() - size[order], size[order])
        uid, size, feature = uid[order], size[order], feature[at + within]
        level = np.repeat(levels(uid), size)
        counts = level >= self.floor[feature]
        key = feature[counts].astype(np.int64) * LEVELS + level[counts]
        held = np.bincount(key, minlength=self.d_sae * LEVELS).reshape(self.d_sae, LEVELS)
        self.floor = raised(held, self.floor, self.most)
        self.uid, self.size, self.feature = self._kept(uid, size, feature)

    def matrices(self) -> tuple[Any, Any]:
        """CSR matrices [rows, d_sae] of the firings that count, and of all that fires on those tokens."""
        from scipy.sparse import csr_matrix

        self.settle()
        indptr = np.r_[0, self.size.cumsum()]
        every = csr_matrix((np.ones(len(self.feature), np.int32), self.feature, indptr), (len(self.uid), self.d_sae))
        own = every.copy()
        own.data[np.repeat(levels(self.uid), self.size) < self.floor[self.feature]] = 0
        own.eliminate_zeros()
        return own, every
