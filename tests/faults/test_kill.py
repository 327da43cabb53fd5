"""R2: a kill at any moment leaves complete checkpoints only, and the run goes on from the newest."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import children
import pytest

from casehard.io.files import CRASH_EXIT
from casehard.io.manifest import verify
from casehard.train.checkpoint import checkpoints, newest
from fakes import largest_difference


def _kill_and_check(forks, out, rng):
    """Start the run, kill it at a random time after it began to save, and verify everything that is visible."""
    seen = {step for step, _ in checkpoints(out)}
    child = forks.Process(target=children.endless, args=(str(out),))
    child.start()
    while {step for step, _ in checkpoints(out)} <= seen:
        assert child.exitcode is None, f"the run ended by itself with {child.exitcode}"
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.4))
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    found = checkpoints(out)
    for _, folder in found:
        verify(folder)
    return found[0][0]


def _many_kills(forks, out, kills):
    rng = random.Random(0)
    steps = [_kill_and_check(forks, out, rng) for _ in range(kills)]
    # Each run continued the one before it: the newest step only grows.
    assert steps == sorted(steps) and len(set(steps)) == kills, steps
    assert newest(out, last_step=10**6).name == f"checkpoint-{steps[-1]}"
    log = json.loads((checkpoints(out)[0][1] / "shell.json").read_text())
    assert log["meter"]["micros"] == steps[-1]


def test_twenty_kills(forks, tmp_path):
    _many_kills(forks, tmp_path, 20)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_hundred_kills(forks, tmp_path):
    _many_kills(forks, tmp_path, 200)


POINTS = [
    "save:after_weights@2",
    "save:after_optimizer@2",
    "save:before_manifest@2",
    "save:after_manifest@2",
    "save:after_rename@2",
]


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_inside_the_second_save(forks, tmp_path, point):
    child = forks.Process(target=children.crash, args=(str(tmp_path), point))
    child.start()
    child.join(60)
    assert child.exitcode == CRASH_EXIT
    renamed = point == "save:after_rename@2"
    assert [step for step, _ in checkpoints(tmp_path)] == ([4, 2] if renamed else [2])
    for _, folder in checkpoints(tmp_path):
        verify(folder)
    resumed, whole = children.short(tmp_path), children.short(None)
    assert largest_difference(resumed, whole) == 0
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_process_with_their_code(forks, tmp_path, number, code):
    child = forks.Process(target=children.endless, args=(str(tmp_path),))
    child.start()
    while not checkpoints(tmp_path):
        time.sleep(0.005)
    os.kill(child.pid, number)
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == code
    assert newest(tmp_path, last_step=10**6) == checkpoints(tmp_path)[0][1]
