"""Noise: every weight of a copy is moved a little, at random."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from casehard.attacks.protocol import Attacked, AttackInputs
from casehard.config import to_dict
from casehard.limits import Factor, Limited
from casehard.model.model import Made, Model
from casehard.seeds import generator
from casehard.types import Budget


@dataclass(frozen=True, kw_only=True)
class NoiseAttack(Limited):
    """Settings of the noise."""

    scale: Factor = 0.01
    """Standard deviation."""


class Noise:
    """Noise as an attack."""

    name = "noise"

    def __init__(self, config: NoiseAttack) -> None:
        self.config = config

    @property
    def checkpoints(self) -> Sequence[int]:
        """Return the one moment at which there is something to measure."""
        return (0,)

    @torch.no_grad()
    def run(self, model: Model, inputs: AttackInputs) -> Attacked:
        """Move the weights of a copy."""
        net, draw = copy.deepcopy(model.net), generator(inputs.seed, 0, "noise")
        for p in net.parameters():
            p.add_(self.config.scale * torch.randn(p.shape, generator=draw))
        made = Made(method="noise-attack", provenance={"settings": to_dict(self.config), "seed": inputs.seed})
        rows = [{**row, "step": 0} for row in inputs.measure(net, 0)]
        return Attacked(model=model.after(net, made, may_leave=False), rows=rows, budget=Budget())
