"""Whoever a process starts ends with it, however it ends: by a kill that nobody can answer, at any moment."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PATIENCE = 20.0
"""Seconds; on an idle machine all are gone after one."""

sys.path.insert(0, str(HERE.parents[1] / "benchmark"))

from bench_fakes import plan  # noqa: E402

import forks  # noqa: E402

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def stat(pid: int | str) -> list[str]:
    """Return the fields of a process after its name: state, parent ...; nothing for one that is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return []


def running(pid: int) -> bool:
    return stat(pid)[:1] not in ([], ["Z"])


def children(pid: int) -> set[int]:
    found = [int(p.name) for p in Path("/proc").glob("[0-9]*")]
    return {p for p in found if stat(p)[1:2] == [str(pid)] and running(p)}


def gone(pids: set[int]) -> bool:
    """Wait until none of the processes runs; end those that never would."""
    deadline = time.monotonic() + PATIENCE
    while (left := {p for p in pids if running(p)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left


@contextlib.contextmanager
def started(target: Any, *arguments: object) -> Iterator[Any]:
    """Run a function of this module in a process of its own; killed at the end, whatever happens."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def server() -> None:
    """A fork server whose children need not import torch again."""
    forks.ensure_running()


def defend(told: Any, folder: str) -> None:
    """Start an attacker as a defender does, say which, and wait for it for ever."""
    from casehard.defences.patcher.workers.child import child_process

    with child_process(Path(folder) / "store", 0, "cpu") as child:
        told.send(child.process.pid)
        time.sleep(600)


def test_an_attacker_ends_with_a_defender_killed_at_any_moment(server: None, tmp_path: Path) -> None:
    moments = [0.0, 0.1, 0.3, 1.0, 2.5]  # the attacker is importing all this time
    with contextlib.ExitStack() as stack:
        runs = []
        for i in range(len(moments)):
            place = tmp_path / str(i)
            place.mkdir()
            hears, tells = multiprocessing.Pipe(duplex=False)
            runs.append((stack.enter_context(started(defend, tells, str(place))), hears, place))
        begun = [(process, hears.recv(), place) for process, hears, place in runs]
        start = time.monotonic()
        for moment, (process, attacker, _) in zip(moments, begun, strict=True):
            time.sleep(max(0.0, start + moment - time.monotonic()))
            assert running(attacker)
            os.kill(process.pid, signal.SIGKILL)
        assert gone({attacker for _, attacker, _ in begun})
        assert not [place for _, _, place in begun if place.exists()]  # what its defender would have removed


def test_an_attacker_obeys_sigterm_while_it_starts(server: None, tmp_path: Path) -> None:
    hears, tells = multiprocessing.Pipe(duplex=False)
    with started(defend, tells, str(tmp_path)):
        attacker = hears.recv()
        time.sleep(0.3)
        os.kill(attacker, signal.SIGTERM)
        assert gone({attacker})


def bench(out: str) -> None:
    """Run a plan in two worker processes, with nodes that take for ever."""
    from casehard.benchmark.run import run_plan

    run_plan(plan(seeds=[0]), out, jobs=2, executor=forever)


def forever(task: Any) -> Any:
    """Stand in for a node's work; says that it began."""
    (task.out / "begun").touch()
    time.sleep(600)


@pytest.mark.parametrize("moment", ["starting", "working"])
def test_workers_end_with_a_bench_that_is_killed(server: None, tmp_path: Path, moment: str) -> None:
    with started(bench, str(tmp_path)) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if moment == "starting" and children(process.pid):
                break
            if moment == "working" and list(tmp_path.glob("nodes/*/begun")):
                break
            time.sleep(0.05)
        workers = children(process.pid)
        assert workers
        os.kill(process.pid, signal.SIGKILL)
        assert gone(workers)


def test_a_leash_runs_a_module_with_its_own_arguments() -> None:
    watched, held = os.pipe()
    call = [sys.executable, "-m", "casehard.io.leash", str(watched), "", "json.tool", "--compact"]
    done = subprocess.run(call, input="[1, 2]", capture_output=True, text=True, pass_fds=[watched], timeout=60)
    os.close(watched)
    os.close(held)
    assert (done.returncode, done.stdout) == (0, "[1,2]\n")
