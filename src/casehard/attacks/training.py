"""What attacks that train a copy share: settings of the loop, the call that trains, and the walk from rows to a record.

An attacker who fine-tunes is a short file beside this one: it says how its rows are made (:class:`Mixing`), or which
rows each phase of its training has (:class:`Tuning`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from casehard.attacks.protocol import Attacked, AttackInputs
from casehard.config import to_dict
from casehard.data.batches import EncodedSet
from casehard.data.mix import is_marked, marks
from casehard.errors import ConfigError
from casehard.limits import BatchSize, Count, Factor, Fraction, Large, LearningRate, Limited, Natural, Rank
from casehard.model.adapters import merged
from casehard.model.model import Made, Model
from casehard.seeds import derive
from casehard.train.recipe import TrainConfig
from casehard.train.tune import Lora, Measure, Rows, Tuned, chat_format, tune
from casehard.types import Budget, Example


@dataclass(frozen=True, kw_only=True)
class Supervised(Limited):
    """The training loop of an attacker who fine-tunes; each attack adds the settings of its rows."""

    mode: Literal["full", "lora"] = "full"
    """Train all parameters, or a LoRA adapter on every linear layer."""
    steps: Count = 100
    """Optimiser steps, all phases together."""
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
    dropout: Fraction = 0.0
    """Dropout of the adapter's input (mode lora), in [0, 1)."""
    target: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers that get an adapter (mode lora): every linear layer but the output head, or names of modules."""
    evaluate_at: tuple[Natural, ...] = (0, 5, 10, 25, 50, 100)
    """Steps at which the model is measured; those beyond ``steps`` are left out, ``steps`` itself is always in."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype; the master weights are fp32 throughout."""
    embeddings: bool = True
    """Train the token embeddings too (mode full)."""

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps at which the attacked model is measured, ascending."""
        return tuple(sorted({s for s in self.evaluate_at if 0 <= s <= self.steps} | {self.steps}))

    @property
    def lora(self) -> Lora | None:
        """The adapter that is trained in mode lora."""
        if self.mode != "lora":
            return None
        return Lora(rank=self.rank, alpha=self.alpha, dropout=self.dropout, target=self.target)

    @property
    def recipe(self) -> TrainConfig:
        """The training loop of the attack, were it one phase."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            schedule=self.schedule,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
            precision=self.precision,
            embeddings=self.embeddings,
        )


class Phase(NamedTuple):
    """One stretch of a training, with an optimiser and a schedule of its own."""

    rows: Sequence[Example]
    train: TrainConfig


def train_copy(
    model: Model,
    phases: Sequence[tuple[EncodedSet, TrainConfig]],
    settings: Supervised,
    inputs: AttackInputs,
    *,
    purpose: str,
) -> Tuned:
    """Train a copy of ``model`` on token rows, phase after phase, measuring it at ``settings.checkpoints``.

    Args:
        phases: rows and loop of each; steps count on from one to the next.
        purpose: names the random streams.

    Raises:
        ConfigError: a method inside a training of several phases, at each of whose ends it would finish its work.
        Diverged: the loss stopped being finite.
    """
    if inputs.method is not None and len(phases) > 1:
        raise ConfigError(
            f"method {inputs.method.name!r} inside a training of {len(phases)} phases",
            hint="a customer's job at a provider is one training: attack without phases and restarts",
        )
    net, begun = model.net, 0
    parts: list[Tuned] = []
    for number, (rows, train) in enumerate(phases):
        at = {s - begun for s in settings.checkpoints if begun < s <= begun + train.steps or s == number == 0}
        done = tune(
            replace(model, net=net),
            rows,
            train=train,
            seed=derive(inputs.seed, number, f"{purpose}-phase") if number else inputs.seed,
            purpose=purpose,
            method=inputs.method,
            lora=None if number else settings.lora,  # later phases go on with the adapter of the first
            measure=shifted(inputs.measure, begun),
            at=at,
            in_place=number > 0,
            label=inputs.label,
        )
        parts.append(Tuned(done.net, later(done.rows, begun), done.budget, later(done.log, begun)))
        net, begun = done.net, begun + train.steps
    measured, log = [row for part in parts for row in part.rows], [row for part in parts for row in part.log]
    return Tuned(net, measured, sum((part.budget for part in parts), Budget()), log)


def shifted(measure: Measure, begun: int) -> Measure:
    """Return a measurement for a phase that begins after ``begun`` steps."""
    return lambda net, step: measure(net, begun + step)


def later(rows: Rows, begun: int) -> Rows:
    """Return the rows of such a phase, their steps counted from the start."""
    return [{**row, "step": row["step"] + begun} if "step" in row else row for row in rows]


C = TypeVar("C", bound=Supervised)


class Tuning(ABC, Generic[C]):
    """An attack that fine-tunes a copy on rows it makes, in one phase or in several."""

    name: str

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    def checkpoints(self) -> Sequence[int]:
        """Return the steps at which the attacked model is measured."""
        return self.config.checkpoints

    @abstractmethod
    def phases(self, model: Model, inputs: AttackInputs) -> Sequence[Phase]:
        """Return what is trained on, in order.

        Raises:
            DataError: too few rows.
        """

    def check_rows(self, rows: Mapping[str, Sequence[Example]]) -> None:
        """Refuse rows that are too few, while there is no model yet; more may be found when there is one.

        Raises:
            DataError: too few rows for the share asked for.
        """
        if (mixed := getattr(self.config, "mixed", None)) is not None:
            mixed(rows, seed=0)

    def facts(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Return what is worth keeping of the rows, as JSON values."""
        return {"rows": [len(phase.rows) for phase in phases]}

    def train(self, model: Model, phases: Sequence[Phase], inputs: AttackInputs) -> Tuned:
        """Train a copy of ``model``."""
        chat = chat_format(model, system=inputs.system, max_length=inputs.max_length)
        encoded = [(chat.encode_all(phase.rows), phase.train) for phase in phases]
        return train_copy(model, encoded, self.config, inputs, purpose="attack")

    def run(self, model: Model, inputs: AttackInputs) -> Attacked:
        """Fine-tune a copy of ``model``, measuring it at ``config.checkpoints``.

        Raises:
            DataError: too few rows.
            Diverged: the loss stopped being finite.
        """
        phases = self.phases(model, inputs)
        done = self.train(model, phases, inputs)
        own = [row for role in ("harmful", "benign") for row in inputs.rows.get(role, ())]
        known = sum(is_marked(row, model.trained_prompts) for row in own)
        facts = {**self.facts(phases), "rows_seen_in_training": known}
        provenance = {"settings": to_dict(self.config), "seed": inputs.seed, **facts}
        made = Made(method=f"{self.name}-attack", provenance=provenance)
        trained = frozenset(marks(*(phase.rows for phase in phases)))
        attacked = model.after(merged(done.net), made, trained=trained, may_leave=False)
        return Attacked(model=attacked, rows=done.rows, budget=done.budget, facts=facts, log=done.log)


class Mixing(Tuning[C]):
    """An attack that trains on one mixture: a method can then run inside its training, as at a provider."""

    @abstractmethod
    def mixture(self, model: Model, inputs: AttackInputs) -> Sequence[Example]:
        """Return the rows that are trained on.

        Raises:
            DataError: too few rows.
        """

    def phases(self, model: Model, inputs: AttackInputs) -> Sequence[Phase]:
        """Return the one phase."""
        return [Phase(self.mixture(model, inputs), self.config.recipe)]
