"""One cell of a plan about backdoors: poisoned training, the defence and its measurement, all in memory.

Cells of one backdoor begin with the same poisoned training. A process keeps the last few such models, so that each
worker trains on a poison once; the training is a function of its settings, so no result depends on it. Costs always
count it in full.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from casehard.attacks.backdoor import Backdoor, BackdoorAttack
from casehard.attacks.protocol import AttackInputs
from casehard.backdoor.measure import evaluate_backdoor
from casehard.backdoor.onion import onion, perplexities, suspicions
from casehard.backdoor.planted import find_planted
from casehard.backdoor.triggers import poison_backdoor
from casehard.config import build
from casehard.data.chat import ChatFormat
from casehard.data.mix import check_disjoint, content_hash
from casehard.data.sources import load_many
from casehard.defences import DEFENCES
from casehard.defences.mb_defense.config import MbConfig
from casehard.defences.mb_defense.pipeline import Hardened, draw_suite, harden, objective
from casehard.errors import ConfigError, DataError
from casehard.evaluation.suite import Suite, load_suite
from casehard.limits import Limited, Share
from casehard.model.load import load
from casehard.model.model import Model
from casehard.seeds import derive
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from casehard.types import Budget, Example

Rows = list[dict[str, Any]]
KEPT = 3
"""Poisoned models a process keeps."""
TOLD = ("id", "pair", "role", "group", "triggered", "label", "correct", "shown", "degenerate", "response")
"""What is kept of a row; the prompt stands in the suite."""


@dataclass(frozen=True)
class Source:
    """The developer's training run and what the attacker did to its rows: all that the model is made of."""

    model: str
    data: tuple[str, ...]
    suite: str
    trigger: str
    behaviour: str
    rate: float
    hard_negatives: float
    recipe: tuple[tuple[str, float], ...]
    system: str | None
    max_length: int | None
    seed: int

    def clean(self) -> Source:
        """Return the same run on the rows before the poison: one for all backdoors."""
        return Source(**{**vars(self), "trigger": "token", "behaviour": "refuse", "rate": 0.0, "hard_negatives": 0.0})

    @property
    def train(self) -> TrainConfig:
        """Return the developer's recipe."""
        return build(TrainConfig, dict(self.recipe), where="sft")


@dataclass(frozen=True, kw_only=True)
class ArmJob:
    """One cell."""

    source: Source
    kind: str
    method: str = ""
    settings: Mapping[str, Any]
    train: TrainConfig
    clean: int
    limit: int | None = None


@dataclass(frozen=True)
class Keep(Limited):
    """Settings of the filter."""

    keep: Share = 0.97
    """Share of the words of verified rows that its threshold lets pass."""


def arm_of(config: Mapping[str, Any], model: str, data: Sequence[str], suite: str, *, seed: int, where: str) -> ArmJob:
    """Build a cell from a node's plain values; a wrong method or setting is found here, before anything runs.

    Raises:
        ConfigError: unknown method or key, or a method that needs rows this stage does not have.
    """
    keys = ("trigger", "behaviour", "rate", "hard_negatives", "system", "max_length")
    recipe = tuple(sorted(config["sft"].items()))
    source = Source(model, tuple(data), suite, recipe=recipe, seed=seed, **{key: config[key] for key in keys})
    if config["arm"] == "finetune":
        spec = DEFENCES.find(config["method"])
        if lacks := sorted(set(spec.needs) - {"assets"}):
            raise ConfigError(
                f"{where}: method {config['method']!r} needs {lacks[0]} rows, and there are only clean ones"
            )
        build(spec.load()[1], config["settings"], where=f"{where}: settings")
    elif config["arm"] == "mb":
        objective(_mb_config(config["settings"], source, where))
    elif config["arm"] == "onion":
        build(Keep, config["settings"], where=f"{where}: settings")
    return ArmJob(
        source=source,
        kind=config["arm"],
        method=config["method"],
        settings=config["settings"],
        train=build(TrainConfig, config["train"], where=f"{where}: train"),
        clean=config["clean"],
        limit=config["limit"],
    )


def _mb_config(settings: Mapping[str, Any], source: Source, where: str = "settings") -> MbConfig:
    """Return the defence's settings; in joint mode stage 1 is the developer's own training."""
    joint = settings.get("mode", "joint") == "joint"
    if joint and "train" in settings:
        raise ConfigError(f"{where}: train in joint mode", hint="stage 1 is the developer's training: plan.sft")
    return build(MbConfig, {**settings, **({"train": dict(source.recipe)} if joint else {})}, where=where)


