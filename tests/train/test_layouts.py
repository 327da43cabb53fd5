"""R8 and R9: same seed, same bytes in two fresh processes; how a batch is cut up does not matter."""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[1] / "faults"
sys.path.insert(0, str(FAULTS))

import children  # noqa: E402
from children import layout  # noqa: E402

import forks  # noqa: E402


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def reference():
    """Losses and weight sum of 12 steps with batches of 8."""
    return layout(8, 1)


def _compare(reference, other):
    (losses, total), (others, other_total) = reference, other
    gaps = [b - a for a, b in zip(losses, others, strict=True)]
    assert len(gaps) == 12 and losses[-1] < losses[0]
    assert max(abs(gap) for gap in gaps) < 1e-5, gaps
    # A residual that always points one way would be a wrong scale, however small.
    spread = statistics.stdev(gaps)
    assert abs(statistics.mean(gaps)) <= 3 * spread / math.sqrt(len(gaps)) + 1e-12, gaps
    assert math.isclose(total, other_total, rel_tol=1e-5)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4)])
def test_accumulation_does_not_matter(reference, batch_size, accumulation):
    _compare(reference, layout(batch_size, accumulation))


def test_two_ranks_do_not_matter(reference, tmp_path):
    port, out = _free_port(), tmp_path / "losses.json"
    ranks = [forks.started(children.ranked, rank, 2, port, 4, 1, str(out)) for rank in range(2)]
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    _compare(reference, json.loads(out.read_text()))


def test_same_seed_same_bytes(tmp_path):
    """In a new interpreter, its strings hashed otherwise, and in a process of the fork server."""
    runs = [tmp_path / name for name in ("new", "forked")]
    code = "import sys, children; children.short(sys.argv[1])"
    path = os.pathsep.join(map(str, (FAULTS, FAULTS.parent)))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, str(runs[0])], env=env, timeout=120, check=True)
    forked = forks.started(children.short, str(runs[1]))
    forked.join(120)
    assert forked.exitcode == 0
    for name in ("model.safetensors", "method.safetensors"):
        first, second = ((run / "checkpoint-6" / name).read_bytes() for run in runs)
        assert first == second and len(first) > 128, name
