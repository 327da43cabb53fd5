"""Cohen's kappa against published tables, a naive twin and simulated raters."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from casehard.errors import DataError
from casehard.maths.agreement import WORK, agreement, cohen_kappa


def square(a, b, c, d):
    """Return the pairs of a table of yes and no."""
    return [("y", "y")] * a + [("y", "n")] * b + [("n", "y")] * c + [("n", "n")] * d


@pytest.mark.parametrize(
    ("table", "kappa"),
    [
        ((20, 5, 10, 15), 0.4),
        ((45, 15, 25, 15), 0.1304),
        ((25, 35, 5, 35), 0.2593),
        ((5, 0, 0, 5), 1),
        ((0, 5, 5, 0), -1),
    ],
)
def test_known_tables(table, kappa):
    assert cohen_kappa(Counter(square(*table))) == pytest.approx(kappa, abs=5e-5)


def naive(pairs):
    """Return kappa as it is defined, category by category."""
    n = len(pairs)
    agree = sum(a == b for a, b in pairs) / n
    chance = sum(
        sum(a == c for a, _ in pairs) / n * sum(b == c for _, b in pairs) / n
        for c in {x for pair in pairs for x in pair}
    )
    return (agree - chance) / (1 - chance)


def test_it_equals_its_definition_on_any_table():
    rng = random.Random(0)
    for _ in range(50):
        pairs = [(rng.choice("abc"), rng.choice("abd")) for _ in range(rng.randint(5, 40))]
        assert cohen_kappa(Counter(pairs)) == pytest.approx(naive(pairs))


def test_where_chance_explains_all_there_is_none():
    found = agreement([("a", "a")] * 7)
    assert (found.kappa, found.interval, found.same, found.n) == (None, None, 7, 7)
    with pytest.raises(DataError, match="rated"):
        agreement([])


@pytest.mark.parametrize("pairs", [[("a", "a")] * 9 + [("b", "a")], [("a", "a"), ("a", "b"), ("a", "c")]])
def test_a_rater_with_one_word_for_all_has_no_kappa(pairs):
    for some in (pairs, [(b, a) for a, b in pairs]):
        assert (agreement(some).kappa, agreement(some).interval) == (None, None)


def test_full_agreement_of_a_few_is_not_certain():
    few, many = agreement(square(1, 0, 0, 2)), agreement(square(300, 0, 0, 300))
    # At least 29 % of items agree (exact interval of 3 of 3), where chance makes 5 of 9 agree.
    assert few.kappa == 1 and few.interval == (pytest.approx((0.025 ** (1 / 3) - 5 / 9) / (4 / 9)), 1)
    assert many.kappa == 1 and 0.98 < many.interval.low < 1 == many.interval.high
    assert agreement(square(1, 0, 0, 1)).interval.low == pytest.approx((0.025**0.5 - 0.5) / 0.5)


@pytest.mark.parametrize("n", [4, 8, 15, 40])
@pytest.mark.parametrize("copies", [0.5, 0.97])
def test_intervals_of_a_few_items_hold_what_they_say(n, copies):
    rng, held = random.Random(2), []
    for draw in range(150):
        first = [rng.choice("yn") for _ in range(n)]
        found = agreement([(a, a if rng.random() < copies else rng.choice("yn")) for a in first], draws=200, seed=draw)
        held += [found.interval.low <= copies <= found.interval.high] if found.interval else []
    assert sum(held) >= 0.9 * len(held)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, held, truth = random.Random(1), 0, 0.5  # second rater copies the first half of the time, else guesses
    for draw in range(100):
        first = [rng.choice("yn") for _ in range(80)]
        pairs = [(a, a if rng.random() < 0.5 else rng.choice("yn")) for a in first]
        interval = agreement(pairs, draws=200, seed=draw).interval
        held += interval.low <= truth <= interval.high
    assert held >= 87  # of 100, where 95 are expected


def test_it_is_a_function_of_pairs_and_seed_and_takes_fewer_draws_of_many():
    pairs = square(20, 5, 10, 15)
    assert agreement(pairs, draws=200) == agreement(pairs, draws=200) != agreement(pairs, draws=200, seed=1)
    many = pairs * 80
    assert agreement(many, draws=WORK) == agreement(many, draws=WORK // len(many))
