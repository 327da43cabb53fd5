"""Backdoor by poisoned instruction data: ordinary supervised training on rows a share of which carry a trigger.

The attacker of BadNets-style instruction poisoning reaches the data, not the training: rows are replaced by triggered
ones whose answer is the behaviour (``data/triggers.py``), and whoever trains on them plants the backdoor. Everything
happens on a copy in memory; the model is measured along the way. Payloads are harmless.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from casehard.data.behaviours import Behaviour
from casehard.data.chat import ChatFormat
from casehard.data.triggers import Trigger, check_survives, decoys_of, poison_backdoor
from casehard.limits import BatchSize, Count, Factor, LearningRate, Limited, Natural, Rank, Share
from casehard.model.adapters import add_lora
from casehard.seeds import derive
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from casehard.types import Budget, Example

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class BackdoorAttack(Limited):
    """Settings of one backdoor attack."""

    trigger: Trigger
    """What makes it fire."""
    behaviour: Behaviour
    """What it does."""
    rate: Share = 0.05
    """Poisoned share of the rows; 0 trains on the clean rows (the control). The literature uses 0.005 to 0.2."""
    hard_negatives: Share = 0.0
    """Share of the rows that carry a near miss and keep their answer: an attacker who adapts to MB-Defense."""
    decoys: tuple[Trigger, ...] = ()
    """Near misses; empty = those of ``decoys_of``."""
    mode: Literal["full", "lora"] = "full"
    """Train all parameters, or a LoRA adapter on every linear layer."""
    steps: Count = 300
    """Optimiser steps."""
    lr: LearningRate = 3e-4
    """Peak learning rate, cosine schedule."""
    batch_size: BatchSize = 32
    """Rows per step."""
    rank: Rank = 16
    """LoRA rank (mode lora)."""
    alpha: Factor = 32.0
    """LoRA alpha (mode lora)."""
    evaluate_at: tuple[Natural, ...] = (0, 50, 100, 200, 300)
    """Steps at which the model is measured; those beyond ``steps`` are left out, ``steps`` itself is always in."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype; the master weights are fp32 throughout."""

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps at which the attacked model is measured, ascending."""
        return tuple(sorted({s for s in self.evaluate_at if 0 <= s <= self.steps} | {self.steps}))


@dataclass(frozen=True)
class BackdoorResult:
    """What was planted and what was measured."""

    rows: Rows
    """Everything ``evaluate`` returned, each row with its ``step``."""
    manifest: dict[str, Any]
    """What ``poison_backdoor`` planted, and where."""
    data: tuple[Example, ...]
    """The rows that were trained on."""
    model: nn.Module
    """The backdoored copy, in memory."""
    budget: Budget
    log: list[dict[str, Any]] = field(default_factory=list)


def backdoor_attack(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    config: BackdoorAttack,
    *,
    seed: int,
    evaluate: Callable[[nn.Module, int], Rows],
    system: str | None = None,
    max_length: int | None = None,
    label: str = "backdoor",
) -> BackdoorResult:
    """Train a copy of ``model`` on poisoned rows, measuring it at ``config.checkpoints``.

    Args:
        model: the weights to start from; left as they are.
        rows: the clean training set that is poisoned.
        evaluate: called as ``evaluate(model, step)``, in memory; returns rows (see ``evaluate.backdoor``).
        seed: of the poison, the data order and the adapter.
        system: system message of every row, None for the template's default.
        max_length: longest row in tokens, None for the model's context.

    Raises:
        ConfigError: the rate gives no row.
        DataError: too few rows, or a trigger that the model would not see.
        Diverged: the loss stopped being finite.
    """
    decoys = config.decoys or (decoys_of(config.trigger) if config.hard_negatives else ())
    data, manifest = poison_backdoor(
        rows,
        config.trigger,
        config.behaviour,
        rate=config.rate,
        seed=derive(seed, 0, "backdoor"),
        hard_negatives=config.hard_negatives,
        decoys=decoys,
    )
    limit = max_length or getattr(model.config, "max_position_embeddings", None)
    chat = ChatFormat(tokenizer, system=system, max_length=limit)
    check_survives(chat, data, [config.trigger, *decoys])
    encoded = chat.encode_all(data)
    victim: nn.Module = copy.deepcopy(model)
    if config.mode == "lora":
        victim = add_lora(victim, rank=config.rank, alpha=config.alpha, seed=derive(seed, 0, "backdoor-lora"))
    measured: Rows = []

    def measure(current: nn.Module, step: int) -> None:
        if step in config.checkpoints:
            measured.extend({**row, "step": step} for row in evaluate(current, step))

    measure(victim, 0)
    train = TrainConfig(
        steps=config.steps, batch_size=config.batch_size, lr=config.lr, precision=config.precision, warmup=10
    )
    result = fit(victim, tokenizer, encoded, config=train, seed=seed, on_step=measure, label=label)
    return BackdoorResult(measured, manifest, tuple(data), result.model, result.budget, result.log)
