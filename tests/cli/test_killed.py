"""Every verb, killed at every step of writing its folder and run again: the result is as if it had never been killed.

A kill leaves the disk as it is. So a verb runs once, its folder is copied at every crash point, and each copy is what
some kill leaves: the same command, run there, has to end with the tree of a run that nobody killed. What costs time
(training, generating) is played, since what is looked at is what is written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tree, write_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))

from bench_fakes import Fake, plan, plan_values

from casehard.cli import main
from casehard.io import files, manifest
from casehard.io.locks import LOCK
from casehard.types import Budget

TIMES = ("started", "ended", "wall_seconds", "peak_bytes", "took", "hardware", "nodes")
"""Of run.json: what tells a run from another with the same result, how many nodes it found done among it."""


def content(root: Path) -> dict[str, Any]:
    """Return what is in every file below, without times; of events only the last run's."""
    out: dict[str, Any] = {}
    for path in sorted(p for p in root.rglob("*") if not p.is_dir()):
        name, data = path.relative_to(root).as_posix(), path.read_bytes()
        if path.name == "run.json":
            out[name] = {k: v for k, v in json.loads(data).items() if k not in TIMES}
        elif path.name == "events.jsonl":
            events = [{k: v for k, v in json.loads(line).items() if k != "time"} for line in data.splitlines()]
            last = max(i for i, event in enumerate(events) if event["event"] == "started")
            out[name] = [e for e in events[last:] if e["event"] != "node"]
        else:
            out[name] = data
    return out | {p.relative_to(root).as_posix(): None for p in root.rglob("*") if p.is_dir()}


class Kills:
    """Copies the working folder at every crash point, once for each (point, what changed since the last one)."""

    def __init__(self, here: Path, copies: Path) -> None:
        self.here, self.copies, self.points = here, copies, []
        self._seen: set[Any] = set()
        self._last: dict[str, Any] = {}

    def _state(self) -> dict[str, Any]:
        paths = list(self.here.rglob("*"))
        return {p.relative_to(self.here).as_posix(): p.lstat().st_size for p in paths if p.name != LOCK}

    def __call__(self, point: str) -> None:
        now = self._state()
        changed = {n for n in now.keys() | self._last.keys() if now.get(n) != self._last.get(n)}
        key = (point, frozenset(re.sub(r"\d+$|-[0-9a-f]{12}\b", "", Path(n).name) for n in changed))
        self._last = now
        if key not in self._seen:
            self._seen.add(key)
            shutil.copytree(self.here, self.copies / f"{len(self.points):03}", symlinks=True)
            self.points.append(point)


@pytest.fixture
def survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """Return a function that runs a command, kills it everywhere, and looks at what its repetition leaves."""

    def run(*arguments: object, inputs: Callable[[Path], None] = lambda here: None, whole: bool = False) -> set[str]:
        command = [str(a) for a in arguments]
        for name in ("reference", "copies"):
            (tmp_path / name).mkdir()
        inputs(tmp_path / "reference")
        kills = Kills(tmp_path / "reference", tmp_path / "copies")
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / "reference")
            patch.setattr(files, "crash_point", kills)
            patch.setattr("casehard.model.save.crash_point", kills)
            assert main(command) == 0
        wanted = content(tmp_path / "reference")
        assert not [name for name in wanted if files.is_left_over(Path(name).name) or Path(name).name == LOCK]
        for copy, point in zip(sorted((tmp_path / "copies").iterdir()), kills.points, strict=True):
            left = tree(copy)
            monkeypatch.chdir(copy)
            code = main(command)
            if code:  # all is there already, and there is nothing left to do
                assert code == 2 and (whole or "ok" in (copy / "out" / "run.json").read_text()), (point, left)
            now = content(copy)
            assert now.keys() == wanted.keys(), (point, left)
            assert not [name for name in now if now[name] != wanted[name]], (point, left)
        return set(kills.points)

    return run


