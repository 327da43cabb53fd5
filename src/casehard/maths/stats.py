"""Intervals and tests for rates, means and paired differences. Standard library only, so a report needs no torch.

k successes in n trials; ``level`` is the coverage of an interval (.95). Everything random takes a seed and is a
function of it. Which interval for what:

| quantity | interval |
|---|---|
| rate k/n | Wilson; exact binomial (Clopper-Pearson) where k is 0 or n: :func:`rate_interval` |
| mean over prompts, weighted or not | percentile bootstrap: :func:`bootstrap_mean` |
| difference of two models on the same prompts | paired bootstrap, or exact McNemar for yes/no outcomes |
| seeds | t-interval of the mean from three seeds on, the range for two: :func:`seed_band` |
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from casehard.errors import DataError
from casehard.seeds import derive

EXACT = 2000
"""Discordant prompts up to which McNemar's sum is taken in whole numbers; its time grows with their cube."""
LARGE = 20_000
"""Values up to which a mean is always resampled."""


class Interval(NamedTuple):
    """Two bounds, low <= high."""

    low: float
    high: float

    @property
    def contains_zero(self) -> bool:
        """Whether the data are compatible with no difference."""
        return self.low <= 0.0 <= self.high


class Estimate(NamedTuple):
    """A mean (or mean difference) over ``n`` prompts with its interval."""

    mean: float
    low: float
    high: float
    n: int


class Band(NamedTuple):
    """What ``n`` seeds say: mean, sample standard deviation, and the interval named by ``kind``."""

    mean: float
    sd: float
    low: float
    high: float
    n: int
    kind: Literal["t", "range", "single seed"]


def _check_count(k: int, n: int) -> None:
    if n <= 0 or not 0 <= k <= n:
        raise DataError(
            f"a rate needs 0 <= k <= n and n >= 1, got k={k}, n={n}", hint="were all rows unscored or filtered out?"
        )


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise DataError(f"the coverage of an interval lies between 0 and 1, got {level}", hint="use 0.95")


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Evaluate the continued fraction of the incomplete beta function (modified Lentz)."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 10_000_000):  # about sqrt(max(a, b)) are needed
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + numerator / c
            c = c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return value


def beta_cdf(x: float, a: float, b: float) -> float:
    """Return I_x(a, b), the regularised incomplete beta function, for a, b > 0.

    Source: Abramowitz and Stegun 26.5.8; the symmetry I_x(a, b) = 1 - I_{1-x}(b, a) keeps the fraction convergent.
    """
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    front = math.exp(_log_front(x, a, b))
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(x, a, b) / a
    return 1.0 - front * _beta_fraction(1.0 - x, b, a) / b


def _log_front(x: float, a: float, b: float) -> float:
    """Return log(x^a (1-x)^b / B(a, b)) without taking large logarithms of gamma from each other.

    That loses eight digits at a billion trials. With Stirling's formula they cancel on paper, and what is left are the
    deviations of x from a / (a + b). Source: Loader (2000), Fast and accurate computation of binomial probabilities.
    """
    total = a + b
    off = x * total - a
    left, right = x * total / a, (1.0 - x) * total / b
    log_left = math.log1p(off / a) if left > 0.5 else math.log(left)
    log_right = math.log1p(-off / b) if right > 0.5 else math.log(right)
    spread = math.log(a) + math.log(b / total) - math.log(2.0 * math.pi)
    rests = _stirling_rest(total) - _stirling_rest(a) - _stirling_rest(b)
    return a * log_left + b * log_right + spread / 2.0 + rests


def _stirling_rest(z: float) -> float:
    """Return log Gamma(z) - ((z - 1/2) log z - z + log(2 pi) / 2)."""
    if z < 30.0:
        return math.lgamma(z) - (z - 0.5) * math.log(z) + z - 0.5 * math.log(2.0 * math.pi)
    return (1.0 - (1.0 / 30.0 - 1.0 / (105.0 * z * z)) / (z * z)) / (12.0 * z)


