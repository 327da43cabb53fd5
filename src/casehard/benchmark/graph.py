"""A plan as a graph of nodes, each named by the digest of (parent, config, data, code version). No torch here.

base -> defend -> evaluate | attack. The undefended row has no defend node: its children hang on the base.
At stage tuning: base -> defend (aligned) -> evaluate | tune, where a tune node may also need a prepare node.
At stage backdoor: base -> harden, one node a cell, in memory from the poisoned training to the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from casehard.benchmark.backdoor import Arm, BackdoorPlan, arm_config
from casehard.benchmark.closure import code_of
from casehard.benchmark.inputs import Inputs, resolve
from casehard.benchmark.plan import SPECS, Attack, Base, Defence, Plan, Prepare, load_plan, parse_plan
from casehard.config import digest
from casehard.defences import DEFENCES
from casehard.evaluation.judges import JUDGES
from casehard.io.manifest import file_digest

__all__ = ["Cell", "Matrix", "Node", "code_version", "expand", "load_plan", "parse_plan"]

Kind = Literal["base", "defend", "prepare", "evaluate", "attack", "tune", "harden"]

STEPS: dict[Kind, tuple[str, ...]] = {
    "base": ("casehard.organism.build",),
    "defend": ("casehard.steps.finetune",),
    "evaluate": ("casehard.steps.evaluate",),
    "attack": ("casehard.steps.attack", "casehard.attacks.finetune"),
    "prepare": ("casehard.defences.buffer_reinforce.prepare",),
    "tune": ("casehard.steps.attack", "casehard.attacks.finetune"),
    "harden": ("casehard.benchmark.arms",),
}
"""Modules that do the work of a node; what they import is followed, see ``bench.closure``."""


def code_version(kind: Kind, method: str = "") -> str:
    """Return what names the code that a node runs: its step, the method in it and every judge, with their imports."""
    named = (*((DEFENCES.find(method).module,) if method else ()), *(judge.module for judge in JUDGES.values()))
    return f"{code_of((*STEPS[kind], *named))}.{file_digest(_execute())[:8]}"


def _execute() -> Path:
    """Return the file that builds steps from nodes: it imports all of them, so it counts by itself."""
    return Path(__file__).with_name("execute.py")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One unit of work: a function of its parent, its config, its seed and its data."""

    kind: Kind
    label: str
    """For people: base/defence/seed/attack."""
    digest: str
    config: Mapping[str, Any]
    """Settings with data specs resolved except for the ``{base}`` placeholder."""
    seed: int = 0
    parent: str = ""
    """Digest of the node whose checkpoint this one starts from."""
    needs: str = ""
    """Digest of the prepare node whose assets this one uses."""
    base: str = ""
    """Digest of the base node, which ``{base}`` stands for."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Digest of every file outside the base folder."""
    code: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)
    """Package versions, threads, device and precision, on which floating-point results depend."""

    @property
    def folder(self) -> str:
        """Return the name of the node's run folder."""
        return f"{self.kind}-{self.label.replace('/', '-')[:60]}-{self.digest[:12]}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One place of the table and the node that fills it; ``attack`` is empty for the evaluation at step 0."""

    base: str
    family: str
    defence: str
    seed: int
    attack: str
    digest: str


@dataclass(frozen=True)
class Matrix:
    """All nodes in an order in which parents come first, and the cells they fill."""

    nodes: Mapping[str, Node]
    cells: tuple[Cell, ...]
    defend: Mapping[tuple[str, str, int], str]
    """(base, defence, seed) -> digest of the node whose cost is the defence's: at stage tuning, the headline's job."""


def _base_node(base: Base, inputs: Inputs, setting: Mapping[str, Any]) -> Node:
    folder, code = inputs.home(base), code_version("base")
    if folder is None:
        config: dict[str, Any] = {"world_seed": base.world_seed, "size": base.size}
        name = digest({"kind": "base", **config, "code": code, "setting": dict(setting)})
        return Node(kind="base", label=base.name, digest=name, base=name, config=config, code=code, setting=setting)
    content = inputs.model(folder)
    name = digest({"kind": "base", "content": content})
    data = {f"base {base.name}": content}
    return Node(kind="base", label=base.name, digest=name, base=name, config={"model": str(folder)}, data=data)


