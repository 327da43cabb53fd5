"""Near-duplicate texts: MinHash over word pairs proposes, exact Jaccard similarity decides."""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

_PRIME = (1 << 61) - 1
_BANDS, _ROWS = 12, 3


def words_of(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, lower-cased."""
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def shingles(words: Sequence[str]) -> frozenset[Hashable]:
    """Return the word pairs of a text, or its one word."""
    return frozenset(itertools.pairwise(words)) if len(words) > 1 else frozenset(words)


def jaccard(a: frozenset[Hashable], b: frozenset[Hashable]) -> float:
    """Return |a & b| / |a | b|, 1 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


def near_duplicates(texts: Mapping[int, Sequence[str]], similar: float) -> list[list[int]]:
    """Group texts whose word pairs have a Jaccard similarity of at least ``similar`` with the group's first text.

    Args:
        texts: words of each text, by its number.
        similar: threshold in (0, 1]. Pairs just above it may be missed, far above it hardly: at .9 one in a million.

    Returns:
        Groups of two texts and more, in ascending order of their first number.
    """
    exact: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, words in texts.items():
        exact[tuple(words)].append(i)
    kinds = list(exact)
    sets = [shingles(words) for words in kinds]
    buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
    leader: dict[int, int] = {}
    for k, some in enumerate(sets):
        keys = _bands(some)
        near = {j for key in keys for j in buckets.get(key, ()) if leader[j] == j}
        best = max(near, key=lambda j: (jaccard(some, sets[j]), -j), default=None)
        leader[k] = best if best is not None and jaccard(some, sets[best]) >= similar else k
        if leader[k] == k:
            for key in keys:
                buckets[key].append(k)
    groups: dict[int, list[int]] = defaultdict(list)
    for k, first in leader.items():
        groups[first] += exact[kinds[k]]
    return sorted((sorted(rows) for rows in groups.values() if len(rows) > 1), key=lambda rows: rows[0])


def _hashers() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    rng = random.Random(20_26)
    drawn = [(rng.randrange(1, _PRIME), rng.randrange(_PRIME)) for _ in range(_BANDS * _ROWS)]
    first, second = np.array(drawn, dtype=np.uint64).T[:, :, None]
    return first, second


_HASHERS = _hashers()


def _hashed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return (a * v + b) mod 2**61 - 1 of values below 2**32, a row for each hasher (a, b)."""
    a, b = _HASHERS
    low, high = np.uint64((1 << 30) - 1), np.uint64(30)
    # A product has 93 bits: a is split at bit 31, and 2**61 is 1 here.
    upper = (a >> np.uint64(31)) * values % np.uint64(_PRIME)
    shifted = (upper >> high) + ((upper & low) << np.uint64(31))
    hashed: npt.NDArray[np.uint64] = (shifted + (a & np.uint64((1 << 31) - 1)) * values + b) % np.uint64(_PRIME)
    return hashed


def _bands(some: frozenset[Hashable]) -> list[tuple[int, ...]]:
    values = [zlib.crc32(repr(item).encode()) for item in some] or [0]
    least = _hashed(np.array(values, dtype=np.uint64)).min(axis=1).tolist()
    return [(band, *least[band * _ROWS : (band + 1) * _ROWS]) for band in range(_BANDS)]
