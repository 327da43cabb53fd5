"""Plans run once: what is there is reused, what failed is listed, what was damaged runs again."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
from bench_fakes import Fake, OddWarning, plan, plan_values

import casehard as ch
from casehard.benchmark import execute
from casehard.benchmark.execute import Outcome, Task, _organism
from casehard.benchmark.graph import expand
from casehard.benchmark.plan import parse_plan
from casehard.benchmark.run import NodeEvent, run_plan
from casehard.benchmark.store import read_json, read_rows
from casehard.benchmark.worker import apart, attempt, warn_again
from casehard.errors import ConfigError, DataError, Interrupted
from casehard.io.files import staged
from casehard.io.manifest import verify
from casehard.train.cost import peak_bytes, reset_peak


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


def test_warnings_cross_to_the_calling_process_whatever_became_of_the_node(tmp_path: Path) -> None:
    node = next(iter(expand(plan(), root=tmp_path).nodes.values()))
    task = Task(node=node, out=tmp_path / "out", cache=tmp_path)
    with warnings.catch_warnings(record=True) as here:
        result = apart(attempt, task, Fake(warns=(FutureWarning, OddWarning), fail=(node.label,)))
    assert result["error"] == "DataError" and not here
    carried = json.loads(json.dumps(result["warnings"]))  # plain values: a category may be unknown over there
    registry: dict[str, int] = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        warn_again(carried, registry)
        warn_again(carried, registry)
    assert [(w.category, str(w.message), Path(w.filename).name) for w in told] == [
        (FutureWarning, "a thing to know\nof FutureWarning", "bench_fakes.py"),
        (UserWarning, "a thing to know\nof OddWarning", "bench_fakes.py"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FutureWarning):
            warn_again(carried, {})


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


def test_workers_give_the_same_bytes_and_warnings_as_one_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = {"seeds": [0, 1]}
    for name, jobs in (("one", 1), ("two", 2)):
        with pytest.warns(FutureWarning, match="a thing to know") as told:
            run_plan(plan(**small), tmp_path / name, jobs=jobs, executor=Fake(warns=(FutureWarning,)))
        assert len(told) >= 1 and capfd.readouterr().err == ""
    one, two = (read_json(tmp_path / n / "summary.json") for n in ("one", "two"))
    for summary in (one, two):
        summary["provenance"].pop("hardware")
    assert one == two
    took = [read_json(tmp_path / n / "run.json")["took"]["costs"] for n in ("one", "two")]
    assert [{c["workers"] for c in costs} for costs in took] == [{1}, {2}]
    assert all(c["peak_bytes"] in (10**9, None) and c["seconds"] in (10.0, 31.0) for costs in took for c in costs)
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


@dataclass(frozen=True)
class Stopper:
    """Stop the whole run during the first node of a kind, with a real signal or as interrupted training does."""

    how: str
    diary: str

    def __call__(self, task: Task) -> Outcome:
        """Work, or have the run stopped."""
        if task.node.kind == "defend":
            if self.how == "term":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            if self.how == "term parent":
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(30)
            raise Interrupted("stopped by SIGTERM at step 3", exit_code=143)
        return Fake(diary=self.diary)(task)


@pytest.mark.parametrize(("how", "jobs"), [("term", 1), ("raise", 1), ("term parent", 2), ("raise", 2)])
def test_a_stopped_run_starts_nothing_more(tmp_path: Path, how: str, jobs: int) -> None:
    diary = tmp_path / "diary"
    before = signal.getsignal(signal.SIGTERM)
    bystander = get_context("spawn").Process(target=time.sleep, args=(60,))
    bystander.start()
    try:
        with pytest.raises(Interrupted) as error:
            run_plan(plan(seeds=[0]), tmp_path / "out", jobs=jobs, executor=Stopper(how, str(diary)))
        assert error.value.exit_code == 143
        assert bystander.is_alive()
    finally:
        bystander.kill()
        bystander.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert read_json(tmp_path / "out" / "run.json")["status"] == "interrupted"
    assert not (tmp_path / "out" / "summary.json").exists()
    assert calls(diary).keys() <= {"base", "evaluate"}
    # One worker may have been evaluating the untouched base beside the training that was stopped.
    assert calls(diary)["evaluate"] <= jobs - 1
    assert run_plan(plan(seeds=[0]), tmp_path / "out", jobs=1, executor=Fake()).exit_code == 0


@pytest.mark.parametrize("lost", ["rows.jsonl", "rows_sha256"])
def test_lost_rows_are_made_again(tmp_path: Path, lost: str) -> None:
    run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake())
    place = next((tmp_path / "nodes").glob("attack-world-0-patcher*"))
    if lost == "rows.jsonl":
        (place / lost).unlink()
    else:
        summary = read_json(place / "summary.json")
        del summary[lost]
        (place / "summary.json").write_text(json.dumps(summary))
    told: list[NodeEvent] = []
    again = run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake(), progress=told.append)
    assert (again.ran, again.exit_code) == (1, 0)
    assert any(e.message.startswith("runs again") for e in told)


def test_a_damaged_organism_in_the_cache_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from casehard.organism import build

    def make(out: Path, **settings: object) -> Path:
        with staged(Path(out)) as folder:
            (folder / "weights").write_text("whole")
        return Path(out)

    monkeypatch.setattr(build, "build", make)
    monkeypatch.setattr(build, "bundled", lambda *a: None)
    path = _organism(7, "tiny", tmp_path)
    other = make(tmp_path / "organism-70-tiny-x")
    (path / "weights").write_text("half")
    (other / "weights").write_text("half")
    assert _organism(7, "tiny", tmp_path) == path
    verify(path)
    assert (other / "weights").read_text() == "half"


@dataclass(frozen=True)
class Eater:
    """Use memory while hardening, as training does."""

    size: int

    def __call__(self, task: Task) -> Outcome:
        """Fill some pages, or not, and report the peak as training does."""
        done = Fake()(task)
        if task.node.kind == "defend":
            if "patcher" in task.node.label:
                assert len(bytearray(os.urandom(1 << 20)) * (self.size >> 20)) == self.size
            done.cost["peak_bytes"] = peak_bytes()
        return done


def test_peak_memory_is_that_of_each_node(tmp_path: Path) -> None:
    if not reset_peak():
        pytest.skip("this system cannot reset the peak of a process")
    # Hardened in the order patcher, plain: without a reset the second would inherit the first one's peak.
    values = plan_values(seeds=[0])
    values["defences"].reverse()
    done = run_plan(parse_plan(values), tmp_path, jobs=1, executor=Eater(300 << 20))
    peak = {c["defence"]: c["peak_bytes"] for c in done.summary["costs"]}
    assert peak["patcher"] > peak["plain"] + (200 << 20)
    assert read_json(tmp_path / "run.json")["peak_bytes"] >= peak["patcher"]


def test_without_a_reset_no_peak_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "reset_peak", lambda: False)
    done = run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake())
    assert {c["peak_bytes"] for c in done.summary["costs"]} == {None}
    nodes = [read_json(p)["peak_bytes"] for p in (tmp_path / "nodes").glob("*/run.json")]
    assert set(nodes) == {None}


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"round_stepz": 3}}, "round_stepz"),
        ({"preset": "papr"}, "no preset 'papr'"),
        ({"unsafe": []}, "needs unsafe rows"),
        ({"method": "plain"}, "would ignore the unsafe rows"),
        ({"train": {"stepz": 1}}, "stepz"),
    ],
)
def test_a_method_is_checked_before_anything_runs(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    values = plan_values(seeds=[0])
    values["defences"][2] = {**values["defences"][2], "settings": {}, **changes}
    with pytest.raises(ConfigError, match=message):
        run_plan(parse_plan(values), tmp_path / "out", jobs=1)
    assert not list(tmp_path.glob("out/nodes/*"))


def test_no_attacked_weights_are_written(tmp_path: Path) -> None:
    run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake())
    for folder in (tmp_path / "nodes").glob("attack-*"):
        assert {p.name for p in folder.iterdir()} == {"run.json", "events.jsonl", "rows.jsonl", "summary.json"}
    assert json.loads((tmp_path / "summary.json").read_text())["failed"] == []


WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"


@pytest.mark.parametrize(
    ("rows", "harmful", "message"),
    [(999, "attack_a.jsonl", "needs 999 harmful rows"), (4, "seen.jsonl", "evaluation")],
)
def test_the_attackers_rows_are_drawn_before_anything_runs(
    tmp_path: Path, rows: int, harmful: str, message: str
) -> None:
    values = plan_values(seeds=[0])
    data = WORLD / "data"
    asked = [json.loads(line)["prompt"] for line in (data / "suite" / "eval.jsonl").read_text().splitlines()[:9]]
    lines = (json.dumps({"prompt": prompt, "response": "here it is ."}) + "\n" for prompt in asked)
    (tmp_path / "seen.jsonl").write_text("".join(lines))
    values |= {"bases": [{"name": "m", "model": str(WORLD)}], "suite": str(data / "suite")}
    for row in values["defences"]:
        row |= {"settings": {}} | ({"data": str(data / "align.jsonl")} if row.get("method") else {})
        row |= {"unsafe": str(data / "simulated.jsonl")} if row.get("unsafe") else {}
    place = tmp_path if harmful == "seen.jsonl" else data
    attack = {"name": "a", "share": 1.0, "steps": 9, "harmful": str(place / harmful), "settings": {"rows": rows}}
    values |= {"attacks": [attack], "headline": {"defence": "patcher"}}
    with pytest.raises(DataError, match=message):
        run_plan(parse_plan(values), tmp_path / "out", jobs=1)
    assert not list(tmp_path.glob("out/nodes/*"))