def beta_quantile(p: float, a: float, b: float) -> float:
    """Return x with I_x(a, b) = p, exact to about 1e-15: Newton's steps, halving where one leaves the bracket."""
    low, high, x = 0.0, 1.0, a / (a + b)
    for _ in range(200):
        off = beta_cdf(x, a, b) - p
        slope = math.exp(_log_front(x, a, b)) / (x * (1.0 - x))
        step = x - off / slope if slope > 0.0 else -1.0
        if off == 0.0 or abs(step - x) <= 1e-16 * x:
            break
        low, high = (x, high) if off < 0.0 else (low, x)
        after = step if low < step < high else (low + high) / 2.0
        if after in (low, high):
            break
        x = after
    return x


def t_quantile(level: float, freedom: int) -> float:
    """Return the two-sided quantile t with P(|T| <= t) = ``level`` for ``freedom`` degrees of freedom.

    Example: ``t_quantile(0.95, 2)`` is 4.303, the factor for three seeds.
    """
    x = beta_quantile(1.0 - level, freedom / 2.0, 0.5)
    return math.sqrt(freedom * (1.0 - x) / x)


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Return the Wilson score interval of a rate.

    Source: Wilson (1927), without continuity correction.

    Raises:
        DataError: k or n out of range.
    """
    _check_count(k, n)
    _check_level(level)
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2.0)
    rate, spread = k / n, z * z / n
    centre = (rate + spread / 2.0) / (1.0 + spread)
    half = math.sqrt(rate * (1.0 - rate) * spread + spread * spread / 4.0) / (1.0 + spread)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


@lru_cache(maxsize=2**14)  # a summary asks for the same few counts over and over
def clopper_pearson(k: int, n: int, level: float = 0.95) -> Interval:
    """Return the exact binomial interval of a rate.

    ``low`` solves P(X >= k) = (1 - level) / 2 and ``high`` solves P(X <= k) = (1 - level) / 2. For 0 of 3 the interval
    is [0, .708]: three clean trials say little.

    Source: Clopper and Pearson (1934).

    Raises:
        DataError: k or n out of range.
    """
    _check_count(k, n)
    _check_level(level)
    tail = (1.0 - level) / 2.0
    if k in (0, n):  # (1 - bound)^n = tail in closed form
        bound = -math.expm1(math.log(tail) / n)
        return Interval(0.0, bound) if k == 0 else Interval(1.0 - bound, 1.0)
    return Interval(beta_quantile(tail, k, n - k + 1), beta_quantile(1.0 - tail, k + 1, n - k))


def rate_interval(k: int, n: int, level: float = 0.95) -> Interval:
    """Return the interval shown beside every rate: exact for 0/n and n/n, Wilson otherwise."""
    _check_count(k, n)
    return clopper_pearson(k, n, level) if k in (0, n) else wilson(k, n, level)


def mcnemar(b: int, c: int) -> float:
    """Return the two-sided exact p-value that two models differ on the same yes/no prompts.

    p = min(1, 2 P(X <= min(b, c))) with X ~ Binomial(b + c, 1/2); summed in whole numbers up to EXACT discordant
    prompts, beyond by the incomplete beta function, which is the same sum (to ten digits at a million).

    Args:
        b: prompts where only the first model says yes.
        c: prompts where only the second does.

    Source: McNemar (1947), exact binomial form.
    """
    if b < 0 or c < 0:
        raise DataError(f"discordant counts cannot be negative, got b={b}, c={c}")
    total, least = b + c, min(b, c)
    if total > EXACT:
        return min(1.0, 2.0 * beta_cdf(0.5, total - least, least + 1))
    # Integer arithmetic: 2 ** total leaves the range of a float from 1024 discordant prompts on.
    tail = sum(math.comb(total, i) for i in range(least + 1))
    return min(1.0, 2 * tail / 2**total)


def _quantile(ordered: Sequence[float], p: float) -> float:
    place = p * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


KEPT = 1_000_000
"""Most indices of resamples that are kept for the next comparison of as many prompts; 8 bytes each."""


@lru_cache(maxsize=4)
def _kept_resamples(n: int, draws: int, seed: int) -> tuple[tuple[int, ...], ...]:
    return tuple(_draw_resamples(n, draws, seed))


def _draw_resamples(n: int, draws: int, seed: int) -> Iterator[tuple[int, ...]]:
    rng, every = random.Random(derive(seed, n, "bootstrap")), list(range(n))
    return (tuple(rng.choices(every, k=n)) for _ in range(draws))


def _resamples(n: int, draws: int, seed: int) -> Iterable[tuple[int, ...]]:
    """Return ``draws`` resamples of n prompts: a function of the three, and a report asks for the same ones often."""
    return (_kept_resamples if n * draws <= KEPT else _draw_resamples)(n, draws, seed)


def bootstrap_mean(
    values: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Estimate a mean over prompts with a percentile bootstrap interval.

    Beyond LARGE values it is the normal interval that the bootstrap tends to, unless a few values outweigh the others:
    a draw of a million takes a second, and there are thousands.

    Args:
        values: one number per prompt, e.g. nats per token.
        weights: one non-negative weight per prompt, e.g. its tokens; each draw resamples prompts with their weights,
            so the interval is that of sum(w v) / sum(w).
        draws: resamples.
        seed: fixes the resamples.

    Raises:
        DataError: no values, values that are not finite, or weights that do not fit them.
    """
    n = len(values)
    _check_level(level)
    if n == 0 or not all(math.isfinite(v) for v in values):
        raise DataError(f"a bootstrap needs finite values, got {n} of which not all are finite or none exist")
    heavy = [1.0] * n if weights is None else list(weights)
    if len(heavy) != n or not all(math.isfinite(w) and w >= 0 for w in heavy) or sum(heavy) <= 0:
        raise DataError(f"expected {n} non-negative weights, not all zero, got {len(heavy)}")
    products = [w * v for w, v in zip(heavy, values, strict=True)]
    mean, tail = sum(products) / sum(heavy), (1.0 - level) / 2.0
    if n > LARGE and (spread := _spread(values, heavy, mean)) is not None:
        half = statistics.NormalDist().inv_cdf(1.0 - tail) * spread
        return Estimate(mean, mean - half, mean + half, n)
    means = []
    for picked in _resamples(n, draws, seed):
        total = float(n) if weights is None else sum(map(heavy.__getitem__, picked))
        if total > 0:
            means.append(sum(map(products.__getitem__, picked)) / total)
    means.sort()
    return Estimate(mean, _quantile(means, tail), _quantile(means, 1.0 - tail), n)


