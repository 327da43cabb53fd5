"""A burst, then settling: a few steps at a large learning rate, the rest at a small one.

A defence that simulates attacks knows the rates that it simulated (Patcher's ``attackers``). The burst leaves the
region in which it was hardened before the model has learnt much; the small rate then learns from there, and mends what
the burst broke. Mixture, optimiser and all else are those of ``finetune``; each of the two has an optimiser of its own.
An attacker who knows the defence, as docs/evaluation.md asks for; no paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from casehard.attacks.finetune import MixtureSettings
from casehard.attacks.protocol import AttackInputs
from casehard.attacks.training import Phase, Tuning
from casehard.errors import ConfigError
from casehard.limits import Count, LearningRate
from casehard.model.model import Model


@dataclass(frozen=True, kw_only=True)
class BurstAttack(MixtureSettings):
    """Settings of a burst; ``lr``, ``schedule`` and ``warmup`` are those of the steps after it."""

    burst: Count = 10
    """Steps of the burst, out of ``steps``."""
    burst_lr: LearningRate = 1e-3
    """Learning rate of the burst, constant and without warm-up; ten times ``lr`` by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.burst >= self.steps:
            raise ConfigError(
                f"burst is {self.burst} of {self.steps} steps",
                hint="some steps must be left to settle: --steps more, or --burst fewer",
            )


class Burst(Tuning[BurstAttack]):
    """Fine-tune a copy at a large learning rate, then at a small one."""

    name = "burst"

    def phases(self, model: Model, inputs: AttackInputs) -> Sequence[Phase]:
        """Return the mixture twice, at the two rates.

        Raises:
            DataError: too few rows for the share asked for.
        """
        config = self.config
        rows = config.mixed(inputs.rows, seed=inputs.seed)
        fast = replace(config.recipe, steps=config.burst, lr=config.burst_lr, schedule="constant", warmup=0)
        return [Phase(rows, fast), Phase(rows, replace(config.recipe, steps=config.steps - config.burst))]

    def facts(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Return how many rows of each kind were drawn."""
        return self.config.facts()
