"""Harmful fine-tuning: ordinary supervised training of released weights on data a share p of which is harmful.

The attack of the field's threat model (Qi et al. 2310.03693; Patcher 2606.07970, section on test-time attacks): the
attacker holds the weights, mixes harmful pairs into benign task data and runs standard full-parameter or LoRA training.
Everything happens on a copy in memory; the model is measured along the way, so the result is a curve, not one number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from casehard.data.chat import ChatFormat
from casehard.data.mix import counts, poison
from casehard.limits import BatchSize, Count, Factor, LearningRate, Limited, Natural, Rank, Share
from casehard.model.adapters import add_lora
from casehard.seeds import derive
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from casehard.types import Budget, Example

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class FinetuneAttack(Limited):
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
    """Constant learning rate, no warm-up (the paper attacks real models with 1e-5)."""
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
    def checkpoints(self) -> tuple[int, ...]:
        """Steps at which the attacked model is measured, ascending."""
        return tuple(sorted({s for s in self.evaluate_at if 0 <= s <= self.steps} | {self.steps}))

    @property
    def recipe(self) -> TrainConfig:
        """The training loop of the attack: constant learning rate, no warm-up."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            schedule="constant",
            warmup=0,
            optimizer=self.optimizer,
            precision=self.precision,
        )


@dataclass(frozen=True)
class FinetuneResult:
    """What the attack did and what was measured."""

    rows: Rows
    """Everything ``evaluate`` returned, each row with its ``step``."""
    budget: Budget
    harmful_rows: int
    benign_rows: int
    known_rows: int = 0
    """Rows of the attacker's files whose prompts the defender trained on: above 0 the attack is in-distribution."""
    log: list[dict[str, Any]] = field(default_factory=list)


def attack_data(
    harmful: Sequence[Example], benign: Sequence[Example], config: FinetuneAttack, *, seed: int
) -> list[Example]:
    """Return the attacker's shuffled mixture: ``share`` of ``rows`` harmful, the rest benign."""
    return poison(harmful, benign, share=config.share, n=config.rows, seed=derive(seed, 0, "attack-mix"))


def finetune_attack(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    config: FinetuneAttack,
    *,
    seed: int,
    evaluate: Callable[[nn.Module, int], Rows],
    system: str | None = None,
    max_length: int | None = None,
    method: Any = None,
    label: str = "attack",
) -> FinetuneResult:
    """Fine-tune a copy of ``model`` on a poisoned mixture, measuring it at ``config.checkpoints``.

    With ``method`` this is a customer's job at a provider who defends: same data and recipe, the method's seams inside.

    Args:
        model: the released weights; left as they are.
        harmful: compliant answers to restricted prompts; may be empty when ``share`` is 0.
        benign: the attacker's cover rows; may be empty when ``share`` is 1.
        evaluate: called as ``evaluate(model, step)``, in memory; returns rows.
        system: system message of every row, None for the template's default.
        max_length: longest row in tokens, None for the model's context.
        method: defence inside the training run, an object with seams of ``casehard.defend.protocol``. One with a
            ``finish`` seam changes the model at the end, so it is measured at step 0 and after that only.

    Raises:
        DataError: too few rows for the share asked for.
        Diverged: the attack's loss stopped being finite.
    """
    mixture = attack_data(harmful, benign, config, seed=seed)
    drawn = counts(share=config.share, n=config.rows)
    victim: nn.Module = copy.deepcopy(model)
    if config.mode == "lora":
        victim = add_lora(victim, rank=config.rank, alpha=config.alpha, seed=derive(seed, 0, "attack-lora"))
    measured: Rows = []
    wanted = {0, config.steps} if callable(getattr(method, "finish", None)) else {*config.checkpoints}

    def measure(current: nn.Module, step: int) -> None:
        if step in wanted.intersection(config.checkpoints):
            measured.extend({**row, "step": step} for row in evaluate(current, step))

    def on_step(current: nn.Module, step: int) -> None:
        if step < config.steps:
            measure(current, step)

    measure(victim, 0)
    limit = max_length or getattr(model.config, "max_position_embeddings", None)
    chat = ChatFormat(tokenizer, system=system, max_length=limit)
    encoded = chat.encode_all(mixture)
    train = config.recipe
    result = fit(victim, tokenizer, encoded, config=train, method=method, seed=seed, on_step=on_step, label=label)
    measure(result.model, config.steps)  # after the method's finish
    return FinetuneResult(measured, result.budget, drawn.harmful, drawn.benign, log=result.log)