def _spread(values: Sequence[float], weights: Sequence[float], mean: float) -> float | None:
    """Return the standard deviation of a resampled weighted mean; None where single values decide its distribution."""
    parts = [(w * (v - mean)) ** 2 for w, v in zip(weights, values, strict=True)]
    return math.sqrt(math.fsum(parts)) / math.fsum(weights) if max(parts) <= 0.01 * math.fsum(parts) else None


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Estimate mean(b) - mean(a) over the same prompts, resampling prompts and keeping the pairs together.

    Raises:
        DataError: the two lists differ in length or are empty.
    """
    if len(a) != len(b):
        raise DataError(
            f"paired values must belong to the same prompts, got {len(a)} and {len(b)}",
            hint="join the two sets of rows by id first",
        )
    return bootstrap_mean([y - x for x, y in zip(a, b, strict=True)], draws=draws, seed=seed, level=level)


def seed_band(values: Sequence[float], *, level: float = 0.95, bounds: tuple[float, float] | None = None) -> Band:
    """Summarise one number per seed.

    From three seeds on the interval is the t-interval of the mean. Two seeds give their range, because a t-interval on
    one degree of freedom (12.7 standard errors) says nothing a reader can use; one seed gives no interval and is called
    "single seed".

    Args:
        values: one value per seed.
        bounds: limits the quantity cannot leave, (0, 1) for rates; they clip the t-interval.

    Raises:
        DataError: no values, or values that are not finite.
    """
    n = len(values)
    _check_level(level)
    if n == 0 or not all(math.isfinite(v) for v in values):
        raise DataError(f"a band over seeds needs at least one value, all finite, got {list(values)!r}")
    mean = statistics.fmean(values)
    if n == 1:
        return Band(mean, 0.0, mean, mean, 1, "single seed")
    sd = statistics.stdev(values)
    if n == 2:
        return Band(mean, sd, min(values), max(values), 2, "range")
    half = t_quantile(level, n - 1) * sd / math.sqrt(n)
    low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(bounds[0], low), min(bounds[1], high)
    return Band(mean, sd, low, high, n, "t")


def made_no_difference(low: float, high: float) -> bool:
    """Return whether the interval of a difference contains 0, which reports print as "made no difference"."""
    return low <= 0.0 <= high
