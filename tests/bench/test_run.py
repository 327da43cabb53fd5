"""Plans run once: what is there is reused, what failed is listed, what was damaged runs again."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from bench_fakes import Fake, plan

from casehard.bench.execute import Outcome, Task
from casehard.bench.run import NodeEvent, run_plan
from casehard.bench.store import read_json, read_rows
from casehard.errors import ConfigError, Interrupted


@dataclass(frozen=True)
class Killer:
    """Kill the worker of one node, and let the rest work."""

    label: str
    how: str = "kill"

    def __call__(self, task: Task) -> Outcome:
        """Work, or die."""
        if task.node.label == self.label and task.node.kind == "attack":
            if self.how == "interrupt":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGKILL)
        return Fake()(task)


def calls(diary: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in diary.read_text().splitlines()) if diary.exists() else Counter()


def test_everything_runs_once_and_is_reused(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    events: list[NodeEvent] = []
    first = run_plan(plan(), tmp_path / "out", jobs=1, executor=Fake(diary=str(diary)), progress=events.append)
    assert calls(diary) == {"base": 1, "defend": 6, "evaluate": 7, "attack": 9}
    assert (first.ran, first.reused, first.exit_code) == (23, 0, 0)
    assert events[-1].done == events[-1].total == 23
    before = [(tmp_path / "out" / f).read_bytes() for f in ("summary.json", "rows.jsonl")]
    again = run_plan(plan(), tmp_path / "out", jobs=1, executor=Fake(diary=str(diary)))
    assert (again.ran, again.reused) == (0, 23)
    assert [(tmp_path / "out" / f).read_bytes() for f in ("summary.json", "rows.jsonl")] == before
    assert read_json(tmp_path / "out" / "run.json")["status"] == "ok"
    fresh = run_plan(plan(), tmp_path / "out", jobs=1, executor=Fake(diary=str(diary)), resume=False)
    assert fresh.ran == 23


def test_a_changed_attack_keeps_the_hardened_models(tmp_path: Path) -> None:
    run_plan(plan(), tmp_path, jobs=1, executor=Fake())
    attack = {"name": "full_p10", "share": 0.1, "steps": 40, "lr": 3e-4, "evaluate_at": [5, 20]}
    attack |= {"harmful": "{base}/a.jsonl", "benign": "{base}/b.jsonl"}
    again = run_plan(plan(attacks=[attack]), tmp_path, jobs=1, executor=Fake())
    assert (again.ran, again.reused) == (9, 14)


def test_workers_give_the_same_bytes_as_one_process(tmp_path: Path) -> None:
    small = {"seeds": [0, 1]}
    run_plan(plan(**small), tmp_path / "one", jobs=1, executor=Fake())
    run_plan(plan(**small), tmp_path / "two", jobs=2, executor=Fake())
    one, two = (read_json(tmp_path / n / "summary.json") for n in ("one", "two"))
    for summary in (one, two):
        summary["provenance"].pop("hardware")
    assert one == two
    assert (tmp_path / "one" / "rows.jsonl").read_bytes() == (tmp_path / "two" / "rows.jsonl").read_bytes()


def test_a_failure_is_listed_and_stops_only_its_children(tmp_path: Path) -> None:
    done = run_plan(plan(), tmp_path, jobs=1, executor=Fake(fail=("world-0/patcher/s1",)))
    assert done.exit_code == 1
    kinds = {(f["label"], f["status"]) for f in done.failed}
    assert kinds == {
        ("world-0/patcher/s1", "failed"),
        ("world-0/patcher/s1", "skipped"),
        ("world-0/patcher/s1/full_p10", "skipped"),
    }
    cause = next(f for f in done.failed if f["status"] == "failed")
    assert cause["message"] == "world-0/patcher/s1 cannot work"
    assert cause["hint"] == "mend it"
    assert read_json(tmp_path / "run.json")["status"] == "failed"
    assert {r["seed"] for r in done.summary["records"] if r["defence"] == "patcher"} == {0, 2}
    mended = run_plan(plan(), tmp_path, jobs=1, executor=Fake())
    assert mended.exit_code == 0
    assert mended.ran == 3


def test_a_worker_that_dies_takes_only_its_node(tmp_path: Path) -> None:
    label = "world-0/plain/s0/full_p10"
    done = run_plan(plan(seeds=[0]), tmp_path, jobs=2, executor=Killer(label))
    assert [(f["label"], f["error"]) for f in done.failed] == [(label, "Killed")]
    assert run_plan(plan(seeds=[0]), tmp_path, jobs=2, executor=Fake()).ran == 1


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as error:
        run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Killer("world-0/plain/s0/full_p10", "interrupt"))
    assert error.value.exit_code == 130
    assert read_json(tmp_path / "run.json")["status"] == "interrupted"
    assert not (tmp_path / "summary.json").exists()
    states = Counter(read_json(p)["status"] for p in (tmp_path / "nodes").glob("*/run.json"))
    assert states["interrupted"] == 1
    done = run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake())
    assert done.exit_code == 0
    assert done.reused == states["ok"]


@pytest.mark.parametrize("what", ["checkpoint", "rows"])
def test_damaged_results_are_not_used(tmp_path: Path, what: str) -> None:
    run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake())
    if what == "checkpoint":
        target = next((tmp_path / "nodes").glob("defend-world-0-patcher*")) / "checkpoint" / "weights.json"
    else:
        target = next((tmp_path / "nodes").glob("attack-world-0-patcher*")) / "rows.jsonl"
    target.write_bytes(target.read_bytes()[:-3] + b"}}\n")
    told: list[NodeEvent] = []
    again = run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake(), progress=told.append)
    assert again.ran == 1
    assert any(e.message.startswith("runs again") for e in told)
    assert "corrupt" in (tmp_path / "events.jsonl").read_text()


def test_a_run_folder_may_be_moved(tmp_path: Path) -> None:
    run_plan(plan(seeds=[0]), tmp_path / "a", jobs=1, executor=Fake())
    (tmp_path / "a").rename(tmp_path / "b")
    assert run_plan(plan(seeds=[0]), tmp_path / "b", jobs=1, executor=Fake()).ran == 0


def test_rows_say_which_cell_they_belong_to(tmp_path: Path) -> None:
    run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake())
    rows = list(read_rows(tmp_path / "rows.jsonl"))
    cells = {(r["defence"], r["attack"], r["step"]) for r in rows}
    assert ("patcher", "full_p10", 20) in cells
    assert ("undefended", "none", 0) in cells
    assert oct((tmp_path / "rows.jsonl").stat().st_mode)[-3:] == "600"


def test_settings_are_checked_before_anything_runs(tmp_path: Path) -> None:
    values = plan().attacks[0]
    attack = {"name": "a", "share": 1.0, "steps": values.steps, "lr": 1e-4, "harmful": "{base}/a.jsonl"}
    with pytest.raises(ConfigError, match="batchsize"):
        run_plan(
            plan(attacks=[{**attack, "settings": {"batchsize": 3}}], headline={"defence": "patcher"}), tmp_path, jobs=1
        )
    assert not list((tmp_path / "nodes").glob("*")) if (tmp_path / "nodes").exists() else True


def test_no_attacked_weights_are_written(tmp_path: Path) -> None:
    run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake())
    for folder in (tmp_path / "nodes").glob("attack-*"):
        assert {p.name for p in folder.iterdir()} == {"run.json", "events.jsonl", "rows.jsonl", "summary.json"}
    assert json.loads((tmp_path / "summary.json").read_text())["failed"] == []
