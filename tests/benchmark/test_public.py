"""Public benchmarks of a plan: asked of every model before its attack, shown, and refused where nothing can ask."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from bench_fakes import Fake, plan, plan_values

import casehard as ch
from casehard.benchmark.execute import Outcome, Task, execute, step_of
from casehard.benchmark.graph import expand
from casehard.benchmark.plan import Plan, parse_plan
from casehard.benchmark.run import run_plan
from casehard.errors import ConfigError
from casehard.reporting.page import write_report

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
STAND_IN = Path(__file__).parents[1] / "evaluation" / "lm_eval_stand_in.py"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a stand-in for the program first on PATH."""
    place = tmp_path / "bin"
    place.mkdir()
    (place / "lm_eval").write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    (place / "lm_eval").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")


def asking(*tasks: str) -> Plan:
    return plan(lm_eval=list(tasks), limit=1)


def evaluations(tmp_path: Path, *tasks: str) -> list[Task]:
    nodes = [node for node in expand(asking(*tasks), root=tmp_path).nodes.values() if node.kind == "evaluate"]
    (tmp_path / "out").mkdir()
    made = {"out": tmp_path / "out", "base": WORLD, "parent": WORLD, "cache": tmp_path / "cache"}
    return [Task(node=node, **made) for node in nodes]


def test_an_evaluation_of_the_plan_runs_the_program_and_keeps_what_it_wrote(program: None, tmp_path: Path) -> None:
    first, *rest = evaluations(tmp_path, "mmlu", "ifeval")
    assert len(rest) == 6  # of two trained defences on three seeds, and of the base that all share
    done = execute(first)
    told = {score["metric"]: score["rate"] for score in done.facts["lm_eval"]}
    assert told == {"mmlu acc": 0.25, "ifeval inst_level_strict_acc": 0.4} and done.rows
    (kept,) = (tmp_path / "out" / "lm_eval" / "out").rglob("results_*.json")
    asked = json.loads(kept.read_text())["config"]["argv"]
    assert asked[asked.index("--tasks") + 1] == "mmlu,ifeval" and asked[asked.index("--limit") + 1] == "1"
    assert "lm_eval" not in next(n for n in expand(plan(), root=tmp_path).nodes.values() if n.kind == "evaluate").config


class Public(Fake):
    """The fake executor, with a number of one benchmark for every model that is evaluated."""

    def __call__(self, task: Task) -> Outcome:
        done = super().__call__(task)
        if task.node.kind != "evaluate":
            return done
        rate = 0.25 + 0.1 * (task.node.label[-1] == "2")
        score = {"metric": "mmlu acc", "n": 50, "k": None, "rate": rate, "low": rate - 0.02, "high": rate + 0.02}
        return dataclasses.replace(done, facts={**done.facts, "lm_eval": [score]})


def test_the_numbers_of_every_defence_are_on_the_page(tmp_path: Path) -> None:
    summary = run_plan(asking("mmlu"), tmp_path / "out", jobs=1, executor=Public()).summary
    found = {entry["defence"]: entry for entry in summary["public"]}
    assert list(found) == ["undefended", "plain", "patcher"]
    one, three = found["undefended"], found["patcher"]
    assert (one["rates"], one["low"], one["high"]) == ([0.25], 0.23, 0.27)  # one model for all seeds
    assert three["rates"] == [0.25, 0.25, 0.35] and (three["low"], three["high"]) == (0.25, 0.35)
    page = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "Public benchmarks" in page and "0.230 to 0.270, single model, n 50" in page
    text = write_report(tmp_path / "out", tmp_path / "page.md").read_text()
    assert "| mmlu acc | 0.250 (0.230 to 0.270, single model, n 50) | 0.283 (0.250 to 0.350, 3 models, n 50) |" in text


def test_a_program_that_is_missing_or_a_task_without_a_name_is_told_before_anything_runs(
    program: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = evaluations(tmp_path, "mmlu --trust")[0]
    with pytest.raises(ConfigError, match=f"{task.node.label}: .*no name of a task"):
        step_of(task)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(ConfigError, match="no program 'lm_eval'"):
        run_plan(asking("mmlu"), tmp_path / "run", jobs=1)
    assert not (tmp_path / "run" / "nodes").exists()


def test_models_that_stay_in_memory_cannot_be_asked() -> None:
    with pytest.raises(ConfigError, match="stays in memory"):
        parse_plan(plan_values(lm_eval=["mmlu"], chain=["attack", "defence"]))
    assert parse_plan(plan_values(lm_eval=["mmlu"])).lm_eval == ("mmlu",)
