"""Round trip: quantise every linear weight and write it back, as whoever deploys a model in 8 or 4 bits does.

    scale = max |w| / (2^(bits-1) - 1) over a group,   w = scale round(w / scale)                                 (1)

A group is a row, or so many columns of one. Not aimed at refusals, and free: a defence that does not survive it is
gone on most laptops. Sources: absmax quantisation by rows, Dettmers et al., arXiv 2208.07339; in blocks of 64, Dettmers
et al., arXiv 2305.14314; what it does to safety, Kumar et al., arXiv 2404.04392. Differs: whole numbers in equal steps
at 4 bits (no NF4), no outliers kept apart, activations as they are.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from casehard.attacks.editing import Untrained, copy_of, measured
from casehard.attacks.protocol import Attacked, AttackInputs
from casehard.errors import Unsupported
from casehard.limits import Limited, Natural
from casehard.model.model import Model

GROUPS = {8: 0, 4: 64}
"""Columns that share a scale, unless the settings say otherwise; 0 is the whole row."""


@dataclass(frozen=True, kw_only=True)
class RoundTripAttack(Limited):
    """Settings of a round trip."""

    bits: Literal[8, 4] = 8
    """Bits of a weight."""
    group: Natural | None = None
    """Columns that share a scale, 0 the whole row; None: the row at 8 bits, 64 at 4. The last group of a row may be
    shorter."""


def round_trip(weight: torch.Tensor, bits: int, group: int = 0) -> torch.Tensor:
    """Return (1) of a weight (O, I), in its dtype; a group of zeros stays so."""
    top = 2 ** (bits - 1) - 1
    parts = []
    for w in weight.float().split(group or weight.shape[1], dim=1):
        scale = w.abs().amax(dim=1, keepdim=True) / top
        parts.append(torch.where(scale > 0, (w / scale.where(scale > 0, 1)).round() * scale, 0))
    return torch.cat(parts, dim=1).to(weight.dtype)


def rounded_layers(net: Any) -> dict[str, nn.Linear]:
    """Return the layers whose weights are rounded, by name: every linear one but the output head.

    Raises:
        Unsupported: it has none.
    """
    head = net.get_output_embeddings()
    found = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not found:
        raise Unsupported(f"a {type(net).__name__} has no linear layers", hint="take a Llama-like model")
    return found


class RoundTrip(Untrained[RoundTripAttack]):
    """Round every linear weight of a copy."""

    name = "round_trip"

    @torch.no_grad()
    def run(self, model: Model, inputs: AttackInputs) -> Attacked:
        """Apply (1) to every linear layer of a copy of ``model``, the output head left out, and measure it.

        Raises:
            Unsupported: it has no linear layers.
        """
        begun, config = time.monotonic(), self.config
        net: Any = copy_of(model)
        found = rounded_layers(net)
        group = GROUPS[config.bits] if config.group is None else config.group
        changed = size = 0.0
        for layer in found.values():
            rounded = round_trip(layer.weight, config.bits, group)
            changed += float((rounded.float() - layer.weight.float()).square().sum())
            size += float(layer.weight.float().square().sum())
            layer.weight.copy_(rounded)
        facts = {"layers": len(found), "group": group, "relative_change": (changed / size) ** 0.5 if size else 0.0}
        return measured(self, model, net, inputs, facts, begun)
