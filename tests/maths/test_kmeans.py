"""k-means against a twin written from the definition, and what its centres promise."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from casehard.errors import ConfigError
from casehard.maths import kmeans as fast
from casehard.maths.kmeans import assign, kmeans, nearest_rows, starting_rows


def rows(n=40, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def naive(points, centres, rounds=100):
    """Lloyd's algorithm in plain Python from given centres; (assignment, centres)."""
    points, centres = [p.tolist() for p in points], [c.tolist() for c in centres]
    member = None
    for _ in range(rounds):
        found = [min(range(len(centres)), key=lambda j: (round(math.dist(p, centres[j]) ** 2, 12), j)) for p in points]
        if found == member:
            break
        member = found
        for j in range(len(centres)):
            own = [p for p, m in zip(points, member, strict=True) if m == j]
            if own:
                centres[j] = [sum(column) / len(own) for column in zip(*own, strict=True)]
    return member, centres


@pytest.mark.parametrize("k", [1, 3, 7])
def test_kmeans_equals_the_plain_algorithm_from_the_same_start(k, monkeypatch):
    monkeypatch.setattr(fast, "TILE", 9)
    points = rows()
    start = points[starting_rows(points, k, generator=draw())]
    member, centres = naive(points, start)
    found = kmeans(points, k, generator=draw())
    assert found.member.tolist() == member
    assert torch.allclose(found.centres, torch.tensor(centres, dtype=torch.float64))
    near = [
        min((i for i, m in enumerate(member) if m == j), key=lambda i: math.dist(points[i], centres[j]))
        for j in range(k)
    ]
    assert nearest_rows(found) == near and len(set(near)) == k


def test_no_row_is_nearer_to_another_centre_and_the_spread_never_grows_with_rounds():
    points = rows(80, 4, 1)
    found = kmeans(points, 6, generator=draw(2))
    every = torch.cdist(points, found.centres).square()
    assert torch.allclose(found.distance, every.amin(1), atol=1e-10)
    spread = [float(kmeans(points, 6, generator=draw(2), rounds=r).distance.sum()) for r in (1, 2, 4, 100)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(spread))


def test_starting_centres_are_drawn_by_squared_distance():
    # Three groups on a line at 0, 1 and 3: after a start in the first, the far one is drawn 9 times of 10.
    line = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    seconds = [s[1] for i in range(900) if (s := starting_rows(line, 2, generator=draw(i)))[0] == 0]
    assert abs(seconds.count(2) / len(seconds) - 0.9) < 4 * math.sqrt(0.09 / len(seconds))


def test_clear_groups_are_found_and_equal_rows_are_no_obstacle():
    points = torch.cat([torch.full((5, 2), float(c)) for c in (0, 10, 20)]) + torch.tensor(
        [[random.Random(i).random() / 10] * 2 for i in range(15)]
    )
    assert [i // 5 for i in sorted(nearest_rows(kmeans(points, 3, generator=draw())))] == [0, 1, 2]
    same = torch.ones(6, 3)
    assert sorted(starting_rows(same, 6, generator=draw())) == list(range(6))
    assert nearest_rows(kmeans(same, 3, generator=draw())) == [0]
    assert assign(same, same[:2].double())[0].tolist() == [0] * 6


def test_more_clusters_than_rows_are_refused():
    for k in (0, 7):
        with pytest.raises(ConfigError, match=r"1\.\.6"):
            kmeans(rows(6), k, generator=draw())
