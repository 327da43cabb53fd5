"""Which rows of a weight travel from which process of one side to which of the other, and how they are put together.

A defender of P processes splits every weight into P parts, an attacker of Q processes into Q: rows in the order of the
ranks, as FSDP2 has them (``distributed.ranks.span``). Each process sends each of its peers the rows that both have, so
no process ever sends or receives more than its own part. A :class:`RankInfo` says which part a process has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from casehard.distributed.ranks import RankInfo, overlaps, span
from casehard.errors import Corrupt
from casehard.maths.bilevel import parameters


def channel_name(attacker: int, theirs: int, mine: int) -> str:
    """Return the name of the channel from process ``mine`` of the defender to process ``theirs`` of an attacker."""
    return f"attacker-{attacker}.{theirs}-{mine}"


def row_counts(model: nn.Module) -> dict[str, int]:
    """Return the rows of every whole weight by name, tied ones once; a scalar counts as one row."""
    return {name: (p.shape[0] if p.ndim else 1) for name, p in parameters(model).items()}


def rows_for(
    tensors: Mapping[str, torch.Tensor], rows: Mapping[str, int], mine: RankInfo, theirs: RankInfo
) -> dict[str, torch.Tensor]:
    """Return the rows of my part that are also in theirs, as views; weights without any are left out.

    Args:
        tensors: my part of every weight.
        rows: of the whole weights (:func:`row_counts`).
    """
    if mine.world_size == theirs.world_size:
        return dict(tensors) if mine.rank == theirs.rank else {}
    out = {}
    for name, tensor in tensors.items():
        first = span(rows[name], mine.world_size, mine.rank)[0]
        for here, there, start, stop in overlaps(rows[name], mine.world_size, theirs.world_size):
            if (here, there) == (mine.rank, theirs.rank):
                out[name] = tensor[start - first : stop - first]
    return out


def join_rows(
    pieces: Sequence[dict[str, torch.Tensor]], like: Mapping[str, torch.Tensor], sender: str
) -> dict[str, torch.Tensor]:
    """Return my part of every weight from what each process of the other side sent, in the order of its ranks.

    Args:
        pieces: emptied on the way.
        like: tensors of the names and shapes to come.
        sender: who sent them, for the message.

    Raises:
        Corrupt: names or shapes differ from ``like``: what goes into a gradient must be what was asked for.
    """
    out = {}
    for name, t in like.items():
        found = [piece.pop(name) for piece in pieces if name in piece]
        if not found and t.numel():
            raise Corrupt(f"{sender}: nothing of {name!r} arrived")
        try:
            whole = found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(t.shape)
        except (RuntimeError, TypeError):
            raise Corrupt(f"{sender}: the parts of {name!r} have shapes {[tuple(p.shape) for p in found]}") from None
        if whole.shape != t.shape:
            raise Corrupt(f"{sender}: {name!r} has shape {tuple(whole.shape)}, expected {tuple(t.shape)}")
        out[name] = whole
    if odd := sorted({name for piece in pieces for name in piece}):
        raise Corrupt(f"{sender}: {len(odd)} tensors that were not asked for, first {odd[0]!r}")
    return out
