"""Time greedy RD-DPP against the direct method and against itself over n; print one JSON object as the last line.

The direct method is the one of the paper's public repository: the whole weighted kernel, and at each pick the block of
all candidates gathered and solved anew. Both sides run in fp32 with the same threads, in one process, taking turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from casehard.maths.dpp import JITTER, greedy_map, log_weights, relevance, unit_rows

BETA = 4.0


def pool(n: int, d: int, *, seed: int = 0, tasks: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit rows in 50 clusters with a common mean, as sentence embeddings have, and their log weights."""
    g = torch.Generator().manual_seed(seed)
    centres, mean = torch.randn(50, d, generator=g), torch.randn(1, d, generator=g)

    def draw(count: int) -> torch.Tensor:
        which = torch.randint(50, (count,), generator=g)
        return unit_rows(1.5 * mean + centres[which] + torch.randn(count, d, generator=g))

    rows = draw(n)
    return rows, log_weights(relevance(rows, draw(tasks)), BETA)


def direct(rows: torch.Tensor, weights: torch.Tensor, k: int) -> list[int]:
    """Return greedy picks from the full kernel, with the triangular system solved anew for all candidates a pick."""
    n = len(rows)
    scale = (weights / 2).exp().to(rows.dtype)
    kernel = (rows @ rows.T + JITTER * torch.eye(n, dtype=rows.dtype)) * scale[:, None] * scale[None, :]
    picks: list[int] = []
    remaining = torch.arange(n)
    for _ in range(k):
        gain = kernel.diagonal()[remaining].clone()
        if picks:
            chosen = torch.tensor(picks)
            factor = torch.linalg.cholesky(kernel[chosen][:, chosen])
            block = kernel[remaining][:, chosen]
            gain -= torch.linalg.solve_triangular(factor, block.T, upper=False).square().sum(0)
        at = int(gain.argmax())
        picks.append(int(remaining[at]))
        remaining = torch.cat([remaining[:at], remaining[at + 1 :]])
    return picks


def seconds(function: Callable[[], object], times: int) -> float:
    """Return the median wall time after one warm-up call."""
    function()
    samples = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def peak_gb(function: Callable[[], object]) -> float:
    """Return the process's peak resident memory while ``function`` runs, in GB (everything loaded included)."""
    Path("/proc/self/clear_refs").write_text("5")
    function()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000, 10_000, 20_000, 50_000, 100_000])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows, weights = pool(20_000, 384)
    big = lambda: greedy_map(rows, 600, weights=weights)  # noqa: E731
    seconds_20k, peak_20k, passes = seconds(big, args.repeats), peak_gb(big), big().passes

    small, small_weights = pool(5_000, 384, seed=1)
    ours = seconds(lambda: greedy_map(small, 150, weights=small_weights), max(args.repeats, 5))
    start = time.perf_counter()
    picks = direct(small, small_weights, 150)
    theirs = time.perf_counter() - start
    same = picks == greedy_map(small, 150, weights=small_weights).order

    times = {}
    for n in args.sizes:
        many, many_weights = pool(n, 384, seed=2)
        times[n] = seconds(lambda m=many, w=many_weights: greedy_map(m, 300, weights=w), 2)
    x, y = [math.log(n) for n in times], [math.log(t) for t in times.values()]
    slope = statistics.linear_regression(x, y).slope if len(times) > 1 else float("nan")

    for n, t in times.items():
        print(f"n {n:7d}  k 300  {t:.3f} s", flush=True)
    result = {
        "seconds_20k": round(seconds_20k, 3),
        "peak_gb_20k": round(peak_20k, 3),
        "speedup_vs_direct_5k": round(theirs / ours, 1),
        "identical": same,
        "slope": round(slope, 3),
        "passes_20k": passes,
        "seconds_5k": round(ours, 4),
        "direct_seconds_5k": round(theirs, 2),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
