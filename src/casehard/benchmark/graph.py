"""A plan as a graph of nodes, each named by the digest of (parent, config, data, code version). No torch here.

base -> defend, one node a training that is kept -> evaluate | attack. From the attack on a chain is one node: attacked
weights stay in memory, and what a chain does after the attack belongs to it. A row without a defence has no defend
node: its children hang on the base. A node may also need what a prepare node made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from casehard.attacks import ATTACKS
from casehard.benchmark.closure import code_of
from casehard.benchmark.entries import DEFENCE, Attack, Base, Chain, Defence, Prepare, Training
from casehard.benchmark.inputs import Inputs, resolve
from casehard.benchmark.plan import Plan, load_plan, parse_plan
from casehard.config import digest
from casehard.defences import DEFENCES
from casehard.errors import ConfigError
from casehard.evaluation.judges import JUDGES
from casehard.io.manifest import file_digest
from casehard.types import Budget

__all__ = ["Cell", "Matrix", "Node", "code_version", "expand", "load_plan", "parse_plan"]

PREPARED = "prepared:"
Kind = Literal["base", "defend", "prepare", "evaluate", "attack"]

STEPS: dict[Kind, tuple[str, ...]] = {
    "base": ("casehard.organism.build",),
    "defend": ("casehard.steps.finetune",),
    "evaluate": ("casehard.steps.evaluate",),
    "attack": ("casehard.steps.attack", "casehard.steps.chain"),
    "prepare": ("casehard.defences.buffer_reinforce.prepare",),
}
"""Modules that do the work of a node; what they import is followed, see ``casehard.benchmark.closure``."""


def code_version(kind: Kind, named: tuple[str, ...] = ()) -> str:
    """Return what names the code that a node runs: its step, what it names and every judge, with all they import.

    Args:
        named: modules of the methods and the attack.
    """
    named = (*named, *(judge.module for judge in JUDGES.values()))
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
    """(base, defence, seed) -> digest of the node whose cost is the defence's: inside an attack, the headline's."""

    def cost(self, name: str, done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
        """Return what a cell's whole chain spent: its trainings and, where it has one, the attack. None: not all done.

        Args:
            name: digest of the cell's node.
            done: node digest -> node summary.
        """
        total = Budget()
        while self.nodes[name].kind != "base":
            if name not in done:
                return None
            if self.nodes[name].kind in ("defend", "attack"):
                spent = {f.name: done[name]["cost"].get(f.name) or 0 for f in dataclasses.fields(Budget)}
                total += Budget(**spent)
            name = self.nodes[name].parent
        return dataclasses.asdict(total)


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


def _training_config(plan: Plan, row: Training | Defence) -> dict[str, Any]:
    """Return a training as plain values: a step of the chain, or the row's defence."""
    select = getattr(row, "select", None)
    assets = getattr(row, "assets", "")
    return {
        "method": row.method,
        "preset": row.preset,
        "settings": dict(row.settings),
        "train": DEFENCES.find(row.method).training(dict(row.train)) if row.method else dict(row.train),
        **({} if row.lora is None else {"lora": dict(row.lora)}),
        "rows": {role: list(specs) for role, specs in row.rows.items()},
        "select": None if select is None else dict(select),
        "assets": "" if assets.startswith(PREPARED) else assets,
        **_asked(plan),
    }


def _asked(plan: Plan) -> dict[str, Any]:
    return {"suite": plan.suite, "system": plan.system, "max_length": plan.max_length}


def _attack_config(plan: Plan, row: Defence, chain: Chain, attack: Attack) -> dict[str, Any]:
    suite = attack.suite or plan.suite
    # Another suite has not been asked at step 0 yet.
    first = [0] if suite != plan.suite and not attack.plants else []
    inside = chain.inside or bool(chain.after)
    trainings = [row if name == DEFENCE else plan.step(name) for name in chain.after]
    return {
        "attack": attack.attack,
        "config": attack.config | ({"evaluate_at": [*first, *attack.evaluate_at]} if attack.trains else {}),
        "full_at": [*first, *attack.full_at] if attack.trains else [],
        **({} if attack.trains else {"step": attack.steps}),
        "rows": {role: list(specs) for role, specs in attack.rows.items()},
        "inside": _training_config(plan, row) if chain.inside else None,
        "then": [_training_config(plan, training) for training in trainings if training.method is not None],
        "verified": plan.verified if attack.plants and inside else 0,
        **({} if plan.in_format is None else {"in_format": plan.in_format}),
        **_asked(plan),
        "suite": suite,
        "limit": plan.limit,
    }


