"""MB-Defense as one defence of the catalogue: both stages in memory, on rows from anywhere or on a finished model.

With rows of role ``data`` stage 1 is the training that was asked for (joint mode); without them the model is trained
already and is repaired (posthoc). ``casehard defend mb-defense`` runs the same stages from files, with the secret kept.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from casehard.defences.mb_defense.config import MbConfig
from casehard.defences.mb_defense.pipeline import Hardened, draw_suite, harden, objective
from casehard.errors import ConfigError
from casehard.model.model import Model
from casehard.seeds import derive
from casehard.train.protocol import PipelineInputs, Trained
from casehard.train.recipe import TrainConfig
from casehard.types import Budget


class MbDefense:
    """Plant backdoors of the defender's own, break them, and with them those that nobody knows of."""

    name = "mb_defense"

    def __init__(self, config: MbConfig | None = None) -> None:
        self.config = config or MbConfig()
        objective(self.config)
        if self.config.mode == "adapter":
            raise ConfigError("adapter mode takes an untrusted LoRA", hint="casehard defend mb-defense --adapter DIR")

    def check(self, *, trains: bool) -> None:
        """Refuse settings of the other mode."""
        self._mode(joint=trains, train=TrainConfig())

    def train(self, model: Model, inputs: PipelineInputs) -> Trained:
        """Train or repair a copy of ``model``; ``clean`` are the verified rows, ``data`` those from anywhere."""
        data, clean = list(inputs.rows.get("data", ())), list(inputs.rows.get("clean", ()))
        config = self._mode(joint=bool(data), train=inputs.train)
        known = [*data, *inputs.known] or clean
        suite = draw_suite(model.tokenizer, known, config, secret=derive(inputs.seed, 0, "secret-suite"))
        done = harden(
            copy.deepcopy(model.net),
            model.tokenizer,
            data,
            clean,
            config,
            suite=suite,
            seed=inputs.seed,
            system=inputs.system,
            max_length=inputs.max_length,
        )
        budgets = [Budget(**budget) for budget in done.report["cost"]["budgets"].values()]
        leaves = done.verdict.word != "FAIL"
        return Trained(net=done.model, budgets=budgets, facts={"mb": told(done)}, may_leave=leaves)

    def _mode(self, *, joint: bool, train: TrainConfig) -> MbConfig:
        """Return the settings with the mode that the rows ask for; in joint mode stage 1 is the training itself."""
        if not joint:
            return replace(self.config, mode="posthoc")
        if self.config.train != TrainConfig():
            raise ConfigError(
                "settings.train of mb_defense on rows from anywhere",
                hint="stage 1 is the training itself: set its recipe (train)",
            )
        return replace(self.config, mode="joint", train=train)


def told(done: Hardened) -> dict[str, Any]:
    """Return of a report what tables show: own triggers as (k, n) by stage and role, verdict, steps and cost."""
    looks = {
        stage: {role: _sum(look[role].values()) for role in ("active", "canary")}
        for stage, look in done.report["looks"].items()
    }
    named = {key: done.report[key] for key in ("verdict", "stage2", "clean_up")}
    missed = [gate["name"] for gate in done.report["gates"] if not gate["ok"]]
    own = {"planted": done.report["config"]["stage1"], "missed": missed, "looks": looks}
    return {**named, **own, "extra_passes": done.report["cost"]["extra_passes"]}


def _sum(rates: Any) -> list[int]:
    rates = list(rates)
    return [sum(rate["k"] for rate in rates), sum(rate["n"] for rate in rates)]
