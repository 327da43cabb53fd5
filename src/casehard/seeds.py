"""Randomness as a function of (seed, step, purpose), so that a resumed run draws what the uninterrupted one drew."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def kept_generators() -> Iterator[None]:
    """Leave the global generators (Python, NumPy, torch, GPUs in use) as the caller had them.

    Transformers seeds all of them for a run; what a caller draws afterwards must not repeat itself for that.
    """
    import numpy as np
    import torch

    python, numbers, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(cpu)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)


def make_deterministic(threads: int | None = None) -> None:
    """Switch on deterministic kernels; ``threads`` fixes the CPU thread count, on which float sums depend."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    if threads is not None:
        torch.set_num_threads(threads)
