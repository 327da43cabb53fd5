"""Extra passes over rows of the defender's own: their batches, and leaving the user's run as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from casehard.data.batches import IGNORE, Batch, EncodedSet, collate, indices_at
from casehard.distributed.ranks import rank, world
from casehard.seeds import derive


def trained_tokens(batch: Batch) -> int:
    """Return the tokens of a batch that the loss averages over."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def rows_of_rank(
    rows: EncodedSet, size: int, *, seed: int, step: int, purpose: str, device: torch.device | str = "cpu"
) -> Batch:
    """Return this rank's rows of shared batch ``step``: the rank-th, (rank + world)-th, ... of its ``size`` rows."""
    picked = indices_at(len(rows), size, seed=seed, step=step, purpose=purpose)[rank() :: world()]
    batch = collate([rows.rows[i] for i in picked], rows.pad_id)
    return {key: value.to(device) for key, value in batch.items()}


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP2 gathered for a forward pass that no backward pass follows."""
    for module in model.modules():
        if callable(release := getattr(module, "reshard", None)):
            release()


@contextlib.contextmanager
def quiet(model: nn.Module, *, dropout: bool = False, seed: tuple[int, int] = (0, 0)) -> Iterator[None]:
    """Run without dropout, or with masks drawn from (seed, step); modes and generators are as before afterwards."""
    if dropout:
        with torch.random.fork_rng():
            torch.manual_seed(derive(*seed, "extra-pass-dropout"))
            yield
        return
    modules = [m for m in model.modules() if m.training]
    try:
        for m in modules:
            m.training = False
        yield
    finally:
        for m in modules:
            m.training = True


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside a DistributedDataParallel wrapper, or the model itself."""
    inner: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return inner
