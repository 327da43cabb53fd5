"""Harmful fine-tuning: ordinary supervised training of released weights on data a share p of which is harmful.

The attack of the field's threat model (Qi et al. 2310.03693; Patcher 2606.07970, section on test-time attacks): the
attacker holds the weights, mixes harmful pairs into benign task data and runs standard full-parameter or LoRA training.
Everything happens on a copy in memory; the model is measured along the way, so the result is a curve, not one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from casehard.attacks.protocol import Attacked, AttackInputs
from casehard.attacks.training import TrainingSettings, train_copy
from casehard.config import to_dict
from casehard.data.mix import counts, is_marked, marks, poison
from casehard.limits import BatchSize, Count, Factor, Large, LearningRate, Limited, Natural, Rank, Share
from casehard.model.model import Made, Model
from casehard.seeds import derive
from casehard.train.recipe import TrainConfig
from casehard.train.tune import chat_format
from casehard.types import Example


@dataclass(frozen=True, kw_only=True)
class FinetuneAttack(TrainingSettings, Limited):
    """Settings of one harmful fine-tuning attack."""

    mode: Literal["full", "lora"] = "full"
    """Train all parameters, or a LoRA adapter on every linear layer."""
    share: Share = 0.1
    """p, the harmful share of the attacker's rows, 0..1; 0 is benign fine-tuning, 1 a fully harmful set."""
    rows: Count = 400
    """Rows of the attacker's data set, harmful and benign together."""
    steps: Count = 100
    """Optimiser steps."""
    lr: LearningRate = 1e-4
    """Learning rate, the highest of the schedule (the paper attacks real models with 1e-5)."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up."""
    warmup: Natural = 0
    """Steps over which it rises from 0."""
    weight_decay: Large = 0.01
    """Decoupled weight decay of adamw."""
    batch_size: BatchSize = 16
    """Rows per step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The attacker's optimiser; sgd has no momentum."""
    rank: Rank = 8
    """LoRA rank (mode lora)."""
    alpha: Factor = 16.0
    """LoRA alpha (mode lora); the adapter is scaled by alpha / rank."""
    evaluate_at: tuple[Natural, ...] = (0, 5, 10, 25, 50, 100)
    """Steps at which the model is measured; those beyond ``steps`` are left out, ``steps`` itself is always in."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype; the master weights are fp32 throughout."""

    @property
    def recipe(self) -> TrainConfig:
        """The training loop of the attack."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            schedule=self.schedule,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
            precision=self.precision,
        )


def attack_data(
    harmful: Sequence[Example], benign: Sequence[Example], config: FinetuneAttack, *, seed: int
) -> list[Example]:
    """Return the attacker's shuffled mixture: ``share`` of ``rows`` harmful, the rest benign."""
    return poison(harmful, benign, share=config.share, n=config.rows, seed=derive(seed, 0, "attack-mix"))


class Finetune:
    """Fine-tune a copy on a mixture of harmful and benign rows.

    With a method inside this is a customer's job at a provider who defends: same data and recipe, the method's seams in
    the loop.
    """

    name = "finetune"

    def __init__(self, config: FinetuneAttack | None = None) -> None:
        self.config = config or FinetuneAttack()

    @property
    def checkpoints(self) -> Sequence[int]:
        """Return the steps at which the attacked model is measured."""
        return self.config.checkpoints

    def mixture(self, inputs: AttackInputs) -> list[Example]:
        """Return the rows that are trained on."""
        harmful, benign = (inputs.rows.get(role, ()) for role in ("harmful", "benign"))
        return attack_data(harmful, benign, self.config, seed=inputs.seed)

    def run(self, model: Model, inputs: AttackInputs) -> Attacked:
        """Fine-tune a copy of ``model``, measuring it at ``config.checkpoints``.

        Raises:
            DataError: too few rows for the share asked for.
            Diverged: the loss stopped being finite.
        """
        config, mixture = self.config, self.mixture(inputs)
        chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
        done = train_copy(model, chat.encode_all(mixture), config, inputs, purpose="attack")
        drawn = counts(share=config.share, n=config.rows)
        known = sum(is_marked(row, model.trained_prompts) for some in inputs.rows.values() for row in some)
        facts = {"harmful_rows": drawn.harmful, "benign_rows": drawn.benign, "rows_seen_in_training": known}
        provenance = {"settings": to_dict(config), "seed": inputs.seed, **facts}
        made = Made(method=f"{self.name}-attack", provenance=provenance)
        attacked = model.after(done.net, made, trained=frozenset(marks(mixture)), may_leave=False)
        return Attacked(model=attacked, rows=done.rows, budget=done.budget, facts=facts, log=done.log)
