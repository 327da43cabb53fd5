"""How strongly a property of prompts goes with a property of answers: exact counts, nothing approximated."""

from __future__ import annotations

import math
from collections.abc import Mapping

from casehard.errors import DataError


def _check(both: int, a: int, b: int, n: int) -> None:
    if not (0 <= both <= min(a, b) and max(a, b) <= n and a + b - both <= n):
        raise DataError(f"counts that no table has: both={both}, a={a}, b={b}, n={n}")


def log_odds(both: int, a: int, b: int, n: int) -> float:
    """Return the log odds ratio of a 2 x 2 table with 0.5 added to every cell.

    Args:
        both: rows with both properties.
        a: rows with the first.
        b: rows with the second.
        n: all rows.

    Source: Haldane (1956), Anscombe (1956).
    """
    _check(both, a, b, n)
    cells = (both, a - both, b - both, n - a - b + both)
    yes, first, second, none = (math.log(cell + 0.5) for cell in cells)
    return yes + none - first - second


def log10_tail(both: int, a: int, b: int, n: int) -> float:
    """Return log10 P(X >= both), X hypergeometric: the chance of so many shared rows if nothing ties the two.

    Source: Fisher (1935), one-sided exact test.
    """
    _check(both, a, b, n)
    if both <= max(0, a + b - n):
        return 0.0  # no table has fewer: P is 1 exactly

    terms = [_log_choose(b, x) + _log_choose(n - b, a - x) for x in range(both, min(a, b) + 1)]
    top = max(terms)
    total = top + math.log(math.fsum(math.exp(t - top) for t in terms)) - _log_choose(n, a)
    return min(0.0, total / math.log(10))


def expected_distinct(holders: Mapping[int, int], n: int, k: int) -> float:
    """Return how many different words k texts hold on average, drawn from n without replacement.

    Args:
        holders: for each number of texts, how many words are in exactly so many of the n.
    """
    never = {c: math.exp(_log_choose(n - c, k) - _log_choose(n, k)) if n - c >= k else 0.0 for c in holders}
    return math.fsum(words * (1.0 - never[c]) for c, words in holders.items())


def _log_choose(m: int, k: int) -> float:
    return math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1)
