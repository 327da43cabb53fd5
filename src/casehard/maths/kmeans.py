"""k-means: Lloyd's algorithm from k-means++ centres, in the rows' own space.

    start    c_1 a row at random;  c_j a row drawn with probability  min_l |x_i - c_l|^2 / sum                  (1)
    assign   a_i = argmin_j |x_i - c_j|^2                                                                       (2)
    move     c_j = mean of the rows with a_i = j                                                                (3)
(2) and (3) in turn until no row moves. Ties go to the lowest centre. A centre without rows takes the row that is
farthest from its own centre, so that k centres stay k while there are k distinct rows.

Letters: n rows, d dimensions, k centres; distances are made a tile of rows at a time, never n x k at once.
Source: Lloyd 1982; Arthur and Vassilvitskii 2007 (k-means++).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from casehard.errors import ConfigError

TILE = 8192
ROUNDS = 100


class Clusters(NamedTuple):
    """What k-means found."""

    centres: torch.Tensor
    """(k, d), float64."""
    member: torch.Tensor
    """Centre of each row, (n,)."""
    distance: torch.Tensor
    """Squared distance of each row to its centre, (n,), float64."""


def kmeans(rows: torch.Tensor, k: int, *, generator: torch.Generator, rounds: int = ROUNDS) -> Clusters:
    """Cluster rows.

    Args:
        rows: (n, d).
        k: centres, 1..n.
        generator: of the starting centres, on the CPU; nothing else is drawn.
        rounds: most repetitions of (2) and (3).

    Raises:
        ConfigError: k outside 1..n.
    """
    if not 1 <= k <= len(rows):
        raise ConfigError(f"k: {k} clusters of {len(rows)} rows", hint=f"1..{len(rows)}")
    centres = rows[starting_rows(rows, k, generator=generator)].double()
    member = torch.full((len(rows),), -1, device=rows.device)
    for _ in range(rounds):
        before = member
        member, distance = assign(rows, centres)
        if torch.equal(member, before):
            break
        centres = _moved(rows, member, distance, centres)
    member, distance = assign(rows, centres)
    return Clusters(centres, member, distance)


def starting_rows(rows: torch.Tensor, k: int, *, generator: torch.Generator) -> list[int]:
    """Return the row numbers of (1); where fewer than k rows differ, the lowest that are left."""
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = _squared(rows, rows[chosen].double()).squeeze(1)
    while len(chosen) < k:
        nearest[chosen] = 0.0
        mass = nearest.cumsum(0)
        drawn = torch.rand((), generator=generator, dtype=torch.float64).item() * float(mass[-1])
        if float(mass[-1]) > 0:
            # The first row whose running sum exceeds the draw: one without distance adds nothing and is never it.
            at = min(int((mass > drawn).to(torch.uint8).argmax()), len(rows) - 1)
        else:
            at = next(i for i in range(len(rows)) if i not in set(chosen))
        chosen.append(at)
        torch.minimum(nearest, _squared(rows, rows[[at]].double()).squeeze(1), out=nearest)
    return chosen


def assign(rows: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (2): the nearest centre of each row, and the squared distance to it."""
    found = [_squared(rows[a : a + TILE], centres).min(1) for a in range(0, len(rows), TILE)]
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def nearest_rows(clusters: Clusters) -> list[int]:
    """Return, for each centre with rows, that one of its rows which is nearest to it; centres in order."""
    out = []
    for j in range(len(clusters.centres)):
        own = (clusters.member == j).nonzero().flatten()
        if len(own):
            out.append(int(own[clusters.distance[own].argmin()]))
    return out


def _moved(rows: torch.Tensor, member: torch.Tensor, distance: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return (3)."""
    sums, counts = torch.zeros_like(centres), torch.bincount(member, minlength=len(centres))
    for a in range(0, len(rows), TILE):
        sums.index_add_(0, member[a : a + TILE], rows[a : a + TILE].double())
    moved = sums / counts.clamp(min=1).unsqueeze(1)
    far = distance.clone()
    for j in (counts == 0).nonzero().flatten().tolist():
        row = int(far.argmax())
        moved[j] = rows[row].double()
        far[row] = 0.0
    return moved


def _squared(rows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return squared distances (n, k), float64: |x|^2 - 2 x c + |c|^2, which rounding may not take below 0."""
    wide = rows.double()
    cross = wide @ centres.T
    return (wide.square().sum(1, keepdim=True) - 2 * cross + centres.square().sum(1)).clamp_(min=0.0)
