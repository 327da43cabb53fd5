"""LoRA updates as pairs of factors."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LoraPair(NamedTuple):
    """The update of one linear layer, ``scale * b @ a``."""

    a: torch.Tensor
    """(r, d_in)."""
    b: torch.Tensor
    """(d_out, r)."""
    scale: float = 1.0
