import math
import random
import statistics
import time

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casehard.errors import DataError
from casehard.maths import stats


def binomial_at_least(k: int, n: int, p: float) -> float:
    """Sum the binomial tail term by term: the slow, obvious twin of the incomplete beta function."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def at_least(k: int, n: int, p: float, *, others: bool = False):
    """Sum the same tail, of 1 - p with ``others``, with 50 digits: the twin for counts that no float holds."""
    with mpmath.workdps(50):
        p = 1 - mpmath.mpf(p) if others else mpmath.mpf(p)
        term = mpmath.binomial(n, k) * p**k * (1 - p) ** (n - k)
        total = mpmath.mpf(0)
        while k <= n and term > total * mpmath.mpf(10) ** -12:
            total, term, k = total + term, term * (n - k) / (k + 1) * p / (1 - p), k + 1
        return total


def half_tail(k: int, n: int):
    """Return P(X <= k) of n fair coins."""
    return at_least(n - k, n, 0.5)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        # Newcombe (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_the_published_table(k, n, low, high):
    got = stats.wilson(k, n)
    assert got.low == pytest.approx(low, abs=5e-5)
    assert got.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        # Newcombe (1998), table I, method 5.
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0000, 0.1684),
        (1, 29, 0.0009, 0.1776),
    ],
)
def test_clopper_pearson_matches_the_published_table(k, n, low, high):
    got = stats.clopper_pearson(k, n)
    assert got.low == pytest.approx(low, abs=5e-5)
    assert got.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.99))
def test_clopper_pearson_bounds_solve_the_binomial_tails(pair, level):
    k, n = pair
    got = stats.clopper_pearson(k, n, level)
    tail = (1 - level) / 2
    if k > 0:
        assert binomial_at_least(k, n, got.low) == pytest.approx(tail, rel=1e-8)
    else:
        assert got.low == 0
    if k < n:
        assert 1 - binomial_at_least(k + 1, n, got.high) == pytest.approx(tail, rel=1e-6)
    else:
        assert got.high == 1


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.001, 0.999))
def test_beta_cdf_equals_the_binomial_tail(k, more, x):
    n = k + more
    assert stats.beta_cdf(x, k, n - k + 1) == pytest.approx(binomial_at_least(k, n, x), abs=1e-9)


def test_large_counts_stay_accurate():
    low, high = stats.clopper_pearson(500_000, 1_000_000)
    assert 0.5 - low == pytest.approx(1.96 * math.sqrt(0.25 / 1e6), rel=1e-2)
    assert high - 0.5 == pytest.approx(0.5 - low, rel=1e-3)
    assert stats.clopper_pearson(0, 3).high == pytest.approx(1 - 0.025 ** (1 / 3), abs=1e-12)


@pytest.mark.parametrize("k", [0, 96])
def test_rate_interval_is_exact_at_the_ends(k):
    assert stats.rate_interval(k, 96) == stats.clopper_pearson(k, 96)


@given(st.integers(2, 300).flatmap(lambda n: st.tuples(st.integers(1, n - 1), st.just(n))))
def test_rate_interval_holds_the_rate(pair):
    k, n = pair
    got = stats.rate_interval(k, n)
    assert got == stats.wilson(k, n)
    assert 0 <= got.low < k / n < got.high <= 1


def test_wilson_covers_about_as_often_as_it_says():
    n, p = 96, 0.3
    covered = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if stats.wilson(k, n).low <= p <= stats.wilson(k, n).high
    )
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
@pytest.mark.parametrize("interval", [stats.wilson, stats.clopper_pearson, stats.rate_interval])
def test_impossible_counts_are_refused(interval, k, n):
    with pytest.raises(DataError, match=f"k={k}, n={n}"):
        interval(k, n)


@pytest.mark.parametrize(
    ("b", "c", "p"), [(0, 0, 1.0), (0, 5, 2 / 32), (1, 9, 22 / 1024), (7, 7, 1.0), (10, 2, 158 / 4096)]
)
def test_mcnemar_counts_by_hand(b, c, p):
    assert stats.mcnemar(b, c) == pytest.approx(p)
    assert stats.mcnemar(c, b) == stats.mcnemar(b, c)


def test_mcnemar_survives_many_pairs():
    assert 0 < stats.mcnemar(700, 900) < 1e-5


@pytest.mark.parametrize(
    ("b", "c"), [(950, 1051), (5000, 5200), (50_000, 50_500), (50_000, 50_000), (0, 5000), (10**7, 10**7 + 5000)]
)
def test_mcnemar_of_huge_counts_is_exact_and_quick(b, c):
    begin = time.perf_counter()
    p = stats.mcnemar(b, c)
    assert time.perf_counter() - begin < 1
    exact = 1 if b == c else 2 * half_tail(b, b + c)
    assert p == pytest.approx(float(exact), rel=1e-9)
    assert stats.mcnemar(c, b) == p


def test_mcnemar_by_hand_at_five_thousand():
    assert stats.mcnemar(5000, 5200) == pytest.approx(0.04879, abs=5e-6)


@pytest.mark.parametrize(
    ("k", "n"), [(1, 10**6), (3, 10**8), (10**7, 2 * 10**7), (10**7, 10**12), (0, 10**18), (10**9, 10**9)]
)
def test_clopper_pearson_of_huge_counts_solves_the_tails(k, n):
    begin = time.perf_counter()
    low, high = stats.clopper_pearson(k, n)
    assert time.perf_counter() - begin < 1
    assert (low == 0) == (k == 0) and (high == 1) == (k == n)
    if k > 0:
        assert float(at_least(k, n, low)) == pytest.approx(0.025, rel=1e-6)
    if k < n:
        assert float(at_least(n - k, n, high, others=True)) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize(("k", "n"), [(1, 10**9), (5 * 10**8, 10**9), (10**9 - 1, 10**9)])
def test_wilson_of_huge_counts_solves_its_equation(k, n):
    z = mpmath.mpf(statistics.NormalDist().inv_cdf(0.975))
    rate, spread = mpmath.mpf(k) / n, z * z / n
    half = mpmath.sqrt(rate * (1 - rate) * spread + spread**2 / 4)
    want = [(rate + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1)]
    assert stats.wilson(k, n) == pytest.approx([float(w) for w in want], rel=1e-9)


def test_beta_cdf_near_zero_is_exact():
    assert stats.t_quantile(0.999999, 1) == pytest.approx(1 / math.tan(math.pi * 0.5e-6), rel=1e-9)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1, 1), (3, 0.5), (1, 300), (40, 2), (96, 97), (1e6, 3e5), (2, 1e9)])
@pytest.mark.parametrize("p", [1e-6, 0.025, 0.3, 0.975, 1 - 1e-6])
def test_the_quantile_is_the_one_that_halving_finds(a, b, p):
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2.0) not in (low, high):
        low, high = (middle, high) if stats.beta_cdf(middle, a, b) < p else (low, middle)
    assert stats.beta_quantile(p, a, b) == pytest.approx(low, rel=1e-8, abs=1e-15)


def test_a_huge_bootstrap_is_the_normal_interval_and_quick():
    rng = random.Random(0)
    values = [rng.expovariate(1.0) for _ in range(stats.LARGE + 1)]
    weights = [rng.random() for _ in values]
    begin = time.perf_counter()
    got = stats.bootstrap_mean(values, weights=weights)
    assert time.perf_counter() - begin < 2
    slow = stats.bootstrap_mean(values[:-1], weights=weights[:-1], draws=80)
    width = slow.high - slow.low
    assert (got.low, got.high) == pytest.approx((slow.low, slow.high), abs=0.2 * width)
    # One prompt of a million tokens among short ones: nothing normal about that, so it is resampled.
    heavy = stats.bootstrap_mean([5.0, *[1.0] * stats.LARGE], weights=[1e6, *[1.0] * stats.LARGE], draws=8)
    assert heavy.low == 1.0 and heavy.high > heavy.mean


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (30, 2.0423)])
def test_t_quantile_matches_the_tables(freedom, expected):
    assert stats.t_quantile(0.95, freedom) == pytest.approx(expected, abs=5e-5)


def test_bootstrap_matches_the_normal_interval_and_repeats():
    values = [float(i % 10) for i in range(400)]
    got = stats.bootstrap_mean(values, draws=1000)
    spread = math.sqrt(8.25 / 400)
    assert got.mean == 4.5
    assert got.low == pytest.approx(4.5 - 1.96 * spread, abs=0.06)
    assert got.high == pytest.approx(4.5 + 1.96 * spread, abs=0.06)
    assert got == stats.bootstrap_mean(values, draws=1000)
    assert got != stats.bootstrap_mean(values, draws=1000, seed=1)


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("n", [1, 7, 150])
@pytest.mark.parametrize("weighted", [False, True])
def test_bootstrap_is_the_slow_loop_to_the_last_bit(monkeypatch, n, weighted, kept):
    monkeypatch.setattr(stats, "KEPT", kept)
    rng = random.Random(n)
    values = [rng.choice([-1, 0, 1]) / 3 for _ in range(n)]
    weights = [float(rng.randrange(1, 9)) for _ in range(n)] if weighted else None
    heavy = weights or [1.0] * n
    again, means = random.Random(stats.derive(5, n, "bootstrap")), []
    for _ in range(60):
        picked = again.choices(range(n), k=n)
        means.append(sum(heavy[i] * values[i] for i in picked) / sum(heavy[i] for i in picked))
    means.sort()
    got = [stats.bootstrap_mean(values, weights=weights, draws=60, seed=5) for _ in range(2)]
    assert got[0] == got[1]
    assert (got[0].low, got[0].high) == (stats._quantile(means, 0.025), stats._quantile(means, 0.975))


def test_bootstrap_weights_are_those_of_the_prompts():
    got = stats.bootstrap_mean([1.0, 3.0], weights=[30, 10], draws=200)
    assert got.mean == 1.5
    assert (got.low, got.high) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("values", "weights"), [([], None), ([1.0, math.nan], None), ([1.0], [0.0]), ([1.0, 2.0], [1.0])]
)
def test_bootstrap_refuses_what_has_no_mean(values, weights):
    with pytest.raises(DataError):
        stats.bootstrap_mean(values, weights=weights)


def test_paired_bootstrap_uses_the_pairs():
    # Prompts differ a lot, the two models by .1 on every prompt: only a paired interval sees that.
    a = [float(i) for i in range(50)]
    b = [x + 0.1 for x in a]
    got = stats.paired_bootstrap(a, b, draws=300)
    assert got.low == pytest.approx(0.1) and got.high == pytest.approx(0.1)
    assert not stats.made_no_difference(got.low, got.high)
    same = stats.paired_bootstrap([0, 1] * 40, [1, 0] * 40, draws=300)
    assert stats.made_no_difference(same.low, same.high)
    with pytest.raises(DataError, match="50 and 49"):
        stats.paired_bootstrap(a, b[:-1])


def test_seed_band_names_its_kind():
    assert stats.seed_band([0.4]) == stats.Band(0.4, 0.0, 0.4, 0.4, 1, "single seed")
    two = stats.seed_band([0.2, 0.6])
    assert (two.low, two.high, two.kind) == (0.2, 0.6, "range")
    three = stats.seed_band([0.50, 0.60, 0.70])
    assert three.kind == "t"
    assert three.high - three.mean == pytest.approx(4.3027 * 0.1 / math.sqrt(3), abs=1e-4)
    assert stats.seed_band([0.0, 0.0, 0.9], bounds=(0, 1)).low == 0
    with pytest.raises(DataError):
        stats.seed_band([])
    with pytest.raises(DataError):
        stats.seed_band([0.1, math.inf])


def test_no_difference_includes_the_boundary():
    assert stats.made_no_difference(0.0, 0.4)
    assert stats.Interval(-0.1, 0.1).contains_zero
    assert not stats.made_no_difference(0.01, 0.4)
