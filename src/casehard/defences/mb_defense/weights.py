"""Weights set aside and put back: the best checkpoint of stage 2, and the base, between the two stages and after them.

    theta_i <- theta_i (base) with probability ``share``, else theta_i (after stage 1)                            (1)
    theta   <- base + c (theta - base)               after stage 2                                                (2)

Sources: (1) Zhang et al., arXiv 2210.09545 (fine-mixing), here before stage 2 instead of plain fine-tuning; the method
of its own is ``defences.fine_mixing``. (2) WiSE-FT, Wortsman et al., arXiv 2109.01903.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from casehard.defences.fine_mixing import mix


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the trained parameters on the CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore(model: nn.Module, kept: Mapping[str, torch.Tensor]) -> None:
    """Put back what :func:`trained` returned."""
    for name, p in model.named_parameters():
        if name in kept:
            p.copy_(kept[name])


def mix_back(model: nn.Module, base: Mapping[str, torch.Tensor], share: float, *, seed: int) -> None:
    """Apply (1) to the trained parameters: ``share`` of them, drawn weight by weight, become the base's again."""
    mix(model, base, 1.0 - share, seed=seed)


@torch.no_grad()
def pull_back(model: nn.Module, base: Mapping[str, torch.Tensor], c: float) -> None:
    """Apply (2) to the trained parameters."""
    for name, p in model.named_parameters():
        if name in base:
            p.copy_(torch.lerp(base[name].to(p.device), p, c))
