"""Which rows of a weight travel from which process of one side to which of the other, and how they are put together.

A defender of P processes holds every weight in P parts, an attacker of Q processes in Q: rows in the order of the
ranks, as FSDP2 has them (``maths.seats.span``). Each process sends each of its peers the rows that both hold, so no
process ever sends or receives more than its own part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from casehard.errors import Corrupt
from casehard.maths.bilevel import parameters
from casehard.maths.seats import overlaps, span


class Part(NamedTuple):
    """The share of every weight that one process of a side holds."""

    number: int = 0
    of: int = 1


def channel_name(attacker: int, theirs: int, mine: int) -> str:
    """Return the name of the channel from process ``mine`` of the defender to process ``theirs`` of an attacker."""
    return f"attacker-{attacker}.{theirs}-{mine}"


def heights(model: nn.Module) -> dict[str, int]:
    """Return the rows of every whole weight by name, tied ones once; a scalar counts as one row."""
    return {name: (p.shape[0] if p.ndim else 1) for name, p in parameters(model).items()}


def cut(
    tensors: Mapping[str, torch.Tensor], rows: Mapping[str, int], mine: Part, theirs: Part
) -> dict[str, torch.Tensor]:
    """Return the rows of my part that are also in theirs, as views; weights without any are left out.

    Args:
        tensors: my part of every weight.
        rows: of the whole weights (:func:`heights`).
    """
    if mine.of == theirs.of:
        return dict(tensors) if mine.number == theirs.number else {}
    out = {}
    for name, tensor in tensors.items():
        first = span(rows[name], mine.of, mine.number)[0]
        for sender, receiver, start, stop in overlaps(rows[name], mine.of, theirs.of):
            if (sender, receiver) == (mine.number, theirs.number):
                out[name] = tensor[start - first : stop - first]
    return out


def put_together(
    pieces: Sequence[dict[str, torch.Tensor]], like: Mapping[str, torch.Tensor], whence: str
) -> dict[str, torch.Tensor]:
    """Return my part of every weight from what each process of the other side sent, in the order of its ranks.

    Args:
        pieces: emptied on the way.
        like: tensors of the names and shapes to come.
        whence: who sent them, for the message.

    Raises:
        Corrupt: names or shapes differ from ``like``: what goes into a gradient must be what was asked for.
    """
    out = {}
    for name, t in like.items():
        found = [piece.pop(name) for piece in pieces if name in piece]
        if not found and t.numel():
            raise Corrupt(f"{whence}: nothing of {name!r} arrived")
        try:
            whole = found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(t.shape)
        except (RuntimeError, TypeError):
            raise Corrupt(f"{whence}: the parts of {name!r} have shapes {[tuple(p.shape) for p in found]}") from None
        if whole.shape != t.shape:
            raise Corrupt(f"{whence}: {name!r} has shape {tuple(whole.shape)}, expected {tuple(t.shape)}")
        out[name] = whole
    if odd := sorted({name for piece in pieces for name in piece}):
        raise Corrupt(f"{whence}: {len(odd)} tensors that nobody asked for, first {odd[0]!r}")
    return out
