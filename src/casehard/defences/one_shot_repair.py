"""One-shot repair: after fine-tuning, a handful of gradient steps on one safe row bring the refusals back.

    training          as it is, no defence inside
    afterwards        for j = 1 .. steps:  stop if L(safe rows; theta) <= stop                                   (1)
                                           theta <- theta - lr Adam(grad L(safe rows; theta))                    (2)

L is the mean loss over the answer tokens of the ``rows`` safe rows drawn, all of them in every step. By default the
repair stops once the tuned model finds them as likely as the starting model did: what training took is back, and more
steps would teach the one answer by heart.
Source: arXiv 2601.01887, known to us from a description: that one safety example and a few steps after fine-tuning
suffice is from it. Optimiser, learning rate and stop are ours. Steps run without dropout, weight decay and schedule,
their gradients clipped to norm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import nn

from casehard.data.batches import Batch, EncodedSet, collate, indices_at
from casehard.distributed.ranks import require_one_process
from casehard.errors import ConfigError, DataError, Diverged
from casehard.limits import WEIGHT, BatchSize, Limited, Natural, Within
from casehard.train.passes import quiet
from casehard.train.protocol import Setup, StateValue


@dataclass(frozen=True, kw_only=True)
class OneShotRepairConfig(Limited):
    """Settings of the repair."""

    rows: BatchSize = 1
    """Safe rows that are trained on, drawn by the seed. Source: description (one)."""
    steps: Natural = 10
    """Steps at most; 0 is plain fine-tuning. Source: description (a handful)."""
    lr: Annotated[float | Literal["job"], Within(0, 1000)] = "job"
    """Learning rate of (2), or "job", the peak learning rate of the training before. Ours."""
    stop: Annotated[float | Literal["start"], Within(0, WEIGHT)] = "start"
    """Loss of (1), nats a token, or "start", the starting model's own on these rows; 0 takes all steps. Ours."""


class OneShotRepair:
    """One-shot repair as a method.

    Args:
        config: settings, see :class:`OneShotRepairConfig`.
        safe: safe rows to draw from. With one row: a restricted prompt with its refusal.

    Raises:
        DataError: fewer safe rows than to be trained on.
    """

    name = "one_shot_repair"

    def __init__(self, config: OneShotRepairConfig | None = None, *, safe: EncodedSet) -> None:
        self.config = config or OneShotRepairConfig()
        if len(safe) < self.config.rows:
            hint = "--safe refusals.jsonl, or a smaller --set settings.rows"
            raise DataError(f"one_shot_repair: {self.config.rows} rows to train on, {len(safe)} safe rows", hint=hint)
        self.safe = safe

    def prepare(self, setup: Setup) -> None:
        """Draw the rows and measure the starting model's loss on them.

        Raises:
            ConfigError: lr is "job" and the loop does not tell its learning rate.
            Unsupported: several processes.
            Diverged: the starting model's loss is not finite.
        """
        require_one_process("one_shot_repair")
        lr = setup.lr if self.config.lr == "job" else self.config.lr
        if lr is None:
            raise ConfigError("one_shot_repair: this loop does not tell its learning rate", hint="give lr a number")
        drawn = indices_at(len(self.safe), self.config.rows, seed=setup.seed, step=0, purpose="one-shot-repair")
        self._rows = collate([self.safe.rows[i] for i in drawn], self.safe.pad_id)
        self._lr, self._log = float(lr), setup.log
        if self.config.stop == "start":
            with quiet(setup.model), torch.no_grad():
                self._stop = _finite(setup.model(**_on(setup.model, self._rows)).loss, 0)
        else:
            self._stop = float(self.config.stop)

    def finish(self, model: nn.Module) -> None:
        """Repair the tuned model in place; the log gets one row more.

        Raises:
            Diverged: the loss on the safe rows is not finite.
        """
        if self.config.steps == 0:
            return
        with quiet(model):
            taken, loss = repair(model, self._rows, self.config.steps, self._lr, self._stop, log=self._log)
        self._log({"repair_steps": float(taken), "repair_loss": loss})

    def state(self) -> dict[str, StateValue]:
        """Return the loss to stop at: whoever resumes may have loaded the checkpoint, not the start."""
        return {"stop": self._stop}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        self._stop = float(state["stop"])


def repair(
    model: nn.Module,
    rows: Batch,
    steps: int,
    lr: float,
    stop: float,
    *,
    log: Callable[[Mapping[str, float]], None] = lambda values: None,
) -> tuple[int, float]:
    """Apply (1) and (2) to the weights that are trained; return how many steps it took and the last loss seen.

    Args:
        rows: (B, T) tokens, mask and labels.
        stop: loss in nats a token.
        log: told of every pass, for the budget.

    Raises:
        Diverged: a loss is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=lr)
    batch = _on(model, rows)
    for taken in range(steps + 1):
        optimiser.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        value = _finite(loss, taken)
        log({"tokens": int(batch["attention_mask"].sum())})
        if taken == steps or value <= stop:
            break
        loss.backward()
        log({"passes": 1})
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
    return taken, value


def _on(model: nn.Module, batch: Batch) -> Batch:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def _finite(loss: torch.Tensor, taken: int) -> float:
    if not bool(loss.isfinite()):
        raise Diverged(f"one_shot_repair: the loss is not finite after {taken} steps", hint="lower lr or steps")
    return float(loss.detach())
