"""Lisa, lazy safety alignment: alternate safe and user phases, each held near the weights the last one ended with.

    phase "safe"  (safe_steps):  min L(safe rows, theta) + rho/2 ||theta - anchor||^2                            (1)
    phase "user"  (user_steps):  min L(user rows, theta) + rho/2 ||theta - anchor||^2                            (2)
    anchor <- theta whenever the phase changes (at first: the starting weights)                                  (3)

Source: Huang et al., arXiv 2405.18641 (Lisa), bi-state optimisation with proximal terms.
Differs from the published code: the proximal term is on from the first step, and its gradient is exact once a step
however many micro-batches there are. A user micro-batch is read and left aside in the safe phase, so the learning-rate
schedule spans both phases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from casehard.data.batches import Batch, EncodedSet
from casehard.errors import DataError
from casehard.limits import Count, Limited, Weight
from casehard.train.passes import part_of_step, rows_of_micro, whole_step
from casehard.train.protocol import Setup, StateValue, Step


@dataclass(frozen=True, kw_only=True)
class LisaConfig(Limited):
    """Settings of Lisa."""

    safe_steps: Count = 100
    """Optimiser steps of a safe phase. Source: Lisa, K_1 (100)."""
    user_steps: Count = 900
    """Optimiser steps of a user phase. Source: Lisa, K_2 (900)."""
    rho: Weight = 1.0
    """Weight of the proximal terms. Source: Lisa (1)."""


class Lisa:
    """Lisa as a method.

    Args:
        config: settings, see :class:`LisaConfig`.
        safe: safe rows.

    Raises:
        DataError: no safe rows.
    """

    name = "lisa"

    def __init__(self, config: LisaConfig | None = None, *, safe: EncodedSet) -> None:
        self.config = config or LisaConfig()
        if len(safe) == 0:
            raise DataError("lisa: no safe rows", hint="--safe pool.jsonl")
        self.safe = safe
        self._anchor: dict[str, torch.Tensor] = {}

    def prepare(self, setup: Setup) -> None:
        """Anchor at the starting weights."""
        self._seed = setup.seed
        self._anchor = _copy(setup.model)

    def phase(self, index: int) -> str:
        """Return "safe" or "user", the phase of optimiser step ``index``."""
        within = index % (self.config.safe_steps + self.config.user_steps)
        return "safe" if within < self.config.safe_steps else "user"

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Return this micro-batch's part of (1) or (2)."""
        if step.micro == 0 and step.index > 0 and self.phase(step.index) != self.phase(step.index - 1):
            self._anchor = _copy(model)
        safe = self.phase(step.index) == "safe"
        if safe:
            rows, device = whole_step(batch, step).rows, batch["input_ids"].device
            own, tokens = rows_of_micro(self.safe, rows, step, seed=self._seed, purpose="lisa", device=device)
            assert own is not None, "as many rows as the user's, and so at least one"
            loss = part_of_step(model, own, step, tokens)
        else:
            loss = step.loss(model, batch)
        step.log({"safe_loss" if safe else "user_loss": float(loss.detach()) * step.micros})
        return loss + self._proximal(model) / step.micros

    def _proximal(self, model: nn.Module) -> torch.Tensor:
        """Return rho/2 ||theta - anchor||^2 over the trained parameters."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parts = [(p - self._anchor[name.removeprefix("module.")]).square().sum() for name, p in trained.items()]
        return 0.5 * self.config.rho * torch.stack(parts).sum()

    def state(self) -> dict[str, StateValue]:
        """Return the anchor of the current phase."""
        return {f"anchor.{name}": value for name, value in self._anchor.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        kept = self._anchor
        self._anchor = {name: state[f"anchor.{name}"].to(value.device) for name, value in kept.items()}


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    # A DDP wrapper puts "module." before every name.
    trained = ((name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: p.detach().clone() for name, p in trained}
