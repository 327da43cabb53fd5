"""Greedy RD-DPP against brute force, Cholesky and the n x n reference, and the properties of docs/methods/spard.md."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casehard.distributed.dpp import greedy_map_sharded
from casehard.errors import DataError
from casehard.maths.dpp import JITTER, TIE, greedy_map, log_weights, relevance, unit_rows
from forks import spawn

SEEDS = st.integers(0, 100_000)


def rows(n, d, seed, dtype=torch.float64, clusters=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    if clusters:
        x = 0.3 * x + torch.randn(clusters, d, generator=g, dtype=torch.float64)[torch.arange(n) % clusters]
    return unit_rows(x.to(dtype))


def relevances(n, seed):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) * 0.5 + 0.5


def kernel(phi, q, beta, jitter):
    """The weighted kernel itself, as an n x n array."""
    phi = phi.double()
    d = torch.ones(len(phi), dtype=torch.float64) if beta == 0 else q.clamp(0, 1) ** beta
    return d[:, None] * (phi @ phi.T + jitter * torch.eye(len(phi), dtype=torch.float64)) * d[None, :]


def brute(phi, q, beta, jitter, k):
    """At each pick take the row that makes the determinant of the block largest."""
    full, picks = kernel(phi, q, beta, jitter), []
    for _ in range(k):
        best, found = -math.inf, -1
        for i in range(len(full)):
            if i not in picks:
                value = float(torch.linalg.slogdet(full[[*picks, i]][:, [*picks, i]])[1])
                if value > best + 10 * TIE:
                    best, found = value, i
        picks.append(found)
    return picks


def chen(full, k):
    """Chen et al. 2018: the incremental Cholesky recurrence on the full kernel."""
    gain, columns, picks = full.diagonal().clone(), [], []
    for _ in range(k):
        open_ = ~torch.isin(torch.arange(len(full)), torch.tensor(picks, dtype=torch.long))
        j = int((open_ & (gain >= gain[open_].max() * (1 - TIE))).to(torch.uint8).argmax())
        picks.append(j)
        e = full[j].clone()
        for c in columns:
            e -= c[j] * c
        e /= gain[j].sqrt()
        columns.append(e)
        gain = gain - e.square()
    return picks


@given(
    SEEDS,
    st.integers(1, 9),
    st.integers(2, 7),
    st.sampled_from([0.0, 1.0, 2.5, 4.0, 30.0]),
    st.sampled_from([1e-6, 1e-3]),
)
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(seed, n, d, beta, jitter):
    phi, q = rows(n, d, seed), relevances(n, seed)
    k = min(n, d)
    got = greedy_map(phi, k, weights=log_weights(q, beta), jitter=jitter, block=3, shortlist=2)
    assert got.order == brute(phi, q, beta, jitter, k)
    full = kernel(phi, q, beta, jitter)[got.order][:, got.order]
    assert got.log_det == pytest.approx(float(torch.linalg.slogdet(full)[1]), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("beta", "clusters"), [(0.0, 0), (4.0, 0), (4.0, 12), (20.0, 5)])
def test_blocked_and_lazy_equals_the_recurrence_on_the_full_kernel(dtype, beta, clusters):
    phi, q = rows(600, 48, 3, dtype, clusters), relevances(600, 3)
    want = chen(kernel(phi, q, beta, JITTER), 40)
    for block, shortlist in ((64, 256), (7, 20), (1, 1), (64, 600)):
        got = greedy_map(phi, 40, weights=log_weights(q, beta), block=block, shortlist=shortlist)
        assert got.order == want
    assert greedy_map(phi, 40, weights=log_weights(q, beta)).passes < 40


@given(SEEDS, st.sampled_from([0.0, 3.0]))
@settings(max_examples=25, deadline=None)
def test_permutation_rotation_and_scaling(seed, beta):
    phi, q = rows(60, 12, seed), relevances(60, seed)
    w = log_weights(q, beta)
    base = greedy_map(phi, 10, weights=w)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(60, generator=g)
    moved = greedy_map(phi[order], 10, weights=w[order])
    if beta:
        assert [int(order[i]) for i in moved.order] == base.order
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64))
    assert greedy_map(phi @ turn, 10, weights=w).order == base.order or beta == 0
    assert greedy_map(unit_rows(phi * 37.0), 10, weights=w).order == base.order or beta == 0
    assert greedy_map(phi, 10, weights=log_weights(q * 0.5, beta)).order == base.order


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_prefixes_gains_and_log_det(seed):
    phi, q = rows(80, 20, seed, torch.float32), relevances(80, seed)
    long = greedy_map(phi, 15)
    assert greedy_map(phi, 9).order == long.order[:9]
    assert all(a >= b - 1e-9 for a, b in zip(long.log_gains, long.log_gains[1:], strict=False))
    assert all(g <= math.log1p(JITTER) + 1e-6 for g in long.log_gains), "log det falls with every pick"
    weighted = greedy_map(phi, 15, weights=log_weights(q, 2.0))
    assert all(a >= b - 1e-9 for a, b in zip(weighted.log_gains, weighted.log_gains[1:], strict=False))
    assert weighted.log_det == pytest.approx(sum(weighted.log_gains))


def test_beta_zero_ignores_relevance_and_a_large_beta_is_top_relevance():
    phi, q = rows(100, 30, 5), relevances(100, 5)
    assert greedy_map(phi, 12, weights=log_weights(q, 0)).order == greedy_map(phi, 12).order
    top = q.argsort(descending=True)[:12].tolist()
    assert greedy_map(phi, 12, weights=log_weights(q, 1e5)).order == top
    assert log_weights(torch.tensor([-0.9, 0.0, 1.0, 1.2]), 2.0).tolist() == [-math.inf, -math.inf, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates_are_picked_last_and_ties_go_to_the_lowest_index(dtype):
    base = rows(12, 40, 1, dtype)
    twice = torch.cat([base, base, base])
    got = greedy_map(twice, 12)
    assert sorted(i % 12 for i in got.order) == list(range(12))
    assert all(i < 12 for i in got.order), "of equal rows the first is taken"
    axes = torch.eye(30, dtype=dtype)
    assert greedy_map(axes, 30, shortlist=4).order == list(range(30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_past_the_rank_the_order_is_that_of_the_jittered_kernel_and_it_is_told(dtype):
    phi, q = rows(150, 10, 2, dtype), relevances(150, 2)
    got = greedy_map(phi, 40, weights=log_weights(q, 4.0), jitter=1e-4, shortlist=16)
    assert got.order == chen(kernel(phi, q, 4.0, 1e-4), 40)
    assert got.exhausted_at == 10
    assert len(set(got.order)) == 40 and math.isfinite(got.log_det)


def test_without_jitter_picks_past_the_rank_follow_the_weights():
    phi, q = rows(30, 4, 2), relevances(30, 2)
    got = greedy_map(phi, 10, weights=log_weights(q, 1.0), jitter=0.0)
    assert got.exhausted_at == 4 and got.log_det == -math.inf
    rest = [i for i in q.argsort(descending=True).tolist() if i not in got.order[:4]]
    assert got.order[4:] == rest[:6]


def test_rows_of_no_relevance_come_last_and_k_beyond_n_returns_all():
    phi, q = rows(20, 40, 4), relevances(20, 4)
    q[[2, 11]] = 0.0
    got = greedy_map(phi, 99, weights=log_weights(q, 4.0))
    assert sorted(got.order) == list(range(20)) and got.order[-2:] == [2, 11]


@given(SEEDS, st.integers(1, 70), st.integers(1, 50))
@settings(max_examples=25, deadline=None)
def test_streamed_relevance_equals_dense_whatever_the_tile(seed, n, tile):
    pool, task = rows(n, 9, seed), rows(33, 9, seed + 7)
    dense = (pool @ task.T).amax(1).clamp(0, 1)
    assert torch.allclose(relevance(pool, task, tile=tile), dense, atol=1e-12)


def test_bad_rows_are_named():
    x = torch.ones(4, 3)
    x[2] = 0
    with pytest.raises(DataError, match="row 2 is zero"):
        unit_rows(x)
    x[1, 0] = torch.nan
    with pytest.raises(DataError, match="row 1 is not finite"):
        unit_rows(x)
    with pytest.raises(DataError, match="shape"):
        unit_rows(torch.ones(0, 3))
    tiny = unit_rows(torch.tensor([[1e-30, 1e-30], [1e30, 0.0]]))
    assert torch.allclose(tiny.norm(dim=1), torch.ones(2))


def test_memory_stays_far_below_a_kernel():
    n = 30_000
    phi = rows(n, 16, 0, torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = greedy_map(phi, 12, weights=log_weights(relevance(phi, phi[:5000]), 4.0))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert len(got.order) == 12
    assert grown < n * n * 4 / 20, f"{grown / 1e6:.0f} MB; the kernel alone has {n * n * 4 / 1e6:.0f} MB"


def test_the_benchmarks_direct_method_agrees():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    try:
        import dpp as bench
    finally:
        sys.path.pop(0)
    phi, w = bench.pool(400, 32, tasks=50)
    assert bench.direct(phi, w, 25) == greedy_map(phi, 25, weights=w).order


def _rank(rank, world, out):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    phi, w = rows(101, 12, 9, torch.float32), log_weights(relevances(101, 9), 4.0)
    part = slice(0, 40) if rank == 0 else slice(40, None)
    runs = [greedy_map_sharded(phi[part], 30, weights=w[part], jitter=j) for j in (1e-6, 0.0)]
    torch.save([(r.order, r.log_gains, r.exhausted_at) for r in runs], out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_pick_what_one_picks(tmp_path):
    spawn(_rank, (2, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert first == second
    phi, w = rows(101, 12, 9, torch.float32), log_weights(relevances(101, 9), 4.0)
    for (order, gains, exhausted), jitter in zip(first, (1e-6, 0.0), strict=True):
        single = greedy_map(phi, 30, weights=w, jitter=jitter)
        alone = greedy_map_sharded(phi, 30, weights=w, jitter=jitter)
        assert order == single.order == alone.order and exhausted == single.exhausted_at
        assert gains == pytest.approx(single.log_gains, abs=1e-4)
