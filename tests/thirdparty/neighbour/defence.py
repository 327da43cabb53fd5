"""Small weights: the loss grows with the mean square of the first parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from casehard.data.batches import Batch
from casehard.limits import Factor, Limited
from casehard.train.protocol import Step


@dataclass(frozen=True, kw_only=True)
class SmallWeightsConfig(Limited):
    """Settings of small weights."""

    weight: Factor = 0.1
    """Weight of the mean square in the loss."""


class SmallWeights:
    """Small weights as a method."""

    name = "small_weights"

    def __init__(self, config: SmallWeightsConfig | None = None) -> None:
        self.config = config or SmallWeightsConfig()

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> torch.Tensor:
        """Return the plain loss and the penalty, of which every micro-batch has its share."""
        square = next(p for p in model.parameters() if p.requires_grad).float().square().mean()
        step.log({"mean_square": square.detach()})
        return step.loss(model, batch) + self.config.weight * square / step.micros
