"""Projection of a point onto half-spaces, in a diagonal metric, with caps on the step.

Given theta+ and, for each of C constraints, a loss l_c, its gradient g_c and a target tau_c, solve

    min_theta  1/2 ||theta - theta+||^2_{M^-1}   s.t.   l_c + <g_c, theta - theta+> <= tau_c   for c = 1..C          (1)

with M a positive diagonal. The solution is theta+ - M sum_c lambda_c g_c, and lambda solves the C x C dual

    min_{0 <= lambda <= cap}  1/2 lambda' Q lambda - v' lambda,     Q_ab = g_a' M g_b,   v_c = l_c - tau_c           (2)

For C = 1 this is the closed form                   alpha = min(max(v, 0) / g' M g, cap)                             (3)

A finite cap turns the constraints into the penalty cap * sum_c max(0, linearised v_c): (2) is exactly the dual of that,
so the capped step is the proximal step of the hinge. ``radius`` bounds the Euclidean length of the whole step by
shrinking it.

Letters: C constraints, P tensors. Gradients are lists of P tensors seen as one vector: one norm, not one per tensor.
Source: Chen et al., arXiv 2605.28030, Algorithm 1 and eq. for alpha; the metric is ours (docs/methods/spard.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from casehard.maths.tensors import whole, wide

Tensors = Sequence[torch.Tensor]
Metric = Callable[[int, torch.Tensor], torch.Tensor]
"""``metric(i, g)`` returns M g for the i-th tensor; None stands for M = I."""

EPS = 1e-8
"""Smallest g' M g divided by: below it a gradient counts as zero. Source: the paper's eps."""


class Multipliers(NamedTuple):
    """Solution of the dual (2)."""

    values: list[float]
    feasible: bool
    """False when no point satisfies all (uncapped) constraints; then only the most violated one is projected on."""


class Projection(NamedTuple):
    """What a projection did."""

    alphas: list[float]
    """Multiplier of each constraint, as applied."""
    full: list[float]
    """Multipliers without cap and radius."""
    residuals: list[float]
    """Linearised l_c + <g_c, step> - tau_c after the step; <= 0 when satisfied."""
    length: float
    """Euclidean length of the step."""
    feasible: bool
    previous: float | None
    """Euclidean length of the step it corrects, when that was given."""
    cosine: float | None
    """Cosine between the two steps, when the previous one was given."""

    @property
    def alpha(self) -> float:
        """Sum of the applied multipliers; with one constraint, alpha of (3)."""
        return sum(self.alphas)

    @property
    def share(self) -> float:
        """Applied over full alpha, 0..1; 1 when no cap binds."""
        return self.alpha / sum(self.full) if sum(self.full) > 0 else 0.0


def alpha(violation: float, square: float, *, cap: float = math.inf, eps: float = EPS) -> float:
    """Return (3): the multiplier of one half-space; 0 when it holds or its gradient is zero (g' M g < eps^2).

    Args:
        violation: v = l - tau, in nats.
        square: g' M g.
        cap: largest multiplier (eta_safe); ``inf`` for none.
    """
    if violation <= 0 or square < eps * eps:
        return 0.0
    return min(violation / max(square, eps), cap)


def multipliers(gram: torch.Tensor, violations: Sequence[float], *, cap: float = math.inf) -> Multipliers:
    """Solve the dual (2) exactly by an active-set method with bounds (Stark and Parker's BVLS, in Gram form).

    Args:
        gram: Q (C, C), float64, symmetric positive semi-definite.
        violations: v, one a constraint; negative where it holds with room to spare.
        cap: largest multiplier; ``inf`` for none.
    """
    count = len(violations)
    if count == 1:
        return Multipliers([alpha(violations[0], float(gram[0, 0]), cap=cap)], True)
    diagonal = gram.diagonal()
    live = [c for c in range(count) if float(diagonal[c]) >= EPS * EPS]
    out = [0.0] * count
    if not live:
        return Multipliers(out, True)
    # With gradients of unit length all tolerances below are relative.
    size = diagonal[live].sqrt()
    q = gram[live][:, live] / torch.outer(size, size)
    v = torch.tensor([violations[c] for c in live], dtype=torch.float64) / size
    solved = _bounded(q, v, cap * size)
    slack = float((v - q @ solved).max())
    if math.isinf(cap) and slack > 1e-6 * max(float(v.abs().max()), 1e-30):
        worst = int(v.argmax())
        out[live[worst]] = alpha(violations[live[worst]], float(diagonal[live[worst]]))
        return Multipliers(out, False)
    for c, value in zip(live, (solved / size).tolist(), strict=True):
        out[c] = value
    return Multipliers(out, True)


def _bounded(q: torch.Tensor, v: torch.Tensor, cap: torch.Tensor) -> torch.Tensor:
    """Minimise 1/2 x'qx - v'x over 0 <= x <= cap; ``q`` has unit diagonal."""
    count = len(v)
    x = torch.zeros_like(v)
    free: list[int] = []
    tolerance = 1e-13 * (1.0 + float(v.abs().max()))
    # The ridge keeps dependent gradients solvable; an infeasible pair shows as a huge multiplier and a slack above 0.
    ridge = 1e-13 * torch.eye(count, dtype=q.dtype)
    for _ in range(20 * 3 ** min(count, 6)):
        pull = v - q @ x
        can_move = [
            c
            for c in range(count)
            if c not in free and ((x[c] <= 0 and pull[c] > tolerance) or (x[c] > 0 and pull[c] < -tolerance))
        ]
        if not can_move:
            break
        free.append(max(can_move, key=lambda c: abs(float(pull[c]))))
        while free:
            fixed = [c for c in range(count) if c not in free]
            right = v[free] - q[free][:, fixed] @ x[fixed]
            target = torch.linalg.solve((q + ridge)[free][:, free], right)
            inside = (target > 0) & (target < cap[free])
            if bool(inside.all()):
                x[free] = target
                break
            move = target - x[free]
            room = torch.where(move < 0, -x[free] / move, (cap[free] - x[free]) / move)
            reach = torch.where(inside, torch.inf, room)
            hit = int(reach.argmin())
            x[free] = (x[free] + float(reach[hit]) * move).clamp(min=0.0).minimum(cap[free])
            x[free[hit]] = cap[free[hit]] if move[hit] > 0 else 0.0
            free.pop(hit)
    return x


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return whole(torch.sum(wide(a) * wide(b), dtype=torch.float64))


def gram_(gradients: Sequence[Tensors], metric: Metric | None) -> torch.Tensor:
    """Return Q of (2), (C, C) float64 on the CPU, and overwrite each g_c with M g_c.

    One tensor is in flight at a time, so no buffer of the size of all parameters is made.
    """
    count = len(gradients)
    total: torch.Tensor | None = None
    for i in range(len(gradients[0])):
        column = [g[i] for g in gradients]
        moved = [g if metric is None else metric(i, g) for g in column]
        part = torch.stack([_product(column[a], moved[b]) for a in range(count) for b in range(count)])
        total = part if total is None else total + part
        for g, m in zip(column, moved, strict=True):
            if m is not g:
                g.copy_(m)
    assert total is not None
    return total.cpu().view(count, count)


def project_(
    parameters: Tensors,
    gradients: Sequence[Tensors],
    violations: Sequence[float],
    *,
    metric: Metric | None = None,
    cap: float = math.inf,
    rho: float | None = None,
    previous: Callable[[int], torch.Tensor] | None = None,
) -> Projection | None:
    """Project the parameters in place onto the half-spaces of (1).

    Args:
        parameters: theta+, P tensors.
        gradients: C lists of P tensors; **overwritten**.
        violations: l_c - tau_c.
        metric: M; None for the identity.
        cap: largest multiplier (eta_safe).
        rho: bound on ||step|| / ||previous step||; needs ``previous``.
        previous: ``previous(i)`` returns the last update of tensor i (the utility step), for ``rho`` and telemetry.

    Returns:
        What was done; None when a gradient is not finite (nothing was changed).

    Source: Algorithm 1, steps 3 and 4; with several constraints, the projection on their intersection.
    """
    assert rho is None or previous is not None
    gram = gram_(gradients, metric)
    if not bool(torch.isfinite(gram).all()):
        return None
    solved = multipliers(gram, violations, cap=cap)
    full = multipliers(gram, violations).values if math.isfinite(cap) else solved.values
    step = gradients[0]
    for i, s in enumerate(step):
        s.mul_(solved.values[0])
        for c in range(1, len(gradients)):
            s.add_(gradients[c][i], alpha=solved.values[c])
    square, before, both = _lengths(step, previous)
    shrink = 1.0
    if rho is not None and square > 0:
        assert before is not None
        shrink = min(1.0, rho * math.sqrt(before / square))
    if shrink > 0 and square > 0:
        with torch.no_grad():
            for p, s in zip(parameters, step, strict=True):
                p.add_(s.to(p.dtype), alpha=-shrink)
    alphas = [value * shrink for value in solved.values]
    change = gram @ torch.tensor(alphas, dtype=torch.float64)
    residuals = [v - d for v, d in zip(violations, change.tolist(), strict=True)]
    length = shrink * math.sqrt(square)
    if before is None:
        return Projection(alphas, full, residuals, length, solved.feasible, None, None)
    angle = -both / math.sqrt(square * before) if square > 0 and before > 0 else 0.0
    return Projection(alphas, full, residuals, length, solved.feasible, math.sqrt(before), angle)


def _lengths(step: Tensors, previous: Callable[[int], torch.Tensor] | None) -> tuple[float, float | None, float]:
    """Return ||s||^2, ||u||^2 (None without a previous step) and <s, u>, with one read by the host."""
    sums: list[torch.Tensor] = []
    for i, s in enumerate(step):
        u = None if previous is None else previous(i)
        zero = torch.zeros((), dtype=torch.float64, device=s.device)
        sums.append(torch.stack([_product(s, s), *([zero, zero] if u is None else [_product(u, u), _product(s, u)])]))
    square, before, both = torch.stack(sums).sum(0).tolist()
    return square, None if previous is None else before, both