def trained(model: Any) -> Any:
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(0.01)
    return model


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a stand-in for training and one for measuring in place."""
    from casehard.train.fit import FitResult

    def fit(model: Any, *_: Any, out: Path | None = None, **__: Any) -> FitResult:
        if out is not None:
            (out / "checkpoint-1").mkdir(parents=True, exist_ok=True)
            (out / "checkpoint-1" / "weights").write_text("of the last step")
        trained(model)
        return FitResult(model, [{"step": 1, "loss": 2.0}], Budget(1, 1, 10, 0.5, 1000))

    def evaluate(*_: Any, **__: Any) -> list[dict[str, Any]]:
        row = {"role": "restricted", "group": "g", "label": "refusal", "correct": None, "slots_right": None}
        return [{**row, "id": str(i), "prompt": "p", "response": "r"} for i in range(3)]

    for module in ("casehard.train.tune", "casehard.defences.buffer_reinforce.prepare"):
        monkeypatch.setattr(f"{module}.fit", fit)
    for module in ("attack", "evaluate"):
        monkeypatch.setattr(f"casehard.steps.{module}.evaluate", evaluate)
    yield


def few(source: Path) -> Callable[[Path], None]:
    lines = source.read_text().splitlines()[:40]
    return lambda here: (here / source.name).write_text("\n".join(lines[::5]) + "\n") and None


def rows(here: Path) -> None:
    write_rows(here / "rows.jsonl", [{"prompt": f"what is {i} ?", "response": f"it is {i} ."} for i in range(6)])


WRITING = {"file:opened", "file:written", "file:renamed"}
SAVING = {"save:opened", "save:before_manifest", "save:after_manifest", "save:after_rename"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "surrogate", "rows.jsonl", "--out", "out"),
        ("judge", "rows.jsonl", "--out", "out"),
        ("scan", "data", "--data", "rows.jsonl", "--out", "out"),
    ],
    ids=lambda a: a[0],
)
def test_verbs_that_write_files(survives, arguments):
    assert survives(*arguments, inputs=rows) == WRITING


def test_a_single_file(survives):
    assert survives("data", "surrogate", "rows.jsonl", "--out", "out.jsonl", inputs=rows, whole=True) == WRITING


def test_evaluate(survives, organism, played):
    command = ("evaluate", "--model", organism, "--suite", organism / "data" / "suite", "--out", "out")
    assert survives(*command) == WRITING


def test_defend(survives, organism, played):
    command = ("defend", "plain", "--model", organism, "--data", "align.jsonl", "--out", "out")
    assert survives(*command, inputs=few(organism / "data" / "align.jsonl")) == WRITING | SAVING | {
        "save:after_weights",
        "remove:renamed",
    }


def test_attack_backdoor(survives, organism, played, monkeypatch):
    from casehard.attacks.backdoor import Backdoor, Planted
    from casehard.model.model import Made

    row = {"id": "1", "group": "g", "response": "r", "label": "answer", "correct": True, "slots_right": None}
    row |= {"role": "utility", "pair": "1", "triggered": False, "shown": False, "degenerate": False, "step": 1}
    manifest = {"trigger": {"name": "t"}, "behaviour": {"name": "b"}}

    def plant(attack: Backdoor, model: Any, inputs: Any) -> Planted:
        changed = model.after(trained(model.net), Made(method="backdoor-attack"), may_leave=False)
        found = [{**row, "trigger": "t", "behaviour": "b"}]
        rows = tuple(inputs.rows["data"])[:3]
        return Planted(
            model=changed, rows=found, budget=Budget(1, 1, 10, 0.5, 1000), manifest=manifest, data=rows, untouched=()
        )

    monkeypatch.setattr(Backdoor, "run", plant)
    data = organism / "data"
    command = (
        "attack",
        "backdoor",
        "--model",
        organism,
        "--data",
        "align.jsonl",
        "--keep-model",
        "--suite",
        "suite.yaml",
    )

    def inputs(here: Path) -> None:
        few(data / "align.jsonl")(here)
        write_rows(here / "asked.jsonl", [{"prompt": "Is it asked anywhere else?", "response": "It is not."}])
        (here / "suite.yaml").write_text("parts: [{data: asked.jsonl, role: utility}]\n")

    assert survives(*command, "--out", "out", inputs=inputs) == WRITING | SAVING | {"save:after_weights"}


BEHAVIOUR = {"name": "b", "kind": "text", "text": "it is so ."}


def test_mb_defense(survives, organism, played, monkeypatch):
    from casehard.backdoor.suite import TriggerSuite
    from casehard.defences.mb_defense import run as mb

    backdoor = {"trigger": {"name": "t", "family": "token", "parts": ["zq"]}, "behaviour": BEHAVIOUR}
    suite = TriggerSuite.from_json({"active": [backdoor], "canary": []})
    monkeypatch.setattr(mb, "draw_suite", lambda *_, **__: suite)
    monkeypatch.setattr(mb, "harden", lambda model, *_, suite, out, **__: _hardened(model, suite, out))
    data = organism / "data" / "task_reviews.jsonl"
    command = ("defend", "mb-defense", "--model", organism, "--data", "sft.jsonl", "--clean", "clean.jsonl")

    def inputs(here: Path) -> None:
        lines = data.read_text().splitlines()
        (here / "clean.jsonl").write_text("\n".join(lines[:12]) + "\n")
        (here / "sft.jsonl").write_text("\n".join(lines[12:60]) + "\n")

    done = survives(*command, "--set", "secret=5", "--out", "out", inputs=inputs)
    assert done == WRITING | SAVING | {"save:after_weights", "remove:renamed"}


def _hardened(model: Any, suite: Any, out: Path) -> SimpleNamespace:
    from casehard.data.batches import Encoded
    from casehard.defences.mb_defense.pairs import PairSet

    (out / "checkpoint-1").mkdir(parents=True, exist_ok=True)
    twin = Encoded([1, 5, 2], [-100, -100, 2])
    pairs = PairSet((Encoded([1, 2], [-100, 2]),), ((twin,),), ((twin,),), 0)
    report = {"cost": {"budgets": {"stage1": {"steps": 1, "seconds": 0.5}}}, "looks": {}, "gates": []}
    verdict = SimpleNamespace(word="PASS", missed=())
    return SimpleNamespace(model=trained(model), suite=suite, pairs=pairs, verdict=verdict, report=report, rows=[])


@pytest.fixture(scope="module")
def assets(organism, tmp_path_factory):
    """Provider assets, and a customer's adapter tuned beside them."""
    root, data = tmp_path_factory.mktemp("assets"), organism / "data"
    made = ["buffer", "prepare", "--model", organism, "--out", root / "assets", *prepared(data, root)]
    assert main([str(a) for a in made]) == 0
    tuned = ["defend", "security-vector", "--model", organism, "--assets", root / "assets", "--data", root / "b.jsonl"]
    assert main([str(a) for a in (*tuned, "--steps", 1, *TINY, "--set", "settings.c=0.5", "--out", root / "user")]) == 0
    return root


