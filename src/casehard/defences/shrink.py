"""Shrinkage, c x SFT: plain fine-tuning, whose update is multiplied by c once it is over.

    theta <- theta_0 + c (theta_T - theta_0)             full-parameter training, every trained parameter          (1)
    B <- c B, hence W_0 + s B A <- W_0 + c s B A         LoRA, every trained adapter                               (2)

theta_0 the weights before training, theta_T after. No safety data and no extra pass: this is the control that a method
which merges at a coefficient below 1, or clips or prunes the update, has to beat. c = 1 is plain fine-tuning, c = 0 the
starting model. Source: the coefficient 1/2 of Ham et al., arXiv 2605.24550, eq. 9, without everything else of it;
interpolation between start and tuned weights is WiSE-FT, Wortsman et al., arXiv 2109.01903.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from casehard.defences.updates import Start, adapters, from_state, others, start_of, to_state
from casehard.limits import Limited, Share
from casehard.train.protocol import Setup, StateValue


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig(Limited):
    """Settings of shrinkage."""

    c: Share = 0.5
    """Share of the update that is kept, 0..1. Source: Buffer-and-Reinforce, eq. 9 (1/2)."""


class Shrink:
    """Shrinkage as a method.

    Keeps a copy of the starting weights during full-parameter training; under LoRA nothing.

    Args:
        config: settings, see :class:`ShrinkConfig`.
    """

    name = "shrink"

    def __init__(self, config: ShrinkConfig | None = None) -> None:
        self.config = config or ShrinkConfig()
        self._start: Start = {}

    def prepare(self, setup: Setup) -> None:
        """Copy the weights that (1) returns to.

        Raises:
            Unsupported: adapters other than plain LoRA, or sharded parameters.
        """
        self._start = start_of(setup.model)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Apply (1) and (2)."""
        for adapter in adapters(model):
            for p in adapter.b.parameters():
                p.mul_(self.config.c)
        for name, p in others(model).items():
            p.copy_(torch.lerp(self._start[name], p, self.config.c))
        self._start = {}

    def state(self) -> dict[str, StateValue]:
        """Return the starting weights."""
        return to_state(self._start)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        self._start = from_state(self._start, state)
