"""Snapshots of a model's own, clean weights, from which a method can repeat a simulated attack after a resume.

Attack vectors and attacked weights must never reach the disk; the defender's own weights may. A method that needs its
vectors again after a kill keeps where the attack started from, and runs it again: same source, same seed, same vector.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from casehard.distributed.fsdp import local_weights
from casehard.io.tensorfile import load_tensors, save_tensors
from casehard.maths.bilevel import Params

Snapshot = Params | Path
"""A copy in memory, a copy in a file, or an empty dict: the live weights still are that copy."""


class Round(NamedTuple):
    """What is needed to rebuild a round's attack vectors."""

    number: int
    source_step: int
    source: Snapshot
    adopted_step: int = -1
    reference: Snapshot | None = None
    """theta_reference where it differs from the source (delayed adoption)."""


class Snapshots:
    """Take, read and drop copies of the current weights; files are named after the prefix."""

    def __init__(self, scratch: Path | None, prefix: str) -> None:
        self.scratch = scratch
        self.prefix = prefix

    def take(self, label: str, model: nn.Module, *, in_memory: bool, lasting: bool = True) -> Snapshot:
        """Copy the current weights: to a file when the run checkpoints, else to memory if they are needed later.

        Args:
            in_memory: whether this process will read them again.
            lasting: whether a resumed run needs them; if not, no file is written.
        """
        if self.scratch is not None and lasting:
            return save_tensors(self.scratch / f"{self.prefix}-{label}.safetensors", local_weights(model))
        if in_memory:
            # On the host, where it costs no memory of an accelerator.
            return {name: p.detach().to("cpu", copy=True) for name, p in local_weights(model).items()}
        return {}

    def tensors(self, snapshot: Snapshot, model: nn.Module) -> Mapping[str, torch.Tensor]:
        """Return its tensors on the model's device, in the model's order: a gradient norm sums in that order."""
        live = local_weights(model)
        if isinstance(snapshot, Path):
            stored = load_tensors(snapshot, device=next(model.parameters()).device)
            return {name: stored[name] for name in live}
        return {name: t.to(live[name].device) for name, t in snapshot.items()} if snapshot else live

    def link(self, path: Path) -> Path:
        """Link a file of a checkpoint into the scratch folder, so that retention may remove the checkpoint."""
        assert self.scratch is not None
        target = self.scratch / path.name
        if not target.exists() or not target.samefile(path):
            target.unlink(missing_ok=True)
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
        return target

    def discard(self, *snapshots: Snapshot | None) -> None:
        """Remove files that no future step needs; checkpoints have their own links to them."""
        for snapshot in snapshots:
            if isinstance(snapshot, Path):
                snapshot.unlink(missing_ok=True)


def round_to_state(role: str, entry: Round | None) -> dict[str, list[int] | Path]:
    """Return a round as JSON numbers and files, keys prefixed by ``role``."""
    if entry is None:
        return {}
    out: dict[str, list[int] | Path] = {role: [entry.number, entry.source_step, entry.adopted_step]}
    for part, value in (("source", entry.source), ("reference", entry.reference)):
        if isinstance(value, Path):
            out[f"{role}_{part}"] = value
    return out


def round_from_state(role: str, state: Mapping[str, object], snapshots: Snapshots) -> Round | None:
    """Invert :func:`round_to_state`; files are linked back into the scratch folder."""
    numbers = state.get(role)
    if not isinstance(numbers, list):
        return None
    files = {
        part: snapshots.link(value)
        for part in ("source", "reference")
        if isinstance(value := state.get(f"{role}_{part}"), Path)
    }
    return Round(numbers[0], numbers[1], files["source"], numbers[2], files.get("reference"))


def rounds_from_state(role: str, state: Mapping[str, object], snapshots: Snapshots) -> list[Round]:
    """Return the rounds saved as ``role`` 0, 1, 2 ..., in order."""
    out: list[Round] = []
    while (entry := round_from_state(f"{role}{len(out)}", state, snapshots)) is not None:
        out.append(entry)
    return out
