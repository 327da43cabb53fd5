"""The projection against its closed form, a brute-force solver and the properties of docs/methods/spard.md."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casehard.maths.projection import EPS, alpha, multipliers, project_

SEEDS = st.integers(0, 10_000)


def instance(seed: int, count: int = 1, sizes: tuple[int, ...] = (7, 5)):
    g = torch.Generator().manual_seed(seed)
    make = lambda: [torch.randn(n, generator=g, dtype=torch.float64) for n in sizes]  # noqa: E731
    theta, diagonal = make(), [torch.rand(n, generator=g, dtype=torch.float64) + 0.1 for n in sizes]
    return theta, [make() for _ in range(count)], diagonal


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def clone(tensors):
    return [t.clone() for t in tensors]


def run(theta, gradients, violations, diagonal=None, **options):
    moved = clone(theta)
    metric = None if diagonal is None else lambda i, g: diagonal[i] * g
    done = project_(moved, [clone(g) for g in gradients], violations, metric=metric, **options)
    return moved, done


def brute(gram, violations, cap=math.inf):
    """Try every assignment of each multiplier to 0, cap or free; keep the best one that is feasible in the dual."""
    count, best, found = len(violations), math.inf, None
    v = torch.tensor(violations, dtype=torch.float64)
    for states in itertools.product((0, 1, 2) if math.isfinite(cap) else (0, 1), repeat=count):
        x = torch.tensor([cap if s == 2 else 0.0 for s in states], dtype=torch.float64)
        free = [c for c, s in enumerate(states) if s == 1]
        if free:
            x[free] = torch.linalg.lstsq(gram[free][:, free], (v - gram @ x)[free].unsqueeze(1)).solution[:, 0]
        if bool((x < -1e-12).any()) or bool((x > cap + 1e-12).any()):
            continue
        value = float(0.5 * x @ gram @ x - v @ x)
        if value < best - 1e-14:
            best, found = value, x
    return found


@given(SEEDS, st.floats(0.01, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_uncapped_step_meets_the_target_and_is_parallel(seed, violation, euclidean):
    theta, (g,), diagonal = instance(seed)
    m = [torch.ones_like(d) for d in diagonal] if euclidean else diagonal
    moved, done = run(theta, [g], [violation], None if euclidean else diagonal)
    step = flat(moved) - flat(theta)
    assert float(flat(g) @ step) == pytest.approx(-violation, rel=1e-6)
    direction = flat(m) * flat(g)
    assert float(torch.nn.functional.cosine_similarity(step, -direction, dim=0)) == pytest.approx(1, abs=1e-7)
    assert done.length == pytest.approx(float(step.norm()), rel=1e-6)
    assert done.residuals[0] == pytest.approx(0, abs=1e-6) and done.share == 1
    if euclidean:
        assert done.length == pytest.approx(violation / float(flat(g).norm()), rel=1e-6)


@given(SEEDS, st.floats(0.01, 3), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_no_point_of_the_half_spaces_is_closer(seed, violation, count):
    theta, gradients, diagonal = instance(seed, count)
    violations = [violation * (1 if c == 0 else c - 1.5) for c in range(count)]
    moved, _ = run(theta, gradients, violations, diagonal)
    step, m = flat(moved) - flat(theta), flat(diagonal)
    best = float((step.square() / m).sum())
    normals = torch.stack([flat(g) for g in gradients])
    target = -torch.tensor(violations, dtype=torch.float64)
    assert bool((normals @ step <= target + 1e-5).all())
    g = torch.Generator().manual_seed(seed + 1)
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(40):
            other = step + scale * torch.randn(len(step), generator=g, dtype=torch.float64)
            # Bring the perturbed point back inside along each normal that it violates.
            for _ in range(60):
                over = normals @ other - target
                c = int(over.argmax())
                if over[c] <= 0:
                    break
                other = other - over[c] / normals[c].square().sum() * normals[c] * 1.01
            if bool((normals @ other <= target).all()):
                assert float((other.square() / m).sum()) >= best - 2e-5


@given(SEEDS, st.integers(1, 4), st.sampled_from([math.inf, 0.3, 0.02]))
@settings(max_examples=150, deadline=None)
def test_dual_equals_brute_force(seed, count, cap):
    g = torch.Generator().manual_seed(seed)
    normals = torch.randn(count, 6, generator=g, dtype=torch.float64)
    violations = torch.randn(count, generator=g, dtype=torch.float64).tolist()
    gram = normals @ normals.T
    mine = torch.tensor(multipliers(gram, violations, cap=cap).values, dtype=torch.float64)
    want = brute(gram, violations, cap)
    v = torch.tensor(violations, dtype=torch.float64)
    value = lambda x: float(0.5 * x @ gram @ x - v @ x)  # noqa: E731
    assert torch.allclose(mine, want, atol=1e-8)
    assert value(mine) == pytest.approx(value(want), abs=1e-10)


@pytest.mark.parametrize("cap", [math.inf, 0.4])
def test_dependent_gradients_are_solved(cap):
    one = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    normals = torch.stack([one, one, 2 * one])
    violations = [0.5, 0.7, 0.3]
    solved = multipliers(normals @ normals.T, violations, cap=cap)
    step = -torch.tensor(solved.values, dtype=torch.float64) @ normals
    assert solved.feasible
    assert bool((normals @ step <= -torch.tensor(violations, dtype=torch.float64) + 1e-6).all())


def test_conflicting_half_spaces_are_reported_and_the_worst_is_met():
    theta = [torch.zeros(3, dtype=torch.float64)]
    one = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    moved, done = run(theta, [[one], [-one]], [0.2, 0.5])
    assert not done.feasible
    assert done.residuals[1] == pytest.approx(0, abs=1e-6) and moved[0][0] == pytest.approx(0.5, rel=1e-6)
    capped, done = run(theta, [[one], [-one]], [0.2, 0.5], cap=0.1)
    assert done.feasible and torch.allclose(capped[0], theta[0]), "the hinge pulls both ways with the same cap"


@given(SEEDS, st.floats(0.01, 3), st.floats(1e-3, 10))
@settings(max_examples=60, deadline=None)
def test_cap_gives_the_stated_residual(seed, violation, cap):
    theta, (g,), diagonal = instance(seed)
    _, done = run(theta, [g], [violation], diagonal, cap=cap)
    square = float((flat(diagonal) * flat(g).square()).sum())
    assert done.residuals[0] == pytest.approx(max(0.0, violation - cap * square), abs=1e-6)
    assert done.alpha == pytest.approx(min(cap, violation / square), rel=1e-6)
    assert done.share == pytest.approx(min(1.0, cap * square / violation), rel=1e-5)


@given(st.floats(-1, 3), st.floats(-1, 3), st.floats(1e-3, 10), st.floats(0, 5), st.floats(0, 5))
def test_alpha_is_monotone_continuous_and_has_its_limits(low, high, square, cap, more):
    low, high = sorted((low, high))
    assert alpha(low, square, cap=cap) <= alpha(high, square, cap=cap)
    assert alpha(low, square, cap=cap) <= alpha(low, square, cap=cap + more)
    assert abs(alpha(high, square, cap=cap) - alpha(low, square, cap=cap)) <= (high - low) / square + 1e-12
    assert alpha(high, square, cap=0.0) == 0.0
    assert alpha(high, square) == max(high, 0.0) / square


def test_zero_gradient_and_tiny_gradient():
    assert alpha(1.0, 0.0) == 0.0 and alpha(1.0, EPS**2 / 2) == 0.0
    assert alpha(1.0, EPS / 10) == pytest.approx(1 / EPS)
    theta, (g,), _ = instance(0)
    moved, done = run(theta, [[torch.zeros_like(x) for x in g]], [1.0])
    assert all(torch.equal(a, b) for a, b in zip(moved, theta, strict=True)) and done.full == [0.0]


def test_non_finite_gradient_changes_nothing():
    theta, (g,), _ = instance(0)
    g[1][2] = torch.nan
    moved, done = run(theta, [g], [1.0])
    assert done is None and all(torch.equal(a, b) for a, b in zip(moved, theta, strict=True))


@given(SEEDS, st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_scaling_loss_and_target_leaves_the_uncapped_step(seed, factor):
    theta, (g,), diagonal = instance(seed)
    one, _ = run(theta, [g], [0.7], diagonal)
    other, _ = run(theta, [[x * factor for x in g]], [0.7 * factor], diagonal)
    assert torch.allclose(flat(one), flat(other), rtol=1e-6, atol=1e-7)


def test_splitting_merging_and_permuting_tensors():
    theta, gradients, diagonal = instance(3, 2)
    whole, done = run([flat(theta)], [[flat(g)] for g in gradients], [0.4, 0.2], [flat(diagonal)], cap=0.05)
    split, _ = run(theta, gradients, [0.4, 0.2], diagonal, cap=0.05)
    assert torch.allclose(flat(split), whole[0], rtol=1e-7)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed, again = run(
        [flat(theta)[order]], [[flat(g)[order]] for g in gradients], [0.4, 0.2], [flat(diagonal)[order]], cap=0.05
    )
    assert torch.allclose(mixed[0], whole[0][order], rtol=1e-7)
    assert again.alphas == pytest.approx(done.alphas, rel=1e-6)


def test_identity_metric_equals_euclidean():
    theta, gradients, diagonal = instance(4, 2)
    ones = [torch.ones_like(d) for d in diagonal]
    assert torch.equal(flat(run(theta, gradients, [0.4, 0.2])[0]), flat(run(theta, gradients, [0.4, 0.2], ones)[0]))


def test_relative_cap_bounds_the_step_and_telemetry_is_right():
    theta, (g,), diagonal = instance(5)
    _, (u,), _ = instance(6)
    free, done = run(theta, [g], [2.0], diagonal, previous=lambda i: u[i])
    step = flat(free) - flat(theta)
    assert done.previous == pytest.approx(float(flat(u).norm()), rel=1e-6)
    want = float(torch.nn.functional.cosine_similarity(step, flat(u), dim=0))
    assert done.cosine == pytest.approx(want, abs=1e-6)
    short, done = run(theta, [g], [2.0], diagonal, previous=lambda i: u[i], rho=0.1)
    moved = flat(short) - flat(theta)
    assert done.length == pytest.approx(0.1 * float(flat(u).norm()), rel=1e-5)
    assert done.length == pytest.approx(float(moved.norm()), rel=1e-5)
    assert float(torch.nn.functional.cosine_similarity(moved, step, dim=0)) == pytest.approx(1, abs=1e-9)
    assert done.residuals[0] > 0 and done.share < 1


def test_affine_loss_is_met_in_one_step_and_a_quadratic_by_repetition():
    theta, (g,), diagonal = instance(7)
    offset = 1.5
    loss = lambda x: float(flat(g) @ flat(x)) + offset  # noqa: E731
    tau = loss(theta) - 0.8
    moved, _ = run(theta, [g], [loss(theta) - tau], diagonal)
    assert loss(moved) == pytest.approx(tau, abs=1e-6)

    point, losses = clone(theta), []
    centre, curve = flat(instance(8)[0]), flat(diagonal)
    for _ in range(60):
        away = flat(point) - centre
        value = float((curve * away.square()).sum())
        if value <= 0.3 + 1e-9:
            break
        losses.append(value)
        point, _ = run([flat(point)], [[2 * curve * away]], [value - 0.3])
        after = float((curve * (point[0] - centre).square()).sum())
        assert after >= 0.3 - 1e-9, "the linear model of a convex loss lies below it"
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.3 + 1e-3
