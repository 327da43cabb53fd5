"""What attacks that train a copy share: when they measure, which adapter they train, and the call that trains."""

from __future__ import annotations

from abc import ABC, abstractmethod

from casehard.attacks.protocol import AttackInputs
from casehard.data.batches import EncodedSet
from casehard.model.model import Model
from casehard.train.recipe import TrainConfig
from casehard.train.tune import Lora, Tuned, tune


class TrainingSettings(ABC):
    """Mixed into the settings of an attack that trains; the fields are its own, with its own defaults."""

    mode: str
    steps: int
    rank: int
    alpha: float
    evaluate_at: tuple[int, ...]

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps at which the attacked model is measured, ascending."""
        return tuple(sorted({s for s in self.evaluate_at if 0 <= s <= self.steps} | {self.steps}))

    @property
    def lora(self) -> Lora | None:
        """The adapter that is trained in mode lora."""
        return Lora(rank=self.rank, alpha=self.alpha) if self.mode == "lora" else None

    @property
    @abstractmethod
    def recipe(self) -> TrainConfig:
        """The training loop."""


def train_copy(
    model: Model, rows: EncodedSet, settings: TrainingSettings, inputs: AttackInputs, *, purpose: str
) -> Tuned:
    """Train a copy of ``model`` on token rows, measuring it at ``settings.checkpoints``.

    Args:
        purpose: names the random streams.

    Raises:
        Diverged: the loss stopped being finite.
    """
    return tune(
        model,
        rows,
        train=settings.recipe,
        seed=inputs.seed,
        purpose=purpose,
        method=inputs.method,
        lora=settings.lora,
        measure=inputs.measure,
        at=settings.checkpoints,
        label=inputs.label,
    )
