"""Trade-offs: which of several measured settings no other setting beats, and the grid they come from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from casehard.errors import ConfigError
from casehard.limits import WEIGHT, Within


class Coefficients(NamedTuple):
    """Weights of a merge: c_U, c_R and the share of the overlap that is removed."""

    c_user: float
    c_reinforce: float
    alpha: float


def coefficient_grid(
    c_user: Sequence[float] = (0.5, 1.0),
    c_reinforce: Sequence[float] = (0.0, 0.5, 1.0),
    alpha: Sequence[float] = (0.0, 0.1, 1.0),
) -> list[Coefficients]:
    """Return the settings to measure, in order, each once; alpha means nothing where a coefficient is 0.

    Raises:
        ConfigError: an empty axis, a coefficient that no merge takes, or alpha outside 0..1.
    """
    try:
        for value in (*c_user, *c_reinforce):
            Within(-WEIGHT, WEIGHT).check(value)
    except ValueError as error:
        raise ConfigError(f"grid: a coefficient {error}", hint="the paper's are 0.5") from None
    if not (c_user and c_reinforce and alpha) or not all(0 <= a <= 1 for a in alpha):
        raise ConfigError(f"grid: {list(c_user)} x {list(c_reinforce)} x {list(alpha)}", hint="alpha is in 0..1")
    points = (Coefficients(u, r, a if u != 0 and r != 0 else 0.0) for u, r, a in product(c_user, c_reinforce, alpha))
    return list(dict.fromkeys(points))


def pareto_front(points: Sequence[Sequence[float]], *, maximise: Sequence[bool]) -> list[int]:
    """Return the indices of the points that no other point beats, in order; equal points are all kept.

    A point beats another when it is no worse on every axis and better on one.

    Args:
        points: one tuple per setting, one value per axis.
        maximise: per axis, whether larger is better.
    """
    signed = [[v if up else -v for v, up in zip(p, maximise, strict=True)] for p in points]
    front = []
    for i, mine in enumerate(signed):
        beaten = any(all(o >= m for o, m in zip(other, mine, strict=True)) and other != mine for other in signed)
        if not beaten:
            front.append(i)
    return front
