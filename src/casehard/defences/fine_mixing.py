"""Fine-mixing: put back a random half of the trusted base's weights, then fine-tune on clean rows.

    theta_i <- theta_i (suspect) with probability keep, else theta_i (base)                                      (1)
    then plain fine-tuning on the rows given

Source: Zhang et al., arXiv 2210.09545 (Fine-mixing), with keep 0.5 as in MB-Defense's comparison.
Differs: the mask is drawn for each weight from the seed; the original also purifies embeddings, this does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from casehard.defences.folders import base_weights
from casehard.errors import DataError, Unsupported
from casehard.limits import Limited, Share
from casehard.seeds import generator
from casehard.train.protocol import Setup


@dataclass(frozen=True, kw_only=True)
class FineMixingConfig(Limited):
    """Settings of fine-mixing."""

    keep: Share = 0.5
    """Probability that a weight stays the suspect's, 0..1. Source: MB-Defense's baseline (0.5)."""


class FineMixing:
    """Fine-mixing as a method.

    Args:
        config: settings, see :class:`FineMixingConfig`.
        assets: model folder of the trusted base.
        base: its weights by name, instead of a folder.

    Raises:
        DataError: neither or both of them.
    """

    name = "fine_mixing"

    def __init__(
        self,
        config: FineMixingConfig | None = None,
        *,
        assets: Path | None = None,
        base: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.config = config or FineMixingConfig()
        self.base = base_weights(self.name, assets, base)

    def prepare(self, setup: Setup) -> None:
        """Apply (1) to every trained parameter; after a resume the checkpoint's weights come on top.

        Raises:
            Unsupported: an adapter is to be trained.
            DataError: the base lacks a parameter, has it in another shape, or is the suspect itself.
        """
        if hasattr(setup.model, "peft_config"):
            raise Unsupported(
                "fine_mixing mixes all weights, and a LoRA leaves them frozen", hint="train all weights: leave out lora"
            )
        if not mix(setup.model, self.base, self.config.keep, seed=setup.seed):
            raise DataError(
                "fine_mixing: the weights of the base equal those of the model: mixing would change nothing",
                hint="give the trusted model from before the suspect's training",
            )


@torch.no_grad()
def mix(model: nn.Module, base: Mapping[str, torch.Tensor], keep: float, *, seed: int) -> bool:
    """Apply (1) to every trained parameter of ``model``; return whether base and model differ anywhere.

    Raises:
        DataError: the base lacks a parameter, or has it in another shape.
    """
    apart = False
    for number, (name, p) in enumerate(model.named_parameters()):
        if not p.requires_grad:
            continue
        if name not in base or base[name].shape != p.shape:
            raise DataError(
                f"fine_mixing: the base has no parameter {name!r} of shape {tuple(p.shape)}",
                hint="give the base that the suspect was trained from, and train all parameters",
            )
        theirs = base[name].to(p.device, p.dtype)
        apart = apart or not torch.equal(p, theirs)
        kept = torch.rand(p.shape, generator=generator(seed, number, "fine-mixing")) < keep
        p.copy_(torch.where(kept.to(p.device), p, theirs))
    return apart
