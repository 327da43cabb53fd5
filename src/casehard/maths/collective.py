"""What ranks of one run share. Without ``torch.distributed`` every function is the one-process case."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch


def world() -> int:
    """Return the number of processes of this run."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def rank() -> int:
    """Return the number of this process, 0-based."""
    return torch.distributed.get_rank() if world() > 1 else 0


def sharded(tensor: torch.Tensor) -> bool:
    """Return whether this is a DTensor, whose gradient the backward pass reduces by itself."""
    return hasattr(tensor, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, any other tensor as it is."""
    return tensor.to_local() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(scalar: torch.Tensor) -> torch.Tensor:
    """Return a reduction over a tensor as a plain scalar, summed over the shards of a DTensor."""
    return scalar.full_tensor() if sharded(scalar) else scalar  # type: ignore[attr-defined]


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
    held: list[torch.Tensor] = []
    for gradient in [*[g for g in gradients if not sharded(g)], None]:
        full = sum(g.numel() for g in held)
        if held and (gradient is None or gradient.dtype != held[0].dtype or full + gradient.numel() > bucket):
            flat = torch.cat([g.flatten() for g in held])
            torch.distributed.all_reduce(flat, group=group)
            for g, part in zip(held, flat.split([g.numel() for g in held]), strict=True):
                g.copy_(part.view_as(g))
            held = []
        if gradient is not None:
            held.append(gradient)


def why(error: BaseException) -> str:
    """Return what a broken process group said, without where in gloo's source it said it."""
    first = re.sub(r"\[[^\]]*\]\s*", "", str(error).partition("\n")[0])
    return first.partition(". This is typically")[0][:200] or type(error).__name__
