"""Chain: an attack and what is done about it afterwards, all in memory, because attacked weights never reach the disk.

Chains of one plan often begin with the same attack. A process keeps the last few attacked models, so that each worker
trains on a poison once; the training is a function of its settings, rows and model, so no result depends on it. Costs
always count it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from casehard.attacks.protocol import Attack as AttackMethod
from casehard.attacks.protocol import Attacked
from casehard.config import digest, to_dict
from casehard.errors import ConfigError
from casehard.evaluation.suite import Suite, load_suite
from casehard.limits import Limited, Natural
from casehard.model.model import Model
from casehard.model.step import Outcome
from casehard.seeds import derive
from casehard.steps.attack import Attack, attack_with, in_format, measure_end, verified
from casehard.steps.defence import Examples
from casehard.steps.finetune import Finetune, repair
from casehard.types import Budget

KEPT = 3
"""Attacked models that a process keeps."""
_kept: OrderedDict[str, Attacked] = OrderedDict()


@dataclass(frozen=True, kw_only=True)
class Chain(Limited):
    """An attack, then trainings on verified rows; the last model is measured as the attack would measure its own."""

    attack: Attack
    then: tuple[Finetune, ...] = ()
    """Trainings after it. Those without rows of role ``data`` of their own get verified ones."""
    verified: Natural = 0
    """Rows that the attacker left alone and somebody verified."""

    @property
    def seed(self) -> int:
        """Return the seed of the attack."""
        return self.attack.seed

    def run(self, model: Model | None = None, *, out: Path | None = None, label: str = "chain") -> Outcome:
        """Attack, train, measure; nothing is written.

        Raises:
            ConfigError: trainings after an attack that changes no weights.
            DataError: fewer rows were left alone than are to be verified.
        """
        if self.then and not self.attack.spec.weights:
            raise ConfigError(
                f"attack {self.attack.attack!r} changes no weights", hint="nothing after it can repair them"
            )
        step, suite = self.attack, load_suite(self.attack.suite)
        method, rows, start = step.build(suite), step.examples(), step.start(model)
        attacked = _attacked(step, method, rows, suite, start, label)
        current, spent, facts = attacked.model, attacked.budget, dict(attacked.facts)
        clean = verified(getattr(attacked, "untouched", ()), self.verified, step.seed) if self.then else []
        for training in self.then:
            drawn = replace(training, seed=derive(step.seed, 0, "repair") if not training.spec.pipeline else step.seed)
            done = repair(drawn, current, clean, getattr(attacked, "data", ()), label)
            assert done.model is not None
            current, facts = done.model, {**facts, **done.facts}
            spent += Budget(**{key: value for key, value in done.cost.items() if key != "seed"})
        measured = measure_end(step, method, in_format(step, method, rows, suite, start), current)
        return Outcome(current, rows=measured, cost=asdict(spent), facts=facts)


def _attacked(step: Attack, method: AttackMethod, rows: Examples, suite: Suite, start: Model, label: str) -> Attacked:
    """Return what the attack makes; one without measurements on the way, since those of the end are the chain's."""
    read = {role: [to_dict(row) for row in some] for role, some in rows.items()}
    name = digest({"step": to_dict(step), "method": to_dict(method.config), "model": start.digest, "rows": read})
    if name not in _kept:
        _kept[name] = attack_with(step, method, rows, suite, start, label=label, silent=True)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(name)
    return _kept[name]
