"""One node's work, in this process or a worker: jobs are built from plain values, results go to the node's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from casehard.bench.matrix import Node
from casehard.bench.records import told
from casehard.bench.shapes import NodeSummary
from casehard.bench.store import RunFolder, read_finished, read_run, read_summary, unchanged
from casehard.config import build, to_dict
from casehard.errors import ConfigError, Corrupt, Interrupted, StorageError, UserError
from casehard.files import MANIFEST, remove, verify
from casehard.train.meter import reset_peak


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
    assets: Path | None = None
    """What the prepare node made that this one needs."""
    cache: Path
    """Where built organisms are kept."""
    threads: int = 0
    """Torch threads; 0 leaves the default."""
    lanes: int = 1
    """Nodes that run beside each other on the machine."""

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


def environment(threads: int) -> dict[str, Any]:
    """Return what floating-point results depend on besides config, data and code.

    Args:
        threads: torch threads of a node; 0 for torch's own default.
    """
    from importlib.metadata import version

    import torch

    from casehard.train.recipe import uses_bf16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "torch": str(torch.__version__),
        **{name: version(name) for name in ("transformers", "peft")},
        "threads": threads or torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "auto_precision": "bf16" if uses_bf16("auto", device) else "fp32",
    }


def _check_method(config: Mapping[str, Any], where: str, *, needs: str = "") -> None:
    """Build the method's configuration, as the job will, and hold its data roles against what it takes."""
    from casehard.defend import find

    spec = find(config["method"])
    from casehard.jobs import ROLES

    for role in ROLES:
        if role in spec.needs and not config[role]:
            raise ConfigError(f"{where}: method {config['method']!r} needs {role} rows and has none")
        if config[role] and role not in spec.takes:
            raise ConfigError(
                f"{where}: method {config['method']!r} takes no {role} rows", hint="they would be ignored"
            )
    if "assets" in config:  # a job's, not an alignment's
        given, wants = bool(config["assets"] or needs), "assets" in spec.takes
        if given != wants and (given or "assets" in spec.needs):
            lacks = "takes no assets" if given else "needs assets and has none"
            raise ConfigError(f"{where}: method {config['method']!r} {lacks}")
        if config["select"] is not None and not config["safe"]:
            raise ConfigError(f"{where}: select without safe rows to choose from")
    presets, name = spec.presets(), config["preset"]
    if name and name not in presets:
        hint = f"presets: {', '.join(presets)}" if presets else "it has none"
        raise ConfigError(f"{where}: method {config['method']!r} has no preset {name!r}", hint=hint)
    start = to_dict(presets[name]) if name else {}
    build(spec.load()[1], {**start, **config["settings"]}, where=f"{where}: settings")


def job_of(task: Task) -> Any:
    """Build the job a node asks for; a wrong method, setting or attack key is found here, before anything runs.

    Raises:
        ConfigError: unknown method, preset or key.
    """
    from casehard import jobs
    from casehard.attack.finetune import FinetuneAttack
    from casehard.train.recipe import TrainConfig

    config, model, where = task.node.config, str(task.parent), task.node.label
    if task.node.kind == "defend":
        _check_method(config, where)
        return jobs.DefendJob(
            model=model,
            method=config["method"],
            preset=config["preset"],
            data=task.specs("data"),
            unsafe=task.specs("unsafe"),
            retain=task.specs("retain"),
            safe=task.specs("safe"),
            settings=config["settings"],
            train=build(TrainConfig, config["train"], where=f"{where}: train"),
            suite=task.suite,
            system=config["system"],
            max_length=config["max_length"],
            seed=task.node.seed,
        )
    if task.node.kind == "evaluate":
        return jobs.EvaluateJob(model=model, suite=task.suite, system=config["system"], limit=config["limit"])
    if task.node.kind == "prepare":
        return _prepare_job(task)
    if task.node.kind == "harden":
        from casehard.bench.arms import arm_of

        return arm_of(config, model, task.specs("data"), task.suite, seed=task.node.seed, where=where)
    keys = ("mode", "share", "steps", "lr", "evaluate_at")
    own = config["job_settings"] if task.node.kind == "tune" else config["settings"]
    attack = build(FinetuneAttack, {**own, **{key: config[key] for key in keys}}, where=where)
    never = [step for step in config["full_at"] if step not in attack.checkpoints]
    if never:
        raise ConfigError(f"{where}: full_at {never[0]} is not among the evaluated steps {list(attack.checkpoints)}")
    common: dict[str, Any] = {
        "model": model,
        "harmful": task.specs("harmful"),
        "benign": task.specs("benign"),
        "suite": task.suite,
        "config": attack,
        "full_at": tuple(config["full_at"]),
        "system": config["system"],
        "max_length": config["max_length"],
        "limit": config["limit"],
        "seed": task.node.seed,
    }
    return _tune_job(task, common, where) if task.node.kind == "tune" else jobs.AttackJob(**common)


