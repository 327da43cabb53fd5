"""Randomness as a function of (seed, step, purpose), so that a resumed run draws what the uninterrupted one drew."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, step: int = 0, purpose: str = "") -> int:
    """Return a 63-bit seed that depends on all three arguments and on nothing else.

    Distinct purposes give independent streams: ``derive(0, 5, "safe")`` and ``derive(0, 5, "attack")`` share no draws.
    """
    text = f"casehard:{seed}:{step}:{purpose}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(seed: int, step: int = 0, purpose: str = "") -> torch.Generator:
    """Return a CPU ``torch.Generator`` seeded by :func:`derive`."""
    import torch

    return torch.Generator().manual_seed(derive(seed, step, purpose))


def make_deterministic(threads: int | None = None) -> None:
    """Switch on deterministic kernels; ``threads`` fixes the CPU thread count, on which float sums depend."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    if threads is not None:
        torch.set_num_threads(threads)
