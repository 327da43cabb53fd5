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

from children import layout  # noqa: E402


def _python(code, *arguments, **env):
    path = os.pathsep.join(map(str, (FAULTS, FAULTS.parent)))
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **env},
        stdout=subprocess.PIPE,
        text=True,
    )


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
    code = "import sys, children; r, p, out = sys.argv[1:]; children.ranked(int(r), 2, int(p), 4, 1, out)"
    port, out = _free_port(), tmp_path / "losses.json"
    ranks = [_python(code, rank, port, out) for rank in range(2)]
    for rank in ranks:
        rank.communicate(timeout=120)
        assert rank.returncode == 0
    _compare(reference, json.loads(out.read_text()))


def test_same_seed_same_bytes(tmp_path):
    code = (
        "import sys, hashlib, children; from pathlib import Path; children.short(sys.argv[1])\n"
        "names = ('model.safetensors', 'method.safetensors')\n"
        "f = Path(sys.argv[1]) / 'checkpoint-6'\n"
        "print([hashlib.sha256((f / n).read_bytes()).hexdigest() for n in names])"
    )
    runs = [_python(code, tmp_path / str(i), PYTHONHASHSEED=str(i)) for i in range(2)]
    seen = [run.communicate(timeout=120)[0].splitlines()[-1] for run in runs]
    assert all(run.returncode == 0 for run in runs)
    assert seen[0] == seen[1] and len(seen[0]) > 128