def _tune_job(task: Task, common: dict[str, Any], where: str) -> Any:
    from casehard import jobs
    from casehard.data.select import SelectConfig

    config = task.node.config
    _check_method(config, where, needs=task.node.needs)
    assets = str(task.assets or config["assets"].replace("{base}", str(task.base)))
    chosen = config["select"]
    return jobs.TuneJob(
        **common,
        method=config["method"],
        preset=config["preset"],
        settings=config["settings"],
        unsafe=task.specs("unsafe"),
        retain=task.specs("retain"),
        safe=task.specs("safe"),
        select=None if chosen is None else build(SelectConfig, chosen, where=f"{where}: select"),
        assets=assets,
    )


def _prepare_job(task: Task) -> Any:
    from casehard.buffer.prepare import PrepareConfig, PrepareJob

    config = task.node.config
    return PrepareJob(
        model=str(task.parent),
        harmful=task.specs("harmful"),
        refusals=task.specs("refusals"),
        benign=task.specs("benign"),
        config=build(PrepareConfig, config["settings"], where=f"{task.node.label}: settings"),
        suite=task.suite,
        system=config["system"],
        max_length=config["max_length"],
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
    if task.node.kind == "tune":
        return _tuned(jobs.run_tune(job, label=task.node.label))
    if task.node.kind == "prepare":
        return _prepared(job, task.out)
    if task.node.kind == "harden":
        from casehard.bench.arms import run_arm

        rows, cost, facts = run_arm(job, label=task.node.label)
        return Outcome(rows=rows, cost=cost, facts=facts)
    attacked = jobs.run_attack(job, label=task.node.label)
    return Outcome(rows=attacked.rows, cost=asdict(attacked.budget), facts=_drawn(attacked), log=attacked.log)


def _drawn(run: Any) -> dict[str, Any]:
    return {key: getattr(run, key) for key in ("harmful_rows", "benign_rows", "known_rows")}


def _tuned(done: Any) -> Outcome:
    run, picked = done.run, done.selection.get("picks", {})
    facts = {**_drawn(run), "telemetry": told(run.log)}
    if done.selection:
        facts["selection"] = {key: picked[key] for key in ("log_det", "mean_relevance", "exhausted_at")}
        facts["selection"] |= {"coverage": done.selection["coverage"], "rows": len(picked["order"])}
    return Outcome(rows=run.rows, cost=asdict(run.budget), facts=facts, log=run.log)


def _prepared(job: Any, out: Path) -> Outcome:
    from casehard.buffer.prepare import run_prepare

    done = run_prepare(job, out / "assets")
    made = done.assets
    facts = {"gates": made.record["gates"], "missed": made.record["missed"]}
    return Outcome(cost=done.cost, path=str(made.path), digest=made.digest, facts=facts)


def _base(task: Task) -> Outcome:
    from casehard.model.digest import folder_digest

    config = task.node.config
    if "model" in config:
        path = Path(config["model"])
    else:
        path = _organism(config["world_seed"], config["size"], task.cache)
    return Outcome(path=str(path.resolve()), digest=folder_digest(path))


def _organism(world_seed: int, size: str, cache: Path) -> Path:
    """Return the organism of a world; damaged builds in the cache are removed and made again."""
    from casehard.organism.build import ensure

    try:
        return ensure(world_seed, size, cache)
    except Corrupt:
        for path in cache.glob(f"organism-{world_seed}-{size}-*"):
            try:
                verify(path)
            except Corrupt:
                remove(path)
        # A damaged copy inside the package fails again, as it should: nothing here may replace it.
        return ensure(world_seed, size, cache)


def _limit_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def work(task: Task, executor: Executor) -> dict[str, Any]:
    """Run one node inside its run folder; return ``{"summary", "peak_bytes"}``.

    The summary is written before the folder is marked ``ok``: a folder marked so is whole.
    """
    node = task.node
    # A process runs many nodes: without a reset the peak would be that of the largest one so far.
    measures = reset_peak()
    if executor is execute:
        _limit_threads(task.threads)
    parents = {"parent": task.parent_digest} if task.parent_digest else {}
    config: dict[str, Any] = {"node": node.digest, "kind": node.kind, "label": node.label, "code": node.code}
    config |= {"setting": dict(node.setting), **node.config}
    with RunFolder(task.out, node.kind, config, seeds=[node.seed], parents=parents, data=node.data) as run:
        run.measures_memory = measures
        outcome = executor(task)
        if node.kind in ("evaluate", "attack", "tune", "harden") and not outcome.rows:
            raise UserError(f"{node.label}: no rows came back", hint="is the suite empty?")
        for line in outcome.log:
            run.event("log", line)
        # Relative where it can be, so that a run folder may be moved.
        inside = outcome.path and Path(outcome.path).resolve().is_relative_to(task.out.resolve())
        path = str(Path(outcome.path).resolve().relative_to(task.out.resolve())) if inside else outcome.path
        summary: dict[str, Any] = {
            "node": node.digest,
            "cost": outcome.cost if measures else {**outcome.cost, "peak_bytes": None},
            "lanes": task.lanes,
            "path": path,
            "digest": outcome.digest,
            **outcome.facts,
        }
        if outcome.rows:
            summary["rows"] = len(outcome.rows)
            summary["rows_sha256"] = run.rows(outcome.rows)
        run.summary(summary)
    return {"summary": summary, "peak_bytes": run.info["peak_bytes"]}


def finished(node: Node, out: Path) -> dict[str, Any] | None:
    """Return the summary of a node that is there, whole and unchanged; None when it has to run.

    Raises:
        Corrupt: it was finished but its checkpoint or rows changed or vanished since.
    """
    if not (out / "run.json").is_file() or read_run(out).get("status") != "ok":
        return None
    if (run := read_finished(out))["config"].get("node") != node.digest:
        return None
    summary = read_summary(out, run, NodeSummary)
    if node.kind in ("base", "defend", "prepare"):
        path = out / str(summary.get("path", ""))
        if not path.is_dir():
            return None
        # Somebody else's checkpoint has no manifest; its content is in the node's digest.
        if node.kind != "base" or (path / MANIFEST).exists():
            verify(path)
    else:
        unchanged(out, {"files": {"rows.jsonl": summary.get("rows_sha256") or "none"}}, "rows.jsonl")
    return summary


def attempt(task: Task, executor: Executor) -> dict[str, Any]:
    """Run :func:`work`; return ``{"summary": ...}``, or ``{"error", "message", "hint"}`` for a failure.

    Errors travel as plain values, because an exception that cannot be unpickled would take the worker down with it.

    Raises:
        Interrupted: the run was asked to stop, which is no failure of this node and no reason to begin the next.
        StorageError: the disk is full or closed; so it will be for the next.
    """
    try:
        return work(task, executor)
    except (Interrupted, StorageError):
        raise
    except Exception as error:
        return describe(error)


def attempt_apart(task: Task, executor: Executor) -> dict[str, Any]:
    """Do what :func:`attempt` does in a worker; what it raises comes back as ``interrupted`` or ``storage``."""
    try:
        return attempt(task, executor)
    except Interrupted as error:
        return {"interrupted": error.exit_code}
    except StorageError as error:
        return {"storage": error.message, "hint": error.hint}


def describe(error: BaseException) -> dict[str, Any]:
    """Return what a report says about a failure."""
    known = isinstance(error, UserError)
    message = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    hint = error.hint if isinstance(error, UserError) else ""
    return {"error": type(error).__name__, "message": message[:500], "hint": hint, "expected": known}
