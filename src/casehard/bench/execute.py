"""One node's work, in this process or a worker: jobs are built from plain values, results go to the node's folder."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from casehard.bench.matrix import Node
from casehard.bench.store import RunFolder, read_json
from casehard.config import build
from casehard.errors import Corrupt, UserError
from casehard.files import MANIFEST, verify
from casehard.train import progress


@dataclass(frozen=True, kw_only=True)
class Task:
    """A node with its inputs on this machine; picklable."""

    node: Node
    out: Path
    base: Path | None = None
    """Folder that ``{base}`` stands for."""
    parent: Path | None = None
    """Checkpoint to start from."""
    parent_digest: str = ""
    cache: Path
    """Where built organisms are kept."""
    threads: int = 0
    """Torch threads; 0 leaves the default."""

    def specs(self, key: str) -> tuple[str, ...]:
        """Return the data specs under ``key`` with ``{base}`` filled in."""
        return tuple(spec.replace("{base}", str(self.base)) for spec in self.node.config[key])

    @property
    def suite(self) -> str:
        """Return the suite's path."""
        return str(self.node.config["suite"]).replace("{base}", str(self.base))


@dataclass(frozen=True)
class Outcome:
    """What a node produced."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """One per prompt (and per ``step`` for attacks)."""
    cost: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    """Checkpoint folder, for nodes that have children."""
    digest: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping in the node's summary."""
    log: list[dict[str, Any]] = field(default_factory=list)


Executor = Callable[[Task], Outcome]


def job_of(task: Task) -> Any:
    """Build the job a node asks for; a wrong method, setting or attack key is found here, before anything runs.

    Raises:
        ConfigError: unknown method, preset or key.
    """
    from casehard import jobs
    from casehard.attack.finetune import FinetuneAttack
    from casehard.defend import find
    from casehard.train.recipe import TrainConfig

    config, model, where = task.node.config, str(task.parent), task.node.label
    if task.node.kind == "defend":
        find(config["method"])
        return jobs.DefendJob(
            model=model,
            method=config["method"],
            preset=config["preset"],
            data=task.specs("data"),
            unsafe=task.specs("unsafe"),
            retain=task.specs("retain"),
            settings=config["settings"],
            train=build(TrainConfig, config["train"], where=f"{where}: train"),
            suite=task.suite,
            system=config["system"],
            max_length=config["max_length"],
            seed=task.node.seed,
        )
    if task.node.kind == "evaluate":
        return jobs.EvaluateJob(model=model, suite=task.suite, system=config["system"], limit=config["limit"])
    keys = ("mode", "share", "steps", "lr", "evaluate_at")
    settings = {**config["settings"], **{key: config[key] for key in keys}}
    return jobs.AttackJob(
        model=model,
        harmful=task.specs("harmful"),
        benign=task.specs("benign"),
        suite=task.suite,
        config=build(FinetuneAttack, settings, where=f"{where}: settings"),
        full_at=tuple(config["full_at"]),
        system=config["system"],
        max_length=config["max_length"],
        limit=config["limit"],
        seed=task.node.seed,
    )


def execute(task: Task) -> Outcome:
    """Do a node's work with the library's own jobs."""
    from casehard import jobs

    if task.node.kind == "base":
        return _base(task)
    job = job_of(task)
    if task.node.kind == "defend":
        done = jobs.run_defend(job, task.out, label=task.node.label)
        return Outcome(cost=done.cost, path=str(done.checkpoint.path), digest=done.checkpoint.digest, log=done.log)
    if task.node.kind == "evaluate":
        return Outcome(rows=jobs.run_evaluate(job))
    attacked = jobs.run_attack(job, label=task.node.label)
    facts = {"harmful_rows": attacked.harmful_rows, "benign_rows": attacked.benign_rows}
    return Outcome(rows=attacked.rows, cost=asdict(attacked.budget), facts=facts, log=attacked.log)


def _base(task: Task) -> Outcome:
    from casehard.model.digest import folder_digest

    config = task.node.config
    if "model" in config:
        path = Path(config["model"])
    else:
        from casehard.organism.build import ensure

        path = ensure(config["world_seed"], config["size"], task.cache)
    return Outcome(path=str(path.resolve()), digest=folder_digest(path))


def _limit_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def work(task: Task, executor: Executor) -> dict[str, Any]:
    """Run one node inside its run folder and return its summary.

    The summary is written before the folder is marked ``ok``: a folder marked so is whole.
    """
    node = task.node
    if executor is execute:
        _limit_threads(task.threads)
    parents = {"parent": task.parent_digest} if task.parent_digest else {}
    config = {"node": node.digest, "kind": node.kind, "label": node.label, "code": node.code, **node.config}
    with RunFolder(task.out, node.kind, config, seeds=[node.seed], parents=parents, data=node.data) as run:
        outcome = executor(task)
        if node.kind in ("evaluate", "attack") and not outcome.rows:
            raise UserError(f"{node.label}: no rows came back", hint="is the suite empty?")
        for line in outcome.log:
            run.event("log", line)
        # Relative where it can be, so that a run folder may be moved.
        inside = outcome.path and Path(outcome.path).resolve().is_relative_to(task.out.resolve())
        path = str(Path(outcome.path).resolve().relative_to(task.out.resolve())) if inside else outcome.path
        summary: dict[str, Any] = {
            "node": node.digest,
            "cost": outcome.cost,
            "path": path,
            "digest": outcome.digest,
            **outcome.facts,
        }
        if outcome.rows:
            summary["rows"] = len(outcome.rows)
            summary["rows_sha256"] = run.rows(outcome.rows)
        run.summary(summary)
    return summary


def finished(node: Node, out: Path) -> dict[str, Any] | None:
    """Return the summary of a node that is there, whole and unchanged; None when it has to run.

    Raises:
        Corrupt: it was finished but its checkpoint or rows changed since.
    """
    if not (out / "run.json").is_file() or not (out / "summary.json").is_file():
        return None
    run = read_json(out / "run.json")
    if run.get("status") != "ok" or run.get("config", {}).get("node") != node.digest:
        return None
    summary: dict[str, Any] = read_json(out / "summary.json")
    if node.kind in ("base", "defend"):
        path = out / summary["path"]
        if not path.is_dir():
            return None
        # Somebody else's checkpoint has no manifest; its content is in the node's digest.
        if node.kind == "defend" or (path / MANIFEST).exists():
            verify(path)
    else:
        with (out / "rows.jsonl").open("rb") as handle:
            actual = hashlib.file_digest(handle, "sha256").hexdigest()
        if actual != summary["rows_sha256"]:
            raise Corrupt(
                f"{out / 'rows.jsonl'} was changed: expected sha256 {summary['rows_sha256']}, actual {actual}"
            )
    return summary


def attempt(task: Task, executor: Executor) -> dict[str, Any]:
    """Run :func:`work`; return ``{"summary": ...}``, or ``{"error", "message", "hint"}`` for a failure.

    Errors travel as plain values, because an exception that cannot be unpickled would take the worker down with it.
    """
    try:
        return {"summary": work(task, executor)}
    except Exception as error:
        return describe(error)


def describe(error: BaseException) -> dict[str, Any]:
    """Return what a report says about a failure."""
    known = isinstance(error, UserError)
    message = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    hint = error.hint if isinstance(error, UserError) else ""
    return {"error": type(error).__name__, "message": message[:500], "hint": hint, "expected": known}


def start_worker(threads: int) -> None:
    """Prepare a worker process: thread counts before torch is imported, no progress lines of its own."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    # The parent decides when to stop and tells the workers; a Ctrl-C reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    progress.set_quiet()