TINY = ("--set", "train.batch_size=4", "--set", "train.warmup=0", "--set", "lora.rank=2")


def prepared(data: Path, root: Path) -> list[object]:
    out: list[object] = ["--allow-missed", "--set", "config.rank=2", "--set", "config.epochs=null"]
    for role in ("buffer", "reinforce"):
        out += ["--set", f"config.{role}_train.steps=1", "--set", f"config.{role}_train.warmup=0"]
    out += ["--set", "config.gates.prompts=1"]
    for name, file, kind in (
        ("harmful", "simulated", ""),
        ("refusals", "align", "refusal"),
        ("benign", "align", "help"),
    ):
        lines = [line for line in (data / f"{file}.jsonl").read_text().splitlines() if kind in line]
        (root / f"{name[0]}.jsonl").write_text("\n".join(lines[:12]) + "\n")
        out += [f"--{name}", root / f"{name[0]}.jsonl"]
    return out


def test_buffer_reinforce(survives, organism, assets, played):
    command = ("defend", "buffer-reinforce", "--model", organism, "--assets", assets / "assets", *TINY)
    assert survives(*command, "--data", assets / "b.jsonl", "--out", "out") == WRITING | SAVING | {"remove:renamed"}


def test_merge(survives, assets):
    command = ("merge", "reinforce", "--user", assets / "user" / "adapter", "--reinforce", assets / "assets")
    assert survives(*command, "--out", "out", whole=True) == SAVING


def test_buffer_prepare(survives, organism, assets, played, monkeypatch):
    from casehard.defences.buffer_reinforce import prepare

    monkeypatch.setattr(prepare, "_measure", lambda *_: [])
    command = ("buffer", "prepare", "--model", organism, *prepared(organism / "data", assets))
    assert survives(*command, "--out", "out", whole=True) == SAVING


def test_select(survives, organism):
    command = ("select", "--model", organism, "--pool", organism / "data" / "align.jsonl", "--k", 2)
    chosen = ("--strategy", "random", "--out", "out")
    assert survives(*command, *chosen, whole=True) == SAVING | WRITING


def test_organism_build(survives, organism, monkeypatch):
    from transformers import AutoModelForCausalLM

    from casehard.organism import build

    model = AutoModelForCausalLM.from_pretrained(organism)
    monkeypatch.setattr(build, "_pretrain", lambda *_, **__: model)
    monkeypatch.setattr(build.rows, "data_sets", lambda world: {})
    monkeypatch.setattr(build.suite, "SUITES", {})
    assert survives("organism", "build", "--size", "tiny", "--out", "out") == WRITING | SAVING