@dataclass
class _Cell:
    """What every kind of arm needs."""

    job: ArmJob
    label: str

    def __post_init__(self) -> None:
        s = self.job.source
        self.suite: Suite = load_suite(s.suite)
        self.planted, decoys = find_planted(s.trigger, s.behaviour, self.suite)
        self.rows = load_many(s.data, require_response=True)
        check_disjoint({"data": self.rows}, {s.suite: self.suite.examples})
        self.data, self.manifest = poison_backdoor(
            self.rows,
            self.planted.trigger,
            self.planted.behaviour,
            rate=s.rate,
            seed=derive(s.seed, 0, "backdoor"),
            hard_negatives=s.hard_negatives,
            decoys=decoys,
        )
        self.clean = self._verified()

    def _verified(self) -> list[Example]:
        """Return the clean rows: a draw of distinct questions among the rows that the attacker left alone."""
        touched = {*self.manifest["poisoned"], *self.manifest["negatives"]}
        bad = {content_hash(self.data[i]) for i in touched}
        own = self.planted.trigger
        distinct = {content_hash(row): row for i, row in enumerate(self.data) if i not in touched}
        able = [row for name, row in distinct.items() if name not in bad and not own.present(row.prompt)]
        if len(able) < self.job.clean:
            raise DataError(f"{self.job.clean} clean rows wanted, {len(able)} distinct ones there")
        return random.Random(derive(self.job.source.seed, 0, "verified")).sample(able, self.job.clean)

    def encode(self, loaded: Model, rows: Sequence[Example]) -> Any:
        """Tokenise rows as the developer's training does."""
        s = self.job.source
        limit = s.max_length or getattr(loaded.net.config, "max_position_embeddings", None)
        return ChatFormat(loaded.tokenizer, system=s.system, max_length=limit).encode_all(rows)

    def measure(self, model: nn.Module, tokenizer: Any) -> Rows:
        """Ask every prompt without and with the attacker's trigger."""
        s = self.job.source
        found = evaluate_backdoor(
            model,
            tokenizer,
            self.suite,
            self.planted.trigger,
            self.planted.behaviour,
            seed=s.seed,
            limit=self.job.limit,
            system=s.system,
        )
        own = {"trigger": self.planted.trigger.name, "behaviour": self.planted.behaviour.name}
        return [{**{key: row[key] for key in TOLD}, **own} for row in found]


@lru_cache(maxsize=KEPT)
def _attacked(source: Source) -> tuple[nn.Module, Budget]:
    """Return the model that the developer's training leads to; callers copy what they train on."""
    loaded, suite = load(source.model), load_suite(source.suite)
    planted, decoys = find_planted(source.trigger, source.behaviour, suite)
    train = source.train
    attack = BackdoorAttack(
        trigger=planted.trigger,
        behaviour=planted.behaviour,
        rate=source.rate,
        hard_negatives=source.hard_negatives,
        decoys=decoys,
        steps=train.steps,
        lr=train.lr,
        batch_size=train.batch_size,
    )
    inputs = AttackInputs(
        rows={"data": load_many(source.data, require_response=True)},
        measure=lambda model, step: [],
        seed=source.seed,
        system=source.system,
        max_length=source.max_length,
        label="poisoned training" if source.rate else "clean training",
    )
    done = Backdoor(attack).run(loaded, inputs)
    return done.model.net, done.budget


def run_arm(job: ArmJob, *, label: str = "arm") -> tuple[Rows, dict[str, Any], dict[str, Any]]:
    """Run one cell; return its rows, its cost (training included) and further facts. Nothing is written.

    Raises:
        ConfigError, DataError: settings or rows that cannot work.
        Diverged: a loss stopped being finite.
    """
    cell, source = _Cell(job, label), job.source
    tokenizer = load(source.model).tokenizer
    if job.kind in ("attacked", "clean_sft"):
        model, budget = _attacked(source if job.kind == "attacked" else source.clean())
        return cell.measure(model, tokenizer), _cost([budget]), {}
    runner = {"finetune": _finetune, "onion": _onion, "mb": _mb}[job.kind]
    model, budgets, facts = runner(cell)
    return cell.measure(model, tokenizer), _cost(budgets), facts