def _prepare_config(plan: Plan, row: Prepare) -> dict[str, Any]:
    rows = {role: list(specs) for role, specs in row.rows.items()}
    return {"kind": row.kind, "rows": rows, "settings": dict(row.settings), **_asked(plan)}


def _methods(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules of all methods and attacks that a node's settings name."""
    trainings = [config, config.get("inside") or {}, *config.get("then", ())]
    named = dict.fromkeys(str(t["method"]) for t in trainings if t.get("method"))
    attack = (ATTACKS.find(config["attack"]).module,) if config.get("attack") else ()
    return (*attack, *(DEFENCES.find(name).module for name in named))


def map_specs(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """Return plain values with ``change(key, spec)`` in place of every data spec in them.

    Specs are what stands under ``rows``, by role, under ``suite`` and under ``assets``, at any depth but in settings.
    """
    if key in OPAQUE:
        return value
    if key in ("suite", "assets"):
        return change(key, value) if value else value
    if key == "rows" and isinstance(value, Mapping):
        return {role: [change("rows", spec) for spec in specs] for role, specs in value.items()}
    if isinstance(value, Mapping):
        return {k: map_specs(v, change, k) for k, v in value.items()}
    if isinstance(value, list):
        return [map_specs(v, change) for v in value]
    return value


OPAQUE = ("settings", "config", "train", "select", "lora")
"""Keys of settings, in which ``rows`` and the like mean something else."""


class _Expander:
    """Collects nodes; the same work asked for twice becomes one node."""

    def __init__(self, root: Path, setting: Mapping[str, Any]) -> None:
        self.inputs = Inputs(root)
        self.setting = dict(setting)
        self.nodes: dict[str, Node] = {}

    def start(self, base: Base) -> Node:
        """Add a base and return its node.

        Raises:
            ConfigError: it is another base under a second name, whose runs would be counted as further evidence.
        """
        node = _base_node(base, self.inputs, self.setting)
        if node.digest in self.nodes:
            other = self.nodes[node.digest].label
            raise ConfigError(
                f"plan.bases: {base.name!r} is the same model as {other!r}: its runs would count twice",
                hint="give each base its own world_seed or model; more seeds make more runs of one base",
            )
        self.nodes[node.digest] = node
        return node

    def add(
        self, kind: Kind, config: dict[str, Any], *, label: str, base: Base, parent: str, seed: int, needs: str = ""
    ) -> str:
        top = self.nodes[parent].base
        data: dict[str, str] = {}

        def found(key: str, spec: str) -> str:
            return self.inputs.assets(spec) if key == "assets" else spec

        def named(key: str, spec: str) -> str:
            spec = found(key, spec)
            name = self.inputs.identity(spec, base, suite=key == "suite")
            if name != spec:
                data[spec] = name
            return name

        identity = map_specs(config, named)
        resolved = map_specs(config, lambda key, spec: resolve(found(key, spec), self.inputs.root))
        code = code_version(kind, _methods(config))
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


def expand(plan: Plan, *, root: Path, setting: Mapping[str, Any] | None = None) -> Matrix:
    """Turn a plan into nodes and cells.

    Args:
        root: folder that relative paths in the plan start from.
        setting: what results depend on besides plan, data and code: versions, threads, device, precision. Part of
            every node's digest.

    Raises:
        ConfigError: a model folder or data file named by the plan does not exist, or two bases are one model.
    """
    ex = _Expander(Path(root), setting or {})
    cells: list[Cell] = []
    defend: dict[tuple[str, str, int], str] = {}
    tops = {base.name: ex.start(base).digest for base in plan.bases}
    for base in plan.bases:
        top = tops[base.name]
        for seed in plan.seeds:
            made = [_Row(ex, plan, base, seed, row, top) for row in plan.defences]
            defend |= {(base.name, m.row.name, seed): m.cost for m in made if m.cost}
            # Cells of one column follow each other, so that a worker makes what they have in common once.
            filled: list[dict[str, str]] = [{} if plan.plants else {"": m.evaluated()} for m in made]
            for attack in plan.attacks:
                for m, cell in zip(made, filled, strict=True):
                    cell[attack.name] = m.attacked(attack)
                    if m.chain.inside and not plan.plants and attack.name == plan.headline.attack:
                        defend[base.name, m.row.name, seed] = cell[attack.name]
            cells += [cell for m, names in zip(made, filled, strict=True) for cell in m.cells(names)]
    return Matrix(ex.nodes, tuple(cells), defend)


class _Row:
    """One row of the table on one base with one seed: its chain as nodes."""

    def __init__(self, ex: _Expander, plan: Plan, base: Base, seed: int, row: Defence, top: str) -> None:
        self.ex, self.plan, self.base, self.seed, self.row = ex, plan, base, seed, row
        self.chain = plan.chain_of(row)
        self.where = f"{base.name}/{row.name}/s{seed}"
        self.cost = ""
        """Digest of the node whose cost is the defence's; empty where that is another."""
        self.start = top
        for word in self.chain.before:
            self._train(word)
        self.needs = self._prepared()

    def _train(self, word: str) -> None:
        """Add one training before the attack; steps that rows share are one node."""
        training = self.row if word == DEFENCE else self.plan.step(word)
        if training.method is None:
            return
        label = self.where if word == DEFENCE else f"{self.base.name}/{word}/s{self.seed}"
        self.start = self.ex.add(
            "defend",
            _training_config(self.plan, training),
            label=label,
            base=self.base,
            parent=self.start,
            seed=self.seed,
        )
        self.cost = self.start if word == DEFENCE else self.cost

    def _prepared(self) -> str:
        """Return the digest of the prepared assets that the row needs, made on the model as it now is."""
        kind, _, name = self.row.assets.partition(":")
        if f"{kind}:" != PREPARED:
            return ""
        thing = next(p for p in self.plan.prepare if p.name == name)
        label = f"{self.base.name}/{name}/s{self.seed}"
        config = _prepare_config(self.plan, thing)
        return self.ex.add("prepare", config, label=label, base=self.base, parent=self.start, seed=self.seed)

    def evaluated(self) -> str:
        """Add the evaluation of the model before the attack."""
        asked: dict[str, Any] = {"suite": self.plan.suite, "system": self.plan.system, "limit": self.plan.limit}
        asked |= {"lm_eval": list(self.plan.lm_eval)} if self.plan.lm_eval else {}
        # Inside an attack all rows share the model before it: that of the last step, or the base as it is.
        shared = self.chain.before[-1] if self.chain.before else "base"
        label = f"{self.base.name}/{shared}/s{self.seed}" if self.chain.inside else self.where
        # Greedy evaluation draws nothing, so its seed is 0 and equal models share one evaluation.
        return self.ex.add("evaluate", asked, label=label, base=self.base, parent=self.start, seed=0)

    def attacked(self, attack: Attack) -> str:
        """Add the rest of the chain under one attack, from the attack to the measurement of its end."""
        label = f"{self.where}/{attack.name}"
        if self.chain.attacked:
            config = _attack_config(self.plan, self.row, self.chain, attack)
            kind: Kind = "attack"
        else:
            kind, asked = "evaluate", ("trigger", "behaviour")
            config = {"suite": attack.suite or self.plan.suite, "system": self.plan.system, "limit": self.plan.limit}
            config |= {key: attack.settings[key] for key in asked if key in attack.settings} | {"step": attack.steps}
            config = {"trigger": "token", **config}
        return self.ex.add(
            kind, config, label=label, base=self.base, parent=self.start, seed=self.seed, needs=self.needs
        )

    def cells(self, filled: Mapping[str, str]) -> list[Cell]:
        """Return the row's cells, each with the node that fills it."""
        return [
            Cell(
                base=self.base.name,
                family=self.base.family,
                defence=self.row.name,
                seed=self.seed,
                attack=attack,
                digest=name,
            )
            for attack, name in filled.items()
        ]