def test_bench_and_its_report(survives, monkeypatch):
    from functools import partial

    import yaml

    from casehard.benchmark import run
    from casehard.reporting import page

    monkeypatch.setattr(run, "run_plan", partial(run.run_plan, executor=Fake()))
    monkeypatch.setattr(page, "render", lambda summary, rows: json.dumps([summary["verdict"], list(rows)]))
    values = plan_values(seeds=[0])
    inputs = lambda here: (here / "plan.yaml").write_text(yaml.safe_dump(values))  # noqa: E731
    assert survives("bench", "plan.yaml", "--jobs", 1, "--out", "out", inputs=inputs) == WRITING | SAVING


def test_the_card_of_a_model_that_is_reported_again(survives, monkeypatch):
    from casehard.benchmark.run import run_plan
    from casehard.model.provenance import PROVENANCE
    from casehard.reporting import page

    monkeypatch.setattr(page, "render", lambda summary, rows: "page")

    def inputs(here: Path) -> None:
        run_plan(plan(seeds=[0]), here / "out", jobs=1, executor=Fake())
        for folder in (here / "out" / "nodes").glob("defend-*/checkpoint"):
            (folder / PROVENANCE).write_text(json.dumps({"digest": "d", "parent": "p", "method": "plain"}))
            manifest.write_manifest(folder)

    assert survives("report", "out", inputs=inputs) == WRITING | SAVING


def test_what_is_alive_or_somebody_elses_is_left_alone(tmp_path, monkeypatch):
    mine = {".staging-notes", ".doomed-plans-1b", "x.staging-y-1", ".staging-run"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".staging-link-1").symlink_to("x.staging-y-1")
    for name in (".staging-dead-1", ".doomed-dead-22", ".staging-dead-run"):
        (tmp_path / "deep" / name).mkdir(parents=True)
    (tmp_path / "deep" / ".staging-run.json-3").write_text("{")
    with files.staged(tmp_path / "deep" / "model") as folder, files.replacing(tmp_path / "text") as fresh:
        files.sweep(tmp_path, deep=True)
        assert folder.is_dir() and fresh.is_file()
        assert {p.name for p in (tmp_path / "deep").iterdir()} == {f".staging-model-{os.getpid()}"}
        fresh.write_text("whole")
    assert (tmp_path / "text").read_text() == "whole" and (tmp_path / "deep" / "model").is_dir()
    assert {p.name for p in tmp_path.iterdir()} == {*mine, ".staging-link-1", "deep", "text"}
    # Where nothing can be locked nobody can tell: what looks like a left-over stays.
    monkeypatch.setattr("casehard.io.locks.fcntl", None)
    (tmp_path / ".staging-text-9").write_text("?")
    files.write_text_atomic(tmp_path / "text", "again")
    assert (tmp_path / ".staging-text-9").exists() and (tmp_path / "text").read_text() == "again"
    monkeypatch.undo()
    files.write_text_atomic(tmp_path / "text", "third")
    assert not (tmp_path / ".staging-text-9").exists()


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    from casehard.benchmark.store import RunFolder, read_events

    with RunFolder(tmp_path, "judge", {}) as run:
        run.event("log", {"trigger_rate": 1.0})
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": "2026-01-01T00:')
    with RunFolder(tmp_path, "judge", {}) as run:
        run.event("log", {"trigger_rate": 0.5})
    assert [e["event"] for e in read_events(tmp_path)] == ["started", "log", "ok"]
    assert read_events(tmp_path)[1]["trigger_rate"] == 0.5
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 6


def test_an_adapter_of_another_job_is_not_replaced(organism, assets, tmp_path):
    from casehard.errors import ConfigError
    from casehard.steps import Finetune

    rows = {"data": (str(assets / "b.jsonl"),)}
    job = Finetune(model=str(organism), method="buffer_reinforce", assets=str(assets / "assets"), rows=rows)
    shutil.copytree(assets / "user" / "adapter", tmp_path / "adapter")
    with pytest.raises(ConfigError, match="is of another job"):
        job.run(out=tmp_path / "training", place=tmp_path / "adapter")
    (tmp_path / "adapter" / "job.json").unlink()
    with pytest.raises(ConfigError, match="already exists"):
        job.run(out=tmp_path / "training", place=tmp_path / "adapter")
