"""What a round reports: its mean losses over theta and over theta + delta, and their gap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from casehard.defences.patcher.layout import ModelLayout
from casehard.train.protocol import StateValue


class LossMeters:
    """Collect the losses of a round's steps; nothing waits for a device before the round ends."""

    def __init__(self) -> None:
        self._losses: dict[str, list[torch.Tensor]] = {"safe": [], "attacked": []}

    def note(self, **losses: torch.Tensor | None) -> None:
        """Add a step's losses."""
        for kind, loss in losses.items():
            if loss is not None:
                self._losses[kind].append(loss)

    def drain(self, layout: ModelLayout | None) -> dict[str, float]:
        """Return the means since the last call, over the ranks too, for the log."""
        means = {kind: float(torch.stack([x.cpu() for x in v]).mean()) for kind, v in self._losses.items() if v}
        self._losses = {kind: [] for kind in self._losses}
        means = layout.mean(means) if layout is not None else means
        values = {f"{kind}_loss": value for kind, value in means.items()}
        return values | ({"gap": means["attacked"] - means["safe"]} if len(means) == 2 else {})

    def state(self) -> dict[str, StateValue]:
        """Return the losses of the unfinished round."""
        return {f"meter_{k}": torch.stack([x.cpu() for x in losses]) for k, losses in self._losses.items() if losses}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a saved state."""
        for kind in self._losses:
            values = state.get(f"meter_{kind}")
            self._losses[kind] = [] if values is None else list(values.unbind())
