"""Harmful fine-tuning: ordinary supervised training of released weights on data a share p of which is harmful.

The attack of the field's threat model (Qi et al. 2310.03693; Patcher 2606.07970, section on test-time attacks): the
attacker holds the weights, mixes harmful pairs into benign task data and runs standard full-parameter or LoRA training.
Everything happens on a copy in memory; the model is measured along the way, so the result is a curve, not one number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from casehard.attacks.protocol import AttackInputs
from casehard.attacks.training import Mixing, Phase, Supervised
from casehard.data.mix import Counts, counts, poison
from casehard.errors import ConfigError
from casehard.limits import Count, Natural, Share
from casehard.model.model import Model
from casehard.seeds import derive
from casehard.types import Example


@dataclass(frozen=True, kw_only=True)
class MixtureSettings(Supervised):
    """Settings of an attacker whose rows are a mixture, of which a share is harmful."""

    share: Share = 0.1
    """p, the harmful share of the attacker's rows, 0..1; 0 is benign fine-tuning, 1 a fully harmful set."""
    rows: Count = 400
    """Rows of the attacker's data set, harmful and benign together."""

    @property
    def drawn(self) -> Counts:
        """How many rows of each kind the mixture holds."""
        return counts(share=self.share, n=self.rows)

    def mixed(self, rows: Mapping[str, Sequence[Example]], *, seed: int) -> list[Example]:
        """Return the shuffled mixture of the roles ``harmful`` and ``benign``: one seed, one mixture for all attacks.

        Raises:
            DataError: too few rows for the share asked for.
        """
        harmful, benign = rows.get("harmful", ()), rows.get("benign", ())
        return poison(harmful, benign, share=self.share, n=self.rows, seed=derive(seed, 0, "attack-mix"))

    def facts(self) -> dict[str, Any]:
        """Return how many rows of each kind were drawn, as JSON values."""
        return {"harmful_rows": self.drawn.harmful, "benign_rows": self.drawn.benign}


@dataclass(frozen=True, kw_only=True)
class FinetuneAttack(MixtureSettings):
    """Settings of one harmful fine-tuning attack."""

    restarts: Natural = 0
    """Times that warm-up and schedule begin anew, with a new optimiser, at equal distances within ``steps``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restarts >= self.steps:
            raise ConfigError(f"restarts is {self.restarts} within {self.steps} steps", hint="fewer restarts")


class Finetune(Mixing[FinetuneAttack]):
    """Fine-tune a copy on a mixture of harmful and benign rows.

    With a method inside this is a customer's job at a provider who defends: same data and recipe, the method's seams in
    the loop.
    """

    name = "finetune"

    def __init__(self, config: FinetuneAttack | None = None) -> None:
        super().__init__(config or FinetuneAttack())

    def mixture(self, model: Model, inputs: AttackInputs) -> Sequence[Example]:
        """Return ``share`` of ``rows`` harmful rows among benign ones.

        Raises:
            DataError: too few rows for the share asked for.
        """
        return self.config.mixed(inputs.rows, seed=inputs.seed)

    def phases(self, model: Model, inputs: AttackInputs) -> Sequence[Phase]:
        """Return the mixture once, or once for the start and each restart; their lengths differ by a step at most."""
        rows, steps, parts = self.mixture(model, inputs), self.config.steps, self.config.restarts + 1
        lengths = [steps * (i + 1) // parts - steps * i // parts for i in range(parts)]
        return [Phase(rows, replace(self.config.recipe, steps=length)) for length in lengths]

    def facts(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Return how many rows of each kind were drawn."""
        return self.config.facts()