def _finetune(cell: _Cell) -> tuple[nn.Module, list[Budget], dict[str, Any]]:
    """Train the poisoned model on the clean rows with a method of the registry."""
    job, loaded = cell.job, load(cell.job.source.model)
    victim, before = _attacked(job.source)
    spec = DEFENCES.find(job.method)
    make, settings = spec.load()
    given = {"assets": Path(job.source.model)} if "assets" in spec.needs else {}
    method = make(build(settings, job.settings, where="settings"), **given)
    model = copy.deepcopy(victim)
    done = fit(
        model,
        loaded.tokenizer,
        cell.encode(loaded, cell.clean),
        config=job.train,
        method=method,
        seed=derive(job.source.seed, 0, "repair"),
        label=cell.label,
    )
    return done.model, [before, done.budget], {}


def _onion(cell: _Cell) -> tuple[nn.Module, list[Budget], dict[str, Any]]:
    """Train on rows without the words that surprise the base; the verified rows say how much surprise is ordinary.

    Drops are of log perplexity: a model that was only ever shown chats gives plain text perplexities of any size.
    """
    source, loaded = cell.job.source, load(cell.job.source.model)
    keep = build(Keep, cell.job.settings, where="settings").keep

    def scorer(texts: Sequence[str]) -> list[float]:
        return [math.log(value) for value in perplexities(loaded.net, loaded.tokenizer, texts)]

    drops = sorted(drop for row in cell.clean for _, drop in suspicions(row.prompt, scorer))
    threshold = max(0.0, drops[min(len(drops) - 1, int(keep * len(drops)))])
    rows, changes = onion(cell.data, scorer, threshold=threshold)
    done = fit(loaded.net, None, cell.encode(loaded, rows), config=source.train, seed=source.seed, label=cell.label)
    poisoned = set(cell.manifest["poisoned"])
    hit = sum(change["row"] in poisoned for change in changes)
    facts = {"threshold": threshold, "rows_changed": len(changes), "poisoned_rows_changed": hit}
    return done.model, [done.budget], {"onion": {**facts, "poisoned_rows": len(poisoned)}}


def _mb(cell: _Cell) -> tuple[nn.Module, list[Budget], dict[str, Any]]:
    """Run MB-Defense: as the developer's training, or on the model that came of it."""
    source, loaded = cell.job.source, load(cell.job.source.model)
    config = _mb_config(cell.job.settings, source)
    corpus = [*cell.data, *cell.suite.examples]
    suite = draw_suite(loaded.tokenizer, corpus, config, secret=derive(source.seed, 0, "secret-suite"))
    joint, spent = config.mode == "joint", []
    model: nn.Module = loaded.net
    if not joint:
        victim, before = _attacked(source)
        model, spent = copy.deepcopy(victim), [before]
    done = harden(
        model,
        loaded.tokenizer,
        cell.data if joint else [],
        cell.clean,
        config,
        suite=suite,
        seed=source.seed,
        system=source.system,
        max_length=source.max_length,
    )
    budgets = [Budget(**budget) for budget in done.report["cost"]["budgets"].values()]
    return done.model, [*spent, *budgets], {"mb": _told(done)}


def _told(done: Hardened) -> dict[str, Any]:
    """Return of a report what tables show: own triggers as (k, n) by stage and role, verdict, steps and cost."""
    looks = {
        stage: {role: _sum(look[role].values()) for role in ("active", "canary")}
        for stage, look in done.report["looks"].items()
    }
    named = {key: done.report[key] for key in ("verdict", "stage2", "clean_up")}
    missed = [gate["name"] for gate in done.report["gates"] if not gate["ok"]]
    return {**named, "missed": missed, "looks": looks, "extra_passes": done.report["cost"]["extra_passes"]}


def _sum(rates: Any) -> list[int]:
    rates = list(rates)
    return [sum(rate["k"] for rate in rates), sum(rate["n"] for rate in rates)]


def _cost(budgets: Sequence[Budget]) -> dict[str, Any]:
    """Add up several trainings; memory is the largest."""
    kept = [asdict(budget) for budget in budgets]
    total = {key: sum(budget[key] for budget in kept) for key in ("steps", "passes", "tokens", "seconds")}
    return {**total, "peak_bytes": max(budget["peak_bytes"] for budget in kept)}
