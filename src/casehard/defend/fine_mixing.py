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

from casehard.defend.folders import read_weights
from casehard.defend.protocol import Setup
from casehard.errors import DataError
from casehard.limits import Limited, Share
from casehard.seeds import generator


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
        if (base is None) == (assets is None):
            raise DataError("fine_mixing needs the weights of the trusted base", hint="--assets BASE_MODEL")
        self.base = base if base is not None else read_weights(Path(str(assets)))

    @torch.no_grad()
    def prepare(self, setup: Setup) -> None:
        """Apply (1) to every trained parameter; after a resume the checkpoint's weights come on top.

        Raises:
            DataError: the base lacks a parameter, or has it in another shape.
        """
        for number, (name, p) in enumerate(setup.model.named_parameters()):
            if not p.requires_grad:
                continue
            if name not in self.base or self.base[name].shape != p.shape:
                raise DataError(
                    f"fine_mixing: the base has no parameter {name!r} of shape {tuple(p.shape)}",
                    hint="give the base that the suspect was trained from, and train all parameters",
                )
            g = generator(setup.seed, number, "fine-mixing")
            kept = torch.rand(p.shape, generator=g) < self.config.keep
            p.copy_(torch.where(kept.to(p.device), p, self.base[name].to(p.device, p.dtype)))
