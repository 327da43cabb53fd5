"""What the user of ``casehard bench`` reads: one line a warning, once, how far it is, and what takes so long."""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from bench_fakes import Fake, OddWarning, plan_values

from casehard.benchmark import run as running
from casehard.benchmark.execute import Executor, Outcome, Task
from casehard.cli import main
from casehard.train import progress

Bench = Callable[..., str]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bench:
    """Return a function that runs a plan with stand-ins for work and returns what was said on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(work: Executor, *, jobs: int, out: str = "out") -> str:
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan_values(seeds=[0])))
        monkeypatch.setattr(running, "run_plan", functools.partial(running.run_plan, executor=work))
        assert main(["bench", "plan.yaml", "--out", out, "--jobs", str(jobs)]) == 0
        return capfd.readouterr().err

    return run


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if "thing" in line]


def test_debug_says_where_a_warning_comes_from(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Fake(warns=(FutureWarning, OddWarning))
    assert said(bench(work, jobs=1)) == [
        "warning: a thing to know of FutureWarning",
        "warning: a thing to know of OddWarning",
    ]
    monkeypatch.setenv("CASEHARD_DEBUG", "1")
    line = said(bench(work, jobs=1, out="again"))[0]
    assert re.fullmatch(r"warning: a thing to know of FutureWarning \(FutureWarning, \S*bench_fakes.py:\d+\)", line)


@dataclass(frozen=True)
class Logs:
    """Logs as libraries do, with a handler of its own that writes to stderr."""

    def __call__(self, task: Task) -> Outcome:
        """Work, and log."""
        logger = logging.getLogger("somebody.models")
        logging.getLogger("somebody").handlers = [logging.StreamHandler()]
        logger.warning("a thing to know\nof \x1b[31mlogs")
        return Fake()(task)


def test_what_a_library_logs_in_a_worker_is_one_line_once(bench: Bench) -> None:
    assert said(bench(Logs(), jobs=2)) == ["warning: a thing to know of \\u001b[31mlogs"]


@dataclass(frozen=True)
class Slow:
    """Takes its time with attacks, and warns of everything."""

    def __call__(self, task: Task) -> Outcome:
        """Work slowly."""
        if task.node.kind == "attack":
            time.sleep(0.5)
        return Fake(warns=(UserWarning, FutureWarning, OddWarning))(task)


def test_lines_count_what_runs_and_say_each_warning_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "quiet", False)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.1)
    monkeypatch.setattr(running, "HEARTBEAT", 0.1)
    err = bench(Slow(), jobs=2)
    lines = err.splitlines()
    counts = [re.match(r"fake: (\d+) done, (\d+) running of 9\b", line) for line in lines]
    seen = [tuple(map(int, m.groups())) for m in counts if m]
    assert seen == sorted(seen, key=lambda pair: pair[0])
    assert {running for _, running in seen} >= {1, 2} and max(seen)[0] == 9
    # Lines come while nothing ends, too.
    assert len(seen) > len({done for done, _ in seen})
    after = [i for i, line in enumerate(lines) if line.startswith("summarising 9 runs")]
    assert len(after) == 1 and re.match(r"fake: 9 done, 0 running of 9\b", lines[after[0] - 1])
    assert lines[after[0] + 1].startswith("drawing the report")
    assert sorted(said(err)) == [
        f"warning: a thing to know of {c}" for c in ("FutureWarning", "OddWarning", "UserWarning")
    ]
    assert "bench_fakes" not in err and "warnings.warn" not in err
