"""Who shares a batch with whom, and who holds which rows of a weight, among processes that compute one gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from casehard.maths.tensors import cosine, dot, norm


class Seat(NamedTuple):
    """This process's place among those that share a batch."""

    number: int = 0
    of: int = 1
    groups: tuple[Any, ...] = ()
    """Process groups, one a mesh dimension; reducing over each in turn reduces over all. The last one shards."""

    @classmethod
    def at(cls, shards: Mapping[str, Any]) -> Seat:
        """Return the seat of a rank that holds these sharded parameters (DTensors of one mesh)."""
        mesh = next(iter(shards.values())).device_mesh
        number = 0
        for place, size in zip(mesh.get_coordinate(), mesh.shape, strict=True):
            number = number * size + place
        return cls(number, mesh.size(), tuple(mesh.get_group(i) for i in range(mesh.ndim)))

    @classmethod
    def within(cls, group: Any) -> Seat:
        """Return the seat of a member of a process group."""
        dist = torch.distributed
        return cls(dist.get_rank(group), dist.get_world_size(group), (group,))

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor over all seats, in place."""
        for group in self.groups:
            torch.distributed.all_reduce(tensor, group=group)
        return tensor


def share(batch: Mapping[str, torch.Tensor], seat: Seat) -> tuple[dict[str, torch.Tensor], float]:
    """Return this seat's rows of a shared batch (number, number + of, ...) and their share of its trained tokens.

    Weighted by its share, the sum over seats of the rows' mean losses is the mean over the whole batch (B, T).
    """
    if seat.of == 1:
        return dict(batch), 1.0
    trained = (batch["labels"][:, 1:] != -100).sum(-1)
    mine = torch.arange(seat.number, len(trained), seat.of, device=trained.device)
    own = int(trained[mine].sum())
    if own == 0:  # everyone must take part in every pass; a row that counts nothing keeps its loss finite
        mine = trained.argmax()[None]
    return {key: value[mine] for key, value in batch.items()}, own / max(int(trained.sum()), 1)


def compare(new: Sequence[torch.Tensor], old: Sequence[torch.Tensor] | None, seat: Seat) -> tuple[float, float | None]:
    """Return the L2 norm of a vector and its cosine with an older one, whole or sharded; one collective at most.

    Args:
        new: this seat's parts of the vector.
        old: the same parts of the older one, in the same order; None when there is none.
    """
    if seat.of == 1:
        return norm(new), None if old is None else cosine(old, new)
    parts = [norm(new) ** 2, *([] if old is None else [norm(old) ** 2, dot(old, new)])]
    held = torch.tensor(parts, dtype=torch.float64, device=new[0].device)
    torch.distributed.all_reduce(held, group=seat.groups[-1])
    square, *rest = held.tolist()
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
