"""The factor-space merge against dense float64 twins, its bases, and the limits that must hold exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer_fakes import off_the_user
from casehard.errors import ConfigError, DataError, Unsupported
from casehard.maths.lora import core_basis, inner, paper_basis
from casehard.maths.merge import BASES, LoraPair, MergeConfig, compress, dense_parity, merge_pair, merge_states
from casehard.maths.pareto import coefficient_grid, pareto_front

SEEDS = st.integers(0, 100_000)


def draw(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def pair(d_out, d_in, rank, seed, *, true_rank=None, scale=2.0, overlap=None):
    """A random update; ``true_rank`` < rank makes B deficient; ``overlap`` shares half of another's directions."""
    g = torch.Generator().manual_seed(seed)
    a, b = draw(g, rank, d_in) / d_in**0.5, draw(g, d_out, rank)
    if true_rank is not None:
        b = draw(g, d_out, true_rank) @ draw(g, true_rank, rank)
    if overlap is not None:
        b = b + 2 * overlap.b @ draw(g, overlap.rank, rank)
        a = a + 2 * draw(g, rank, overlap.rank) @ overlap.a
    return LoraPair(a, b, scale)


def relative(x, y):
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


def span(matrix, tol=1e-9):
    """Orthonormal basis of a dense matrix's column space, by its full SVD."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, s > tol * s[0]] if float(s[0]) > 0 else u[:, :0]


def twin(user, reinforce, config):
    """Merge with d_out x d_in matrices and nothing clever."""
    fixed, moving = (reinforce, user) if config.protect_safety else (user, reinforce)
    f, m = fixed.delta(), moving.delta()
    q = span(f, max(config.tau, 1e-9) if config.basis == "output" else 1e-9)
    kept = m - config.alpha * (q @ q.T @ m)
    u, r = (kept, f) if config.protect_safety else (f, kept)
    return config.c_user * u + config.c_reinforce * r


def whole(layer, config, reinforce):
    """What a form serves: its factors, and beside ``absorb`` the provider's adapter."""
    beside = config.c_reinforce * reinforce.delta() if config.form == "absorb" else 0.0
    return layer.pair.delta() + beside


