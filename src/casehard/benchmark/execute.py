"""One node's work: jobs are built from plain values, results go to the node's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from casehard.benchmark.graph import Node, map_specs
from casehard.benchmark.shapes import NodeSummary
from casehard.benchmark.store import RunFolder, read_finished, read_run, read_summary, unchanged
from casehard.compat import version_of
from casehard.config import build
from casehard.defences import DEFENCES
from casehard.errors import Corrupt, UserError
from casehard.io.files import remove
from casehard.io.manifest import MANIFEST, verify
from casehard.model.source import is_snapshot, origin
from casehard.train.cost import reset_peak, training_flops


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
    workers: int = 1
    """Nodes that run beside each other on the machine."""

    @property
    def config(self) -> dict[str, Any]:
        """Return the node's settings with ``{base}`` filled in."""
        found: dict[str, Any] = map_specs(
            dict(self.node.config), lambda _, spec: spec.replace("{base}", str(self.base))
        )
        return found


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
    import torch

    from casehard.train.recipe import uses_bf16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "torch": str(torch.__version__),
        **{name: version_of(name) for name in ("transformers", "peft")},
        "threads": threads or torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "auto_precision": "bf16" if uses_bf16("auto", device) else "fp32",
    }


def step_of(task: Task) -> Any:
    """Build the step a node asks for; a wrong method, setting or attack key is found here, before anything runs.

    Raises:
        ConfigError: unknown method, preset or key.
    """
    made = {"defend": _defend, "evaluate": _evaluate, "prepare": _prepare, "attack": _attack}[task.node.kind]
    try:
        return made(task)
    except UserError as error:
        error.message = f"{task.node.label}: {error.message}"
        raise


