"""Agreement of two raters on the same items, beyond chance. Standard library only."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from casehard.errors import DataError
from casehard.maths.stats import Interval, rate_interval
from casehard.seeds import derive

Pair = tuple[str, str]
FEW = 30
"""Items below which a bootstrap alone is too narrow."""
WORK = 2_000_000
"""Resampled items that an interval may take: beyond 1,000 items there are fewer than 2,000 draws, at least 200."""


class Agreement(NamedTuple):
    """What two raters have in common on ``n`` items."""

    n: int
    same: int
    """Items on which they agree."""
    share: Interval
    """95 % interval of ``same / n``."""
    kappa: float | None
    """Cohen's kappa; None where either says one and the same thing of every item: there is nothing to tell apart."""
    interval: Interval | None
    """Its 95 % interval: percentile bootstrap; where that cannot vary (all or none agree) or items are fewer than FEW,
    the interval of ``share`` at the chance agreement seen as well, whichever reaches further. None without kappa."""


def cohen_kappa(counts: Mapping[Pair, int]) -> float | None:
    """Return kappa = (p_o - p_e) / (1 - p_e); None where a rater says the same of every item.

    p_o is the share of items on which the raters agree, p_e the sum over categories c of p_1(c) p_2(c), the shares of
    the items that each puts there. With one word for all, p_o is p_e whatever the other says: nothing was measured.

    Args:
        counts: (what the first says, what the second says) -> items; at least one item.

    Source: Cohen (1960), A coefficient of agreement for nominal scales.
    """
    if any(len({pair[rater] for pair in counts}) < 2 for rater in (0, 1)):
        return None
    n = sum(counts.values())
    same = sum(count for (one, other), count in counts.items() if one == other)
    return (n * same - _chance(counts)) / (n * n - _chance(counts))


def _chance(counts: Mapping[Pair, int]) -> int:
    """Return p_e, times the square of the number of items."""
    first, second = Counter[str](), Counter[str]()
    for (one, other), count in counts.items():
        first[one] += count
        second[other] += count
    return sum(first[category] * second[category] for category in first)


def agreement(pairs: Sequence[Pair], *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> Agreement:
    """Measure how far two raters agree; items are resampled with both ratings.

    Args:
        pairs: (what the first says, what the second says), one an item.

    Raises:
        DataError: no items.
    """
    if not pairs:
        raise DataError("agreement needs items that both raters have rated", hint="were all rows unscored?")
    n, counts = len(pairs), Counter(pairs)
    same = sum(count for (one, other), count in counts.items() if one == other)
    share, kappa = rate_interval(same, n, level), cohen_kappa(counts)
    if kappa is None:
        return Agreement(n, same, share, None, None)
    rng = random.Random(derive(seed, n, "agreement"))
    cells, weights = list(counts), list(counts.values())
    draws = max(200, min(draws, WORK // n))
    found = [cohen_kappa(Counter(rng.choices(cells, weights, k=n))) for _ in range(draws)]
    known = sorted(k for k in found if k is not None)
    ends = []
    if 2 * len(known) >= draws:
        tail = int((1 - level) / 2 * len(known))
        ends += [known[tail], known[-1 - tail]]
    if same in (0, n) or n < FEW or not ends:
        ends += [_at(rate, counts) for rate in share]
    return Agreement(n, same, share, kappa, Interval(min(ends), max(ends)))


def _at(rate: float, counts: Mapping[Pair, int]) -> float:
    """Return the kappa of a share of agreement, at the chance agreement of a table."""
    chance = _chance(counts) / sum(counts.values()) ** 2
    return max(-1.0, (rate - chance) / (1 - chance))