@given(SEEDS, st.sampled_from(BASES), st.sampled_from(["concat", "absorb"]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_equals_the_dense_twin(seed, basis, form, protect):
    g = torch.Generator().manual_seed(seed)
    d_out, d_in = (int(v) for v in torch.randint(9, 40, (2,), generator=g))
    r_u, r_r = (int(v) for v in torch.randint(1, 9, (2,), generator=g))
    user = pair(d_out, d_in, r_u, seed, scale=0.7)
    reinforce = pair(d_out, d_in, r_r, seed + 1, overlap=user if seed % 2 else None)
    config = MergeConfig(
        c_user=0.8, c_reinforce=0.6, alpha=float(torch.rand((), generator=g)), basis=basis, form=form, tau=0.0,
        protect_safety=protect,
    )  # fmt: skip
    layer = merge_pair(user, reinforce, config)
    want = twin(user, reinforce, config)
    assert relative(whole(layer, config, reinforce), want) < 1e-11
    assert layer.pair.scale == 1.0 and layer.pair.rank == (r_u if form == "absorb" else r_u + r_r)
    assert layer.report.cosine == pytest.approx(
        float((user.delta() * reinforce.delta()).sum() / user.delta().norm() / reinforce.delta().norm()), abs=1e-9
    )


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("form", ["concat", "absorb"])
def test_fp32_factors_are_exact_to_fp32(basis, form):
    user = pair(96, 64, 8, 0)
    reinforce = pair(96, 64, 16, 1, overlap=user)
    config = off_the_user(alpha=0.7, c_user=0.9, basis=basis, form=form, tau=0.0)
    narrow = [LoraPair(p.a.float(), p.b.float(), p.scale) for p in (user, reinforce)]
    layer = merge_pair(*narrow, config)
    assert layer.pair.a.dtype == layer.pair.b.dtype == torch.float32
    wide = [LoraPair(p.a.double(), p.b.double(), p.scale) for p in narrow]
    assert relative(whole(layer, config, wide[1]), twin(*wide, config)) < 1e-6


def test_by_default_the_user_writes_nothing_where_the_reinforcing_update_writes():
    user = pair(40, 30, 4, 0)
    reinforce = pair(40, 30, 6, 1, overlap=user)
    delta = merge_pair(user, reinforce, MergeConfig()).pair.delta()
    q = span(reinforce.delta())
    assert torch.allclose(q.T @ delta, 0.5 * q.T @ reinforce.delta(), atol=1e-9)
    assert torch.allclose(delta - q @ q.T @ delta, user.delta() - q @ q.T @ user.delta(), atol=1e-9)


@pytest.mark.parametrize("basis", BASES)
@given(SEEDS, st.floats(0, 1))
@settings(max_examples=15, deadline=None)
def test_on_the_users_output_space_only_alpha_acts(basis, seed, alpha):
    user = pair(40, 30, 4, seed)
    reinforce = pair(40, 30, 6, seed + 1, overlap=user)
    config = off_the_user(c_user=0.7, c_reinforce=0.9, alpha=alpha, basis=basis, tau=0.0)
    merged = merge_pair(user, reinforce, config)
    q, delta = span(user.delta()), merged.pair.delta()
    want = 0.7 * q.T @ user.delta() + 0.9 * (1 - alpha) * q.T @ reinforce.delta()
    assert torch.allclose(q.T @ delta, want, atol=1e-10)
    # What does not write into that space is the plain weighted sum.
    off = delta - q @ q.T @ delta
    plain = 0.9 * (reinforce.delta() - q @ q.T @ reinforce.delta())
    assert torch.allclose(off, plain, atol=1e-10)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_energy_falls_as_the_formula_says_and_monotonically(seed):
    user = pair(33, 21, 5, seed)
    reinforce = pair(33, 21, 3, seed + 1, overlap=user if seed % 2 else None)
    q, w = span(user.delta()), reinforce.delta()
    before = float(w.square().sum())
    seen = []
    for alpha in (0.0, 0.1, 0.5, 1.0):
        merged = merge_pair(user, reinforce, off_the_user(c_user=0.0, c_reinforce=1.0, alpha=alpha, tau=0.0))
        seen.append(float(merged.pair.delta().square().sum()))
        removed = float((q.T @ w).square().sum())
        assert seen[-1] == pytest.approx(before - (2 * alpha - alpha**2) * removed, rel=1e-9)
        assert merged.report.removed == pytest.approx(removed / before, rel=1e-9)
        assert merged.report.norm_reinforce == pytest.approx(math.sqrt(before), rel=1e-9)
    assert seen == sorted(seen, reverse=True)


@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_basis_is_orthonormal_complete_and_blind_to_the_split(seed, rank, true_rank):
    true_rank = min(rank, true_rank)
    user = pair(30, 20, rank, seed, true_rank=true_rank)
    basis = core_basis(user, 1e-8)
    k = basis.q.shape[1]
    assert k == true_rank and basis.h is not None
    assert torch.allclose(basis.q.T @ basis.q, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(user.b @ basis.h, basis.q, atol=1e-7)
    g = torch.Generator().manual_seed(seed)
    mix = draw(g, rank, rank) + 3 * torch.eye(rank, dtype=torch.float64)
    order, signs = torch.randperm(rank, generator=g), torch.randint(0, 2, (rank,), generator=g) * 2.0 - 1
    for other in (
        LoraPair(torch.linalg.solve(mix, user.a), user.b @ mix),
        LoraPair(user.a[order], user.b[:, order]),
        LoraPair(signs[:, None] * user.a, user.b * signs),
        LoraPair(user.a * 1e-3, user.b * 1e3),
    ):
        again = core_basis(other, 1e-8)
        assert torch.allclose(again.q @ again.q.T, basis.q @ basis.q.T, atol=1e-6)


def test_the_published_basis_depends_on_the_split_and_ours_does_not():
    user = pair(60, 40, 8, 3)
    stretch = torch.logspace(-2, 2, 8, dtype=torch.float64)
    other = LoraPair(user.a / stretch[:, None], user.b * stretch, user.scale)
    assert relative(other.delta(), user.delta()) < 1e-12
    sizes = [paper_basis(p, 1e-2, peer_rank=99).q.shape[1] for p in (user, other)]
    assert sizes[0] == 8 and sizes[1] < 8
    assert [core_basis(p, 1e-2).q.shape[1] for p in (user, other)] == [8, 8]


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("form", ["concat", "absorb"])
def test_a_fresh_user_adapter_leaves_the_reinforcing_one_exactly(basis, form):
    reinforce = pair(24, 16, 4, 1)
    user = LoraPair(pair(24, 16, 6, 2).a, torch.zeros(24, 6, dtype=torch.float64), 2.0)
    config = off_the_user(c_reinforce=0.3, alpha=1.0, basis=basis, form=form)
    layer = merge_pair(user, reinforce, config)
    assert layer.report.kept == 0 and not layer.report.invented
    assert torch.equal(whole(layer, config, reinforce), 0.3 * 2.0 * reinforce.b @ reinforce.a) or relative(
        whole(layer, config, reinforce), 0.3 * reinforce.delta()
    ) < 1e-15  # fmt: skip
    # QR of zeros, which the published code takes, removes what lies on the first axes.
    published = dense_parity(user, reinforce, alpha=1.0, coefficient=0.3, cast=torch.float32)
    assert relative(published.double(), 0.3 * reinforce.delta()) > 0.3


def test_the_published_basis_removes_directions_that_a_deficient_update_does_not_have():
    user, reinforce = pair(64, 48, 8, 3, true_rank=1), pair(64, 48, 8, 4)
    for b in (user.b, user.b.float().double()):
        layer = merge_pair(user._replace(b=b), reinforce, off_the_user(basis="output", alpha=1.0))
        assert layer.report.kept == 1 and layer.report.removed < 0.1 and not layer.report.invented
    layer = merge_pair(user, reinforce, off_the_user(basis="paper", alpha=1.0))
    ours = merge_pair(user, reinforce, off_the_user(basis="output", alpha=1.0)).report.removed
    assert layer.report.kept == 8 and layer.report.invented and layer.report.removed > 3 * ours
    with pytest.raises(Unsupported, match="deficient"):
        merge_pair(user, reinforce, off_the_user(basis="paper", form="absorb", alpha=1.0))
    told = merge_states({"x": user}, {"x": reinforce}, off_the_user(basis="paper")).notes
    assert any("does not have" in note for note in told)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("form", ["concat", "absorb"])
def test_nothing_to_reinforce_leaves_the_user_and_bits_only_at_weight_one(basis, form):
    g = torch.Generator().manual_seed(0)
    user = LoraPair(draw(g, 4, 16).float(), draw(g, 24, 4).float(), 1.0)
    reinforce = LoraPair(draw(g, 4, 16).float(), torch.zeros(24, 4), 2.0)
    config = off_the_user(c_user=1.0, alpha=1.0, basis=basis, form=form)
    layer = merge_pair(user, reinforce, config)
    # With form absorb an exact zero is subtracted; A and B keep their bits.
    assert torch.equal(layer.pair.a[:4], user.a) and torch.equal(layer.pair.b[:, :4], user.b)
    half = merge_pair(user, reinforce, off_the_user(alpha=1.0, basis=basis, form=form))
    assert relative(half.pair.delta(), 0.5 * user.delta()) < 1e-6
    assert relative(half.pair.delta(), user.delta()) == pytest.approx(0.5, abs=1e-6)


def test_alpha_zero_is_the_weighted_sum_and_a_keeps_its_bytes():
    user, reinforce = pair(20, 12, 3, 0), pair(20, 12, 5, 1)
    layer = merge_pair(user, reinforce, off_the_user(c_user=0.25, c_reinforce=-1.5, alpha=0.0))
    assert relative(layer.pair.delta(), 0.25 * user.delta() - 1.5 * reinforce.delta()) < 1e-14
    layer = merge_pair(user, reinforce, off_the_user(alpha=0.4))
    assert torch.equal(layer.pair.a, torch.cat([user.a, reinforce.a]))


@pytest.mark.parametrize(("d_out", "d_in", "r_u", "r_r"), [(1, 7, 3, 2), (7, 1, 3, 2), (1, 1, 1, 1), (5, 4, 9, 8)])
@pytest.mark.parametrize("basis", BASES)
def test_odd_shapes(d_out, d_in, r_u, r_r, basis):
    user, reinforce = pair(d_out, d_in, r_u, 1), pair(d_out, d_in, r_r, 2)
    config = off_the_user(alpha=0.6, basis=basis, tau=1e-9)
    layer = merge_pair(user, reinforce, config)
    assert relative(layer.pair.delta(), twin(user, reinforce, config)) < 1e-9


def test_truncation_bounds_the_growth_of_an_absorbed_user():
    g = torch.Generator().manual_seed(0)
    user = pair(80, 60, 8, 1)
    u, _, v = torch.linalg.svd(user.b, full_matrices=False)
    user = user._replace(b=u * torch.logspace(0, -6, 8, dtype=torch.float64) @ v)
    reinforce = LoraPair(draw(g, 8, 60), draw(g, 80, 8), 2.0)
    config = off_the_user(form="absorb", alpha=1.0, tau=1e-2)
    cut = merge_pair(user, reinforce, config)
    whole_basis = merge_pair(user, reinforce, off_the_user(form="absorb", alpha=1.0, tau=0.0))
    assert cut.report.growth < whole_basis.report.growth / 100
    assert relative(whole(cut, config, reinforce), twin(user, reinforce, config)) < 1e-9
    told = merge_states({"x": user}, {"x": reinforce}, off_the_user(form="absorb", alpha=1.0, tau=0.0)).notes
    assert any("grew" in note for note in told)


@given(SEEDS, st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_compression_is_the_best_of_its_rank(seed, rank):
    full = pair(25, 18, 10, seed, scale=-1.5)
    small = compress(full, rank)
    s = torch.linalg.svdvals(full.delta())
    assert small.error == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-9)
    assert relative(small.pair.delta(), full.delta()) == pytest.approx(small.error, abs=1e-9)
    assert small.pair.rank == min(rank, 10)


def test_a_merge_cut_to_the_users_rank_reports_its_error():
    user, reinforce = pair(40, 30, 4, 0), pair(40, 30, 4, 1)
    layer = merge_pair(user, reinforce, off_the_user(rank=4))
    exact = merge_pair(user, reinforce, off_the_user())
    assert layer.pair.rank == 4 and exact.pair.rank == 8 and exact.report.error == 0
    assert relative(layer.pair.delta(), exact.pair.delta()) == pytest.approx(layer.report.error, rel=1e-6)
    assert layer.report.error > 0.1
    assert compress(LoraPair(user.a, 0 * user.b), 2).error == 0.0


def test_the_published_way_agrees_in_fp32_and_loses_small_updates_in_half_precision():
    g = torch.Generator().manual_seed(0)
    user, reinforce = pair(256, 200, 8, 0), pair(256, 200, 8, 1)
    small = [p._replace(b=p.b * 1.2e-5) for p in (user, reinforce)]
    config = off_the_user(basis="paper")
    exact = merge_pair(*small, config).pair.delta()
    assert relative(dense_parity(*small, cast=torch.float32).double(), exact) < 1e-5
    base = (0.02 * torch.randn(256, 200, generator=g)).bfloat16().float()
    realised = dense_parity(*small, base=base, cast=torch.bfloat16) - base
    # Entries are about 2.5e-5 against a half-ulp of about 6e-5 at 0.02: most of the update does not land.
    assert float((realised != 0).float().mean()) < 0.6
    assert relative(realised.double(), exact) > 0.4
    stored = merge_pair(*small, config).pair
    half = stored.b.bfloat16().double() @ stored.a.bfloat16().double()
    assert relative(half, exact) < 0.01


def test_the_union_of_layers_with_its_notes():
    both, mine, theirs = (pair(9, 7, 2, s) for s in range(3))
    result = merge_states({"b": both, "u": mine}, {"b": theirs, "r": theirs}, off_the_user(c_user=0.3))
    assert list(result.layers) == ["b", "r", "u"] and set(result.reports) == {"b"}
    assert (result.user_only, result.reinforce_only, result.reinforce_weight) == (("u",), ("r",), None)
    assert relative(result.layers["u"].delta(), 0.3 * mine.delta()) < 1e-15
    assert relative(result.layers["r"].delta(), 0.5 * theirs.delta()) < 1e-15
    assert len(result.notes) == 2
    absorbed = merge_states({"b": both, "u": mine}, {"b": theirs, "r": theirs}, off_the_user(form="absorb"))
    assert list(absorbed.layers) == ["b", "u"] and absorbed.reinforce_weight == 0.5
    assert any("share no layer" in n for n in merge_states({"u": mine}, {"r": theirs}, off_the_user()).notes)


def test_equal_inputs_give_equal_bits_and_inner_is_the_dense_product():
    user, reinforce = pair(50, 40, 6, 0), pair(50, 40, 7, 1)
    for form in ("concat", "absorb"):
        one, two = (merge_pair(user, reinforce, off_the_user(form=form)).pair for _ in range(2))
        assert torch.equal(one.a, two.a) and torch.equal(one.b, two.b)
    assert inner(user, reinforce) == pytest.approx(float((user.delta() * reinforce.delta()).sum()), rel=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", ["concat", "absorb"])
def test_a_gpu_gives_the_same_update(form):
    pairs = [pair(256, 128, 16, s) for s in range(2)]
    there = [LoraPair(p.a.float().cuda(), p.b.float().cuda(), p.scale) for p in pairs]
    here = [LoraPair(p.a.float(), p.b.float(), p.scale) for p in pairs]
    one, two = (merge_pair(*ps, off_the_user(form=form)).pair for ps in (here, there))
    assert relative(two.delta().cpu(), one.delta()) < 1e-6


def test_bad_input_is_named():
    user, reinforce = pair(9, 7, 2, 0), pair(8, 7, 2, 1)
    with pytest.raises(DataError, match=r"q_proj.*\(9, 7\).*\(8, 7\)"):
        merge_pair(user, reinforce, off_the_user(), name="q_proj")
    with pytest.raises(DataError, match="do not fit"):
        merge_pair(LoraPair(user.a[:1], user.b), user, off_the_user())
    with pytest.raises(DataError, match="scale"):
        merge_pair(user._replace(scale=math.inf), user, off_the_user())
    with pytest.raises(DataError, match="neither"):
        merge_states({}, {}, off_the_user())
    for wrong in (
        {"basis": "left"}, {"form": "sum"}, {"alpha": 1.5}, {"tau": 1.0}, {"c_user": math.nan}, {"rank": 0},
        {"rank": 4, "form": "absorb"},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            off_the_user(**wrong)


def test_the_grid_and_the_front():
    grid = coefficient_grid((0.5, 1.0), (0.0, 1.0), (0.0, 0.1))
    assert grid == [(0.5, 0, 0), (0.5, 1, 0), (0.5, 1, 0.1), (1, 0, 0), (1, 1, 0), (1, 1, 0.1)]
    with pytest.raises(ConfigError):
        coefficient_grid((), (1.0,))
    points = [(0.1, 0.5), (0.2, 0.9), (0.2, 0.8), (0.05, 0.5), (0.2, 0.9), (0.3, 0.9)]
    assert pareto_front(points, maximise=(False, True)) == [1, 3, 4]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    front = set(pareto_front(points, maximise=(True, False)))
    assert front
    for i, p in enumerate(points):
        beaten = any(o != p and o[0] >= p[0] and o[1] <= p[1] for o in points)
        assert (i in front) != beaten
