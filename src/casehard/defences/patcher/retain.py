"""An extra term on harmless rows, so that the defender stays useful; not in the paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from casehard.data.batches import EncodedSet
from casehard.defences.patcher.layout import ModelLayout
from casehard.defences.patcher.snapshots import Snapshot, Snapshots
from casehard.train.protocol import StateValue

RetainKind = Literal["auto", "none", "ce", "kl"]


class RetainTerm:
    """Cross-entropy on harmless rows, or KL(start model || model): how far the model has moved on them.

    Args:
        size: rows per outer step.
        seed: of the run; the rows are a function of seed and step.
    """

    def __init__(self, kind: RetainKind, rows: EncodedSet, size: int, *, seed: int, snapshots: Snapshots) -> None:
        self.kind, self.rows, self.size, self.seed, self.snapshots = kind, rows, size, seed, snapshots
        self._start: Snapshot | None = None
        self._resumed = False
        self._anchor: Mapping[str, torch.Tensor] | None = None

    def loss(self, layout: ModelLayout, step: int) -> torch.Tensor:
        """Return the term of one outer step; first called before any update, it keeps those weights for the KL."""
        if self.kind == "kl" and self._anchor is None:
            if self._resumed and isinstance(self._start, Path):
                self._start = self.snapshots.link(self._start)
            else:
                self._start = self.snapshots.take("start", layout.model, in_memory=True)
            self._anchor = self.snapshots.tensors(self._start, layout.model)
        batch = self.rows.batch_at(self.size, seed=self.seed, step=step, purpose="patcher-retain")
        device = next(layout.model.parameters()).device
        return layout.retain_loss({key: value.to(device) for key, value in batch.items()}, self._anchor)

    def state(self) -> dict[str, StateValue]:
        """Return the file of the starting weights, where the run keeps checkpoints."""
        return {"start": self._start} if isinstance(self._start, Path) else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a saved state."""
        self._start, self._resumed = state.get("start"), True
