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
    """Cohen's kappa; None where both say one and the same thing of every item, so that chance explains all."""
    interval: Interval | None
    """Its 95 % percentile bootstrap interval; None where fewer than half of the resamples have a kappa."""


def cohen_kappa(counts: Mapping[Pair, int]) -> float | None:
    """Return kappa = (p_o - p_e) / (1 - p_e); None where p_e is 1.

    p_o is the share of items on which the raters agree, p_e the sum over categories c of p_1(c) p_2(c), the shares of
    the items that each puts there.

    Args:
        counts: (what the first says, what the second says) -> items; at least one item.

    Source: Cohen (1960), A coefficient of agreement for nominal scales.
    """
    n = sum(counts.values())
    first, second = Counter[str](), Counter[str]()
    for (one, other), count in counts.items():
        first[one] += count
        second[other] += count
    same = sum(count for (one, other), count in counts.items() if one == other)
    # Whole numbers: with floats, "chance explains all" would be a matter of rounding.
    chance = sum(first[category] * second[category] for category in first)
    return None if chance == n * n else (n * same - chance) / (n * n - chance)


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
    rng = random.Random(derive(seed, n, "agreement"))
    cells, weights = list(counts), list(counts.values())
    draws = max(200, min(draws, WORK // n))
    found = [cohen_kappa(Counter(rng.choices(cells, weights, k=n))) for _ in range(draws)]
    known = sorted(kappa for kappa in found if kappa is not None)
    same = sum(count for (one, other), count in counts.items() if one == other)
    interval = None
    if 2 * len(known) >= draws:
        tail = int((1 - level) / 2 * len(known))
        interval = Interval(known[tail], known[-1 - tail])
    return Agreement(n, same, rate_interval(same, n, level), cohen_kappa(counts), interval)