def _defend_config(plan: Plan, row: Defence) -> dict[str, Any]:
    return {
        "method": row.method,
        "preset": row.preset,
        "settings": dict(row.settings),
        "train": dict(row.train),
        "data": list(row.data),
        "unsafe": list(row.unsafe),
        "retain": list(row.retain),
        "safe": list(row.safe),
        "suite": plan.suite,
        "system": plan.system,
        "max_length": plan.max_length,
    }


def _attack_config(plan: Plan, attack: Attack) -> dict[str, Any]:
    suite = attack.suite or plan.suite
    # Another suite has not been asked at step 0 yet.
    first = [0] if suite != plan.suite else []
    return {
        "mode": attack.mode,
        "share": attack.share,
        "steps": attack.steps,
        "lr": attack.lr,
        "evaluate_at": [*first, *attack.evaluate_at],
        "full_at": [*first, *attack.full_at],
        "settings": dict(attack.settings),
        "harmful": list(attack.harmful),
        "benign": list(attack.benign),
        "suite": suite,
        "system": plan.system,
        "max_length": plan.max_length,
        "limit": plan.limit,
    }


def _align_config(plan: Plan) -> dict[str, Any]:
    assert plan.align is not None
    row = Defence(name="aligned", method="plain", data=plan.align.data, train=plan.align.train)
    return _defend_config(plan, row)


def _prepare_config(plan: Plan, row: Prepare) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "harmful": list(row.harmful),
        "refusals": list(row.refusals),
        "benign": list(row.benign),
        "settings": dict(row.settings),
        "suite": plan.suite,
        "system": plan.system,
        "max_length": plan.max_length,
    }


def _tune_config(plan: Plan, row: Defence, attack: Attack) -> dict[str, Any]:
    job = _attack_config(plan, attack)
    return {
        **job,
        "job_settings": job["settings"],
        "method": row.method,
        "preset": row.preset,
        "settings": dict(row.settings),
        "unsafe": list(row.unsafe),
        "retain": list(row.retain),
        "safe": list(row.safe),
        "select": None if row.select is None else dict(row.select),
        "assets": "" if row.assets.startswith("prepared:") else row.assets,
    }


class _Expander:
    """Collects nodes; the same work asked for twice becomes one node."""

    def __init__(self, root: Path, setting: Mapping[str, Any]) -> None:
        self.inputs = Inputs(root)
        self.setting = dict(setting)
        self.nodes: dict[str, Node] = {}

    def start(self, base: Base) -> Node:
        """Add a base and return its node."""
        node = _base_node(base, self.inputs, self.setting)
        self.nodes[node.digest] = node
        return node

    def add(
        self, kind: Kind, config: dict[str, Any], *, label: str, base: Base, parent: str, seed: int, needs: str = ""
    ) -> str:
        top = self.nodes[parent].base
        identity, resolved, data = dict(config), dict(config), {}
        for key in (*SPECS, "suite", "assets"):
            specs = config.get(key, [])
            many = ([specs] if specs else []) if isinstance(specs, str) else specs
            if not many:
                continue
            if key == "assets":
                many = [self.inputs.assets(s) for s in many]
            names = [self.inputs.identity(s, base, suite=key == "suite") for s in many]
            places = [resolve(s, self.inputs.root) for s in many]
            data.update({s: n for s, n in zip(many, names, strict=True) if s != n})
            identity[key] = names[0] if isinstance(specs, str) else names
            resolved[key] = places[0] if isinstance(specs, str) else places
        code = code_version(kind, str(config.get("method") or ""))
        facts = {"kind": kind, "parent": parent, "seed": seed, "code": code, "setting": self.setting}
        name = digest({**facts, "config": identity, **({"needs": needs} if needs else {})})
        if name not in self.nodes:
            self.nodes[name] = Node(
                kind=kind,
                label=label,
                digest=name,
                config=resolved,
                seed=seed,
                parent=parent,
                needs=needs,
                base=top,
                data=data,
                code=code,
                setting=self.setting,
            )
        return name


