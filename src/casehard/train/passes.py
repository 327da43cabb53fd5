"""Extra passes over rows of the defender's own: their batches, and leaving the user's run as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.data.batches import IGNORE, Batch, EncodedSet, collate, indices_at
from casehard.distributed.ranks import rank, world
from casehard.errors import Unsupported
from casehard.seeds import derive
from casehard.train.protocol import Step, Whole


def trained_tokens(batch: Batch) -> int:
    """Return the tokens of a batch that the loss averages over."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def whole_step(batch: Batch, step: Step) -> Whole:
    """Return the user's step that a micro-batch is part of; an estimate where the loop does not tell."""
    if step.whole is not None:
        return step.whole
    alike = step.micros * world()
    return Whole(len(batch["input_ids"]) * alike, batch["attention_mask"].sum() * alike, _trained(batch) * alike)


def _trained(batch: Batch) -> torch.Tensor:
    return (batch["labels"][:, 1:] != IGNORE).sum()


def share_of_step(batch: Batch, step: Step, tokens: torch.Tensor | int) -> torch.Tensor:
    """Return the weight of a mean over a batch's trained tokens in the mean over the ``tokens`` of a whole step.

    The weights of all micro-batches and ranks add up to the number of ranks, as their gradients are averaged.
    """
    return _trained(batch) * world() / tokens


def part_of_step(model: nn.Module, batch: Batch, step: Step, tokens: torch.Tensor | int) -> torch.Tensor:
    """Return a batch's part of the mean loss over ``tokens`` trained tokens, those of all micro-batches and ranks.

    For batches that replace or join the user's: averaged each over its own tokens, a short one would weigh as much as a
    long one, and the same rows give another gradient when they are cut up otherwise.
    """
    # The seam's loss is a mean over the batch, divided by the micro-batches.
    return step.loss(model, batch) * (step.micros * share_of_step(batch, step, tokens))


class Drawn(NamedTuple):
    """A micro-batch's rows of those that a step draws; None where there are fewer rows than micro-batches."""

    batch: Batch | None
    tokens: int
    """Trained tokens of all rows that the step draws."""


def rows_of_micro(
    rows: EncodedSet, size: int, step: Step, *, seed: int, purpose: str, device: torch.device | str = "cpu"
) -> Drawn:
    """Return this rank's and micro-batch's rows of the ``size`` that a step draws, however the step is cut up."""
    picked = [rows.rows[i] for i in indices_at(len(rows), size, seed=seed, step=step.index, purpose=purpose)]
    begin, end = (size * n // step.micros for n in (step.micro, step.micro + 1))
    mine = picked[begin:end][rank() :: world()]
    batch = {key: value.to(device) for key, value in collate(mine, rows.pad_id).items()} if mine else None
    return Drawn(batch, sum(label != IGNORE for row in picked for label in row.labels[1:]))


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


def decoder_layers(net: nn.Module) -> list[nn.Module]:
    """Return the decoder layers.

    Raises:
        Unsupported: no list of modules is as long as the configuration says.
    """
    config: Any = net.config
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    for module in net.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count > 0:
            return list(module)
    raise Unsupported(
        f"a {type(net).__name__} has no list of {count} layers", hint="take a decoder-only model of transformers"
    )
