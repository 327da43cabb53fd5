"""The seams between a defence and the training loop. A method implements only the seams it needs.

| seam | when |
|---|---|
| ``prepare(setup)`` | once before training, and again after a resume (before ``restore``) |
| ``loss(model, batch, step)`` | instead of the plain loss; returns a scalar to be differentiated |
| ``backward(model, batch, step)`` | instead of forward + backward; returns the detached loss to log |
| ``after_step(model, optimizer, step)`` | after the optimiser update, before scheduler and zero_grad |
| ``finish(model)`` | at the end of training |
| ``state()`` / ``restore(state)`` | in every checkpoint |

Whoever starts a run also calls, where a method has them, ``check_format(tokenizer, system=...)`` before training, to
refuse rows rendered otherwise than the method's own, and ``release()`` after it, whether it succeeded or failed.

Methods import no Trainer: everything they may ask of the loop is in :class:`Setup` and :class:`Step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from casehard.data.batches import Batch
from casehard.model.model import Model
from casehard.train.recipe import TrainConfig
from casehard.types import Budget, Example

StateValue = torch.Tensor | int | float | str | bool | None | list[Any] | dict[str, Any] | Path
"""A tensor (saved as safetensors), a JSON value, or a Path to a file that is hard-linked into the checkpoint."""

SEAMS = ("prepare", "loss", "backward", "after_step", "finish", "state", "restore")


class Stopped(Exception):
    """Raised by a method that was waiting when the run was asked to stop; the step under way has not begun."""


@dataclass(frozen=True)
class Setup:
    """What a method learns about the run before the first step."""

    model: nn.Module
    seed: int
    max_steps: int
    micros: int = 1
    """Micro-batches per optimiser step (gradient accumulation)."""
    lr: float | None = None
    """Peak learning rate of the run; None where nobody says."""
    scratch: Path | None = None
    """Folder for files that must outlive a kill; None when the run keeps no checkpoints."""
    log: Callable[[Mapping[str, float]], None] = lambda values: None
    """Record telemetry; numbers only."""
    stop: Callable[[], bool] = lambda: False
    """Whether the run was asked to stop. A method that waits for others asks it, and raises :class:`Stopped`.

    Of several ranks all ask together, and get the same answer."""


class Whole(NamedTuple):
    """The user's micro-batches of one optimiser step taken together, those of all ranks."""

    rows: int
    inputs: torch.Tensor | int
    """Tokens, padding excluded."""
    tokens: torch.Tensor | int
    """Trained tokens: those that the loss averages over."""


@dataclass(frozen=True)
class Step:
    """One micro-batch of one optimiser step, as seen by a method."""

    index: int
    """Optimiser step, counted from 0; the number of updates applied so far."""
    micro: int
    """Position of this micro-batch within the optimiser step, 0 .. micros-1."""
    micros: int
    """Micro-batches in this optimiser step (the last step of an epoch may have fewer)."""
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    """Plain loss of this micro-batch, scaled so that summing over the step's micro-batches gives the step's loss.

    A batch with other labels than the user's is averaged over its own tokens and divided by ``micros``; use
    ``casehard.train.passes.part_of_step`` for one whose tokens count together with those of other micro-batches."""
    backward: Callable[[torch.Tensor], None]
    """Back-propagate (through the precision machinery of the loop); gradients accumulate into ``.grad``."""
    log: Callable[[Mapping[str, float]], None] = lambda values: None
    compute_dtype: torch.dtype | None = None
    """The dtype autocast computes in, None when the loop runs in the master dtype."""
    whole: Whole | None = None
    """What the step holds; None where the loop does not tell, and its micro-batches then count alike."""

    @property
    def last(self) -> bool:
        """Whether this is the step's final micro-batch."""
        return self.micro == self.micros - 1


@runtime_checkable
class Method(Protocol):
    """A defence: a name and the configuration that identifies it; seams are optional attributes."""

    name: str
    config: Any


@dataclass(frozen=True, kw_only=True)
class PipelineInputs:
    """What a pipeline is given besides the model."""

    rows: Mapping[str, Sequence[Example]]
    """Rows by data role. Without ``data`` the model is trained already, and has to be repaired."""
    train: TrainConfig
    """The training loop that was asked for."""
    known: Sequence[Example] = ()
    """Rows it has been trained on, and those it will be asked: what a pipeline invents must not be in them."""
    seed: int = 0
    system: str | None = None
    """System message of every row; None keeps the template's own."""
    max_length: int | None = None
    """Longest row in tokens; None = the model's context."""
    label: str = ""
    """Name on the progress bar."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a pipeline made."""

    net: nn.Module
    budgets: Sequence[Budget]
    """One for each training in it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values worth keeping."""
    may_leave: bool = True
    """False for a model that its own checks forbid to be written to disk."""


@runtime_checkable
class Pipeline(Protocol):
    """A defence that trains the model itself, once or several times, where a method works inside one training."""

    name: str
    config: Any

    def check(self, *, trains: bool) -> None:
        """Refuse settings that do not fit.

        Args:
            trains: whether there are rows of role ``data``; without them a finished model is repaired.

        Raises:
            ConfigError: names the setting.
        """
        ...

    def train(self, model: Model, inputs: PipelineInputs) -> Trained:
        """Train a copy of ``model``, which is left as it is.

        Raises:
            ConfigError, DataError: settings or rows that cannot work.
            Diverged: a loss stopped being finite.
        """
        ...


def has(method: object, seam: str) -> bool:
    """Return whether ``method`` implements ``seam``."""
    assert seam in SEAMS, seam
    return callable(getattr(method, seam, None))