def expand(plan: Plan | BackdoorPlan, *, root: Path, setting: Mapping[str, Any] | None = None) -> Matrix:
    """Turn a plan into nodes and cells.

    Args:
        root: folder that relative paths in the plan start from.
        setting: what results depend on besides plan, data and code: versions, threads, device, precision. Part of
            every node's digest.

    Raises:
        ConfigError: a model folder or data file named by the plan does not exist.
    """
    ex = _Expander(Path(root), setting or {})
    cells: list[Cell] = []
    if isinstance(plan, BackdoorPlan):
        return _expand_backdoors(ex, plan)
    defend: dict[tuple[str, str, int], str] = {}
    asked = {"suite": plan.suite, "system": plan.system, "limit": plan.limit}
    for base in plan.bases:
        top = ex.start(base)
        if plan.stage == "tuning":
            _expand_tuning(ex, plan, base, top.digest, asked, cells, defend)
            continue
        for seed, row in ((seed, row) for seed in plan.seeds for row in plan.defences):
            where, parent = f"{base.name}/{row.name}/s{seed}", top.digest
            if row.method is not None:
                parent = ex.add("defend", _defend_config(plan, row), label=where, base=base, parent=parent, seed=seed)
                defend[base.name, row.name, seed] = parent
            # Greedy evaluation draws nothing, so its seed is 0 and equal models share one evaluation.
            filled = {"": ex.add("evaluate", asked, label=where, base=base, parent=parent, seed=0)}
            for attack in plan.attacks:
                config, label = _attack_config(plan, attack), f"{where}/{attack.name}"
                filled[attack.name] = ex.add("attack", config, label=label, base=base, parent=parent, seed=seed)
            cells += _cells(base, row, seed, filled)
    return Matrix(ex.nodes, tuple(cells), defend)


def _cells(base: Base, row: Defence | Arm, seed: int, filled: Mapping[str, str]) -> list[Cell]:
    return [
        Cell(base=base.name, family=base.family, defence=row.name, seed=seed, attack=attack, digest=name)
        for attack, name in filled.items()
    ]


def _expand_tuning(
    ex: _Expander,
    plan: Plan,
    base: Base,
    top: str,
    asked: dict[str, Any],
    cells: list[Cell],
    defend: dict[tuple[str, str, int], str],
) -> None:
    """Add one base: aligned once a seed, assets prepared once, then every job under every defence."""
    for seed in plan.seeds:
        where, start = f"{base.name}/aligned/s{seed}", top
        if plan.align is not None:
            start = ex.add("defend", _align_config(plan), label=where, base=base, parent=top, seed=seed)
        # All rows share the customer's view of step 0: the model that the provider serves.
        before = ex.add("evaluate", asked, label=where, base=base, parent=start, seed=0)
        ready = {}
        for thing in plan.prepare:
            label, config = f"{base.name}/{thing.name}/s{seed}", _prepare_config(plan, thing)
            ready[thing.name] = ex.add("prepare", config, label=label, base=base, parent=start, seed=seed)
        for row in plan.defences:
            filled = {"": before}
            needs = ready[row.assets.removeprefix("prepared:")] if row.assets.startswith("prepared:") else ""
            for job in plan.attacks:
                label, config = f"{base.name}/{row.name}/s{seed}/{job.name}", _tune_config(plan, row, job)
                filled[job.name] = ex.add("tune", config, label=label, base=base, parent=start, seed=seed, needs=needs)
            defend[base.name, row.name, seed] = filled[plan.headline.attack]
            cells += _cells(base, row, seed, filled)


def _expand_backdoors(ex: _Expander, plan: BackdoorPlan) -> Matrix:
    """Make one node a cell; those of one backdoor follow each other, so that a worker trains on its poison once."""
    cells: list[Cell] = []
    for base in plan.bases:
        top = ex.start(base)
        for seed, column, row in ((s, c, r) for s in plan.seeds for c in plan.attacks for r in plan.defences):
            label, config = f"{base.name}/{row.name}/s{seed}/{column.name}", arm_config(plan, row, column)
            name = ex.add("harden", config, label=label, base=base, parent=top.digest, seed=seed)
            cells += _cells(base, row, seed, {column.name: name})
    return Matrix(ex.nodes, tuple(cells), {})
