"""The ranks of one run: how many there are, what they share, and which rows of a batch or a weight each has.

Without ``torch.distributed`` every function is the one-process case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from casehard.errors import Unsupported
from casehard.maths.tensors import cosine, dot, norm


def world() -> int:
    """Return the number of processes of this run."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def require_one_process(name: str) -> None:
    """Check that nobody else shares this run.

    Args:
        name: who runs alone, for the message.

    Raises:
        Unsupported: several processes.
    """
    if world() > 1:
        raise Unsupported(f"{name} runs in one process", hint="start it without torchrun or accelerate launch")


def rank() -> int:
    """Return the number of this process, 0-based."""
    return torch.distributed.get_rank() if world() > 1 else 0


@dataclass(frozen=True)
class RankInfo:
    """This process's place among those that share a batch, or that split the rows of every weight."""

    rank: int = 0
    world_size: int = 1
    groups: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    """Process groups, one a mesh dimension; reducing over each in turn reduces over all. The last one shards."""

    @classmethod
    def of_shards(cls, shards: Mapping[str, Any]) -> RankInfo:
        """Return the place of a rank that holds these sharded parameters (DTensors of one mesh)."""
        mesh = next(iter(shards.values())).device_mesh
        number = 0
        for place, size in zip(mesh.get_coordinate(), mesh.shape, strict=True):
            number = number * size + place
        return cls(number, mesh.size(), tuple(mesh.get_group(i) for i in range(mesh.ndim)))

    @classmethod
    def of_group(cls, group: Any) -> RankInfo:
        """Return the place of a member of a process group."""
        dist = torch.distributed
        return cls(dist.get_rank(group), dist.get_world_size(group), (group,))

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor over all ranks, in place."""
        for group in self.groups:
            torch.distributed.all_reduce(tensor, group=group)
        return tensor


def sharded(tensor: torch.Tensor) -> bool:
    """Return whether this is a DTensor, whose gradient the backward pass reduces by itself."""
    return hasattr(tensor, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, any other tensor as it is."""
    return tensor.to_local() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Add a replicated tensor over all ranks, in place; one collective."""
    if world() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def sum_gradients(gradients: Sequence[torch.Tensor], *, bucket: int = 1 << 24, group: Any = None) -> None:
    """Add replicated gradients over all ranks, in place, in buckets of at most ``bucket`` numbers; DTensors are left.

    ``group`` limits the sum to the ranks of a process group.

    The bucket bounds the copy; a tensor larger than it travels alone.
    """
    if world() == 1:
        return
    waiting: list[torch.Tensor] = []
    for gradient in [*[g for g in gradients if not sharded(g)], None]:
        full = sum(g.numel() for g in waiting)
        if waiting and (gradient is None or gradient.dtype != waiting[0].dtype or full + gradient.numel() > bucket):
            flat = torch.cat([g.flatten() for g in waiting])
            torch.distributed.all_reduce(flat, group=group)
            for g, part in zip(waiting, torch.split(flat, [g.numel() for g in waiting]), strict=True):
                g.copy_(part.view_as(g))
            waiting = []
        if gradient is not None:
            waiting.append(gradient)


def rows_of(batch: Mapping[str, torch.Tensor], place: RankInfo) -> tuple[dict[str, torch.Tensor], float]:
    """Return a rank's rows of a shared batch (rank, rank + world_size, ...) and their share of its trained tokens.

    Weighted by its share, the sum over ranks of the rows' mean losses is the mean over the whole batch (B, T).
    """
    if place.world_size == 1:
        return dict(batch), 1.0
    trained = (batch["labels"][:, 1:] != -100).sum(-1)
    mine = torch.arange(place.rank, len(trained), place.world_size, device=trained.device)
    own = int(trained[mine].sum())
    if own == 0:  # everyone must take part in every pass; a row that counts nothing keeps its loss finite
        mine = trained.argmax()[None]
    return {key: value[mine] for key, value in batch.items()}, own / max(int(trained.sum()), 1)


def norm_and_cosine(
    new: Sequence[torch.Tensor], old: Sequence[torch.Tensor] | None, place: RankInfo
) -> tuple[float, float | None]:
    """Return the L2 norm of a vector and its cosine with an older one, whole or sharded; one collective at most.

    Args:
        new: this rank's parts of the vector.
        old: the same parts of the older one, in the same order; None when there is none.
    """
    if place.world_size == 1:
        return norm(new), None if old is None else cosine(old, new)
    parts = [norm(new) ** 2, *([] if old is None else [norm(old) ** 2, dot(old, new)])]
    sums = torch.tensor(parts, dtype=torch.float64, device=new[0].device)
    torch.distributed.all_reduce(sums, group=place.groups[-1])
    square, *rest = sums.tolist()
    if not rest:
        return square**0.5, None
    size = (square * rest[0]) ** 0.5
    return square**0.5, rest[1] / size if size > 0 else 0.0


class Overlap(NamedTuple):
    """Rows start..stop (without stop) of the whole parameter, which travel from one rank to another."""

    sender: int
    receiver: int
    start: int
    stop: int


def span(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return (start, stop) of the rows a rank holds: ceil(rows / ranks) each, the last ones fewer or none."""
    size = -(-rows // ranks)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def overlaps(rows: int, senders: int, receivers: int) -> list[Overlap]:
    """Plan how ``rows`` rows split over ``senders`` ranks reach ``receivers`` ranks that split them their own way.

    Both sides split dimension 0 as ``torch.chunk`` and FSDP2 do. For 10 rows from 2 to 3 ranks: 0 -> 0 rows 0..4,
    0 -> 1 row 4..5, 1 -> 1 rows 5..8, 1 -> 2 rows 8..10. In order of senders, then receivers; every row once.
    """
    plan = []
    for s in range(senders):
        for r in range(receivers):
            here, there = span(rows, senders, s), span(rows, receivers, r)
            start, stop = max(here[0], there[0]), min(here[1], there[1])
            if start < stop:
                plan.append(Overlap(s, r, start, stop))
    return plan


def why(error: BaseException) -> str:
    """Return what a broken process group said, without where in gloo's source it said it."""
    first = re.sub(r"\[[^\]]*\]\s*", "", str(error).partition("\n")[0])
    return first.partition(". This is typically")[0][:200] or type(error).__name__
