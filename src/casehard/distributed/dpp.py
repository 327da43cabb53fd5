"""The selection of :mod:`casehard.maths.dpp` for a pool whose rows are spread over the ranks of a run."""

from __future__ import annotations

import math

import torch

from casehard.distributed.ranks import rank, world
from casehard.maths.dpp import JITTER, TIE, ZERO, Greedy, best_index, log_residuals


def greedy_map_sharded(
    rows: torch.Tensor, k: int, *, weights: torch.Tensor | None = None, jitter: float = JITTER
) -> Greedy:
    """Pick ``k`` rows of a pool whose rows are spread over the ranks in order; every rank returns the same.

    Exact: the plain loop in float64. A pick costs one all-gather of (score, index) and one broadcast of d + 1 numbers.

    Args:
        rows: this rank's part of phi, (n_rank, d); the pool is the concatenation over ranks.
        k, weights, jitter: as in :func:`greedy_map`; ``weights`` is this rank's part.
    """
    device = rows.device
    counts = _gather(torch.tensor([float(len(rows))], dtype=torch.float64, device=device)).flatten().long()
    first, total = int(counts[: rank()].sum()), int(counts.sum())
    phi = rows.double()
    w = torch.zeros(len(phi), dtype=torch.float64, device=device) if weights is None else weights.double()
    r = phi.square().sum(1) + jitter
    scale = float(_gather(r.amax().view(1) if len(r) else r.new_zeros(1)).max())
    left = torch.ones(len(phi), dtype=torch.bool, device=device)
    k = min(k, total)
    basis = torch.zeros(k, phi.shape[1], dtype=torch.float64, device=device)
    order: list[int] = []
    gains: list[float] = []
    exhausted: int | None = None
    for t in range(k):
        mine = [-math.inf, math.inf, 0.0, 0.0]
        if bool(left.any()):
            score = w + log_residuals(r, jitter, scale)
            i = best_index(score, left)
            if float(score[i]) == -math.inf:
                i = best_index(w, left)
            mine = [float(score[i]), float(first + i), float(w[i]), max(float(r[i]), jitter)]
        offers = _gather(torch.tensor(mine, dtype=torch.float64, device=device)).tolist()
        top = max(score for score, *_ in offers)
        tied = [c for c in offers if c[1] < math.inf and (c[0] >= top - TIE or top == -math.inf)]
        _, index, _, residual = min(tied, key=lambda c: (c[1],) if top > -math.inf else (-c[2], c[1]))
        j = int(index)
        owner = int((counts.cumsum(0) <= j).sum())
        message = torch.zeros(phi.shape[1] + 1, dtype=torch.float64, device=device)
        if owner == rank():
            here, so_far = phi[j - first], basis[:t]
            c = so_far @ here
            message[-1] = w[j - first]
            if top > -math.inf:
                message[:-1] = (here - c @ so_far) / math.sqrt(residual)
            left[j - first] = False
        if world() > 1:
            torch.distributed.broadcast(message, src=owner)
        basis[t] = message[:-1]
        r -= (phi @ basis[t]).square_()
        order.append(j)
        gains.append(float(message[-1]) + math.log(residual) if top > -math.inf else -math.inf)
        if exhausted is None and (top == -math.inf or residual < max(100.0 * jitter, ZERO * scale)):
            exhausted = t
    return Greedy(order, gains, exhausted, k)


def _gather(value: torch.Tensor) -> torch.Tensor:
    """Return the ranks' vectors, (ranks, size)."""
    if world() == 1:
        return value.unsqueeze(0)
    out = [torch.empty_like(value) for _ in range(world())]
    torch.distributed.all_gather(out, value)
    return torch.stack(out)