def _inputs(task: Task, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every step reads."""
    shared = {key: config.get(key) for key in ("system", "max_length", "limit")}
    rows = {role: tuple(specs) for role, specs in config.get("rows", {}).items() if specs}
    return {"model": str(task.parent), "rows": rows, "suite": config["suite"], "seed": task.node.seed, **shared}


def _method(task: Task, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the method of a training as the fields of ``casehard.steps.Defence``."""
    from casehard.data.select import SelectConfig

    chosen = config.get("select")
    return {
        "method": config["method"],
        "preset": config["preset"],
        "settings": config["settings"],
        "select": None if chosen is None else build(SelectConfig, chosen, where="select"),
        "assets": str(task.assets or config.get("assets", "")),
    }


def _training(task: Task, config: Mapping[str, Any], *, given: tuple[str, ...] = ()) -> Any:
    """Return a training step, its settings and data roles held against what its method takes.

    Args:
        given: roles that it will get besides those of its own rows.
    """
    from casehard.steps import Finetune
    from casehard.train.recipe import TrainConfig
    from casehard.train.tune import Lora

    train = build(TrainConfig, config["train"], where="train")
    lora = None if config.get("lora") is None else build(Lora, config["lora"], where="lora")
    step = Finetune(**_inputs(task, config), **_method(task, config), train=train, lora=lora)
    step.check([role for role in (*step.rows, *given) if role != "data"], trains=not given)
    return step


def _defend(task: Task) -> Any:
    return _training(task, task.config)


def _evaluate(task: Task) -> Any:
    from casehard.evaluation.lm_eval import LmEval, require_program
    from casehard.steps import Evaluate

    config, public = task.config, None
    if config.get("lm_eval"):
        public = build(LmEval, {"tasks": config["lm_eval"]}, where="plan.lm_eval")
        require_program(public)
    planted = {key: config[key] for key in ("trigger", "behaviour") if config.get(key)}
    return Evaluate(**_inputs(task, config), **planted, lm_eval=public)


def _attack(task: Task) -> Any:
    from casehard.evaluation.framing import Frame
    from casehard.steps import Attack, Chain, Defence

    config = task.config
    inside, inputs = config["inside"], _inputs(task, config)
    made = None
    if inside is not None:
        made = Defence(**_method(task, inside))
        inputs["rows"] |= {role: tuple(specs) for role, specs in inside["rows"].items()}
        made.check([*inside["rows"], *(["clean"] if made.spec.pipeline else [])], trains=True)
    verified = config["verified"] if inside is not None else 0
    own = {"attack": config["attack"], "config": config["config"], "full_at": tuple(config["full_at"])}
    asked = config.get("in_format")
    framed = build(Frame, asked, where="in_format") if isinstance(asked, Mapping) else asked
    step = Attack(**inputs, **own, defence=made, verified=verified, in_format=framed)
    step.check_settings()
    then = tuple(_training(task, training, given=("clean",) if _pipes(training) else ()) for training in config["then"])
    # A chain keeps what it attacked for the next one that begins with the same poison.
    if then or (step.spec.plants and made is None):
        return Chain(attack=step, then=then, verified=config["verified"])
    return step


def _pipes(training: Mapping[str, Any]) -> bool:
    return DEFENCES.find(training["method"]).pipeline


def _prepare(task: Task) -> Any:
    from casehard.defences.buffer_reinforce.prepare import Prepare, PrepareConfig

    config = task.config
    settings = build(PrepareConfig, config["settings"], where="settings")
    return Prepare(**_inputs(task, config), config=settings)


def execute(task: Task) -> Outcome:
    """Do a node's work with the library's own steps."""
    if task.node.kind == "base":
        return _base(task)
    step = step_of(task)
    if task.node.kind == "prepare":
        done = step.run(out=task.out / "assets")
        return Outcome(cost=done.cost, path=str(task.out / "assets"), digest=done.facts.pop("digest"), facts=done.facts)
    if task.node.kind == "defend":
        from casehard.steps import harden

        done, made = harden(step, task.out, label=task.node.label)
        assert made is not None
        told = {key: done.facts[key] for key in ("telemetry", "selection") if done.facts.get(key)}
        return Outcome(cost=done.cost, path=str(made.path), digest=made.digest, facts=told, log=done.log)
    # What the program of public benchmarks wrote is kept; an attack keeps nothing on disk.
    done = step.run(out=task.out if task.node.kind == "evaluate" else None, label=task.node.label)
    facts = {key: value for key, value in done.facts.items() if key != "assets_digest"}
    if task.node.kind == "attack":
        facts |= _paid(done)
    # A model that is never attacked stands beside the ends of attacks; an attack without training is one step long.
    at = task.node.config.get("step")
    if at is not None:
        done = replace(done, rows=[{**row, "step": at} for row in done.rows])
    return Outcome(rows=done.rows, cost=done.cost, facts=facts, log=done.log)


def _paid(done: Any) -> dict[str, int]:
    """Return what an attack took beyond its cost: rows of the attacker's, and FLOPs where something was trained."""
    kinds, phases = [done.facts.get(f"{kind}_rows") for kind in ("harmful", "benign")], done.facts.get("rows")
    paid: dict[str, int] = {}
    if any(count is not None for count in kinds):
        paid["attacker_rows"] = sum(count or 0 for count in kinds)
    elif isinstance(phases, list) and phases:
        paid["attacker_rows"] = max(phases)
    if done.model is not None and (tokens := done.cost.get("tokens")):
        paid["flops"] = training_flops(done.model.net, tokens)
    return paid


def _base(task: Task) -> Outcome:
    from casehard.model.digest import folder_digest

    config = task.node.config
    if "model" in config:
        path = Path(config["model"])
    else:
        path = _organism(config["world_seed"], config["size"], task.cache)
    came = origin(path)
    return Outcome(path=str(path.resolve()), digest=folder_digest(path), facts={"origin": came} if came else {})


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
        if node.kind in ("evaluate", "attack") and not outcome.rows:
            raise UserError(f"{node.label}: no rows came back", hint="is the suite empty?")
        for line in outcome.log:
            run.event("log", line)
        # Relative where it can be, so that a run folder may be moved.
        inside = outcome.path and Path(outcome.path).resolve().is_relative_to(task.out.resolve())
        path = str(Path(outcome.path).resolve().relative_to(task.out.resolve())) if inside else outcome.path
        summary: dict[str, Any] = {
            "node": node.digest,
            "cost": outcome.cost if measures else {**outcome.cost, "peak_bytes": None},
            "workers": task.workers,
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
        # Somebody else's checkpoint has no manifest, and a snapshot not all of its files; the node's digest names it.
        if node.kind != "base" or ((path / MANIFEST).exists() and not is_snapshot(path)):
            verify(path)
    else:
        unchanged(out, {"files": {"rows.jsonl": summary.get("rows_sha256") or "none"}}, "rows.jsonl")
    return summary
