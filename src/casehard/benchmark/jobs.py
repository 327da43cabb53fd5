"""How many runs of a plan to do at the same time on this machine."""

from __future__ import annotations

from math import prod
from pathlib import Path

from casehard.benchmark.plan import Plan

ON_CPU = 2
MOST = 6
"""On one card. Small models leave a GPU waiting for the CPU; beyond six runs they wait for each other."""
PER_PARAMETER = 36
"""Bytes a run takes for each parameter: weights, gradients, moments and attack vector in fp32 (30), and some for
activations: 31 to 38 on one H200 at 0.48 B parameters and 8 x 512 tokens (benchmarks/gpu/patcher_llama.py, one run)."""
PER_RUN = 3 * 2**30
"""Bytes a run takes besides: the CUDA context, logits and the cache of generation."""


def fitting(plan: Plan, root: Path) -> int:
    """Return how many runs of ``plan`` fit: 2 without a GPU; with one, what its free memory and the cores allow.

    Args:
        root: folder that paths in the plan start from.

    Raises:
        UserError: a model that is not there, or that the Hub does not give.
    """
    import os

    import torch

    if not torch.cuda.is_available():
        return ON_CPU
    from casehard.model.headers import read_headers
    from casehard.model.source import find

    free, _ = torch.cuda.mem_get_info()
    folders = [find(base.model, root=root) for base in plan.bases if base.model]
    sizes = [sum(prod(tensor.shape) for tensor in read_headers(folder).values()) for folder in folders]
    return at_once(free, max(sizes, default=0), cores=os.cpu_count() or 1)


def at_once(free: int, parameters: int, *, cores: int) -> int:
    """Return how many runs fit.

    Args:
        free: bytes of the card that nobody uses.
        parameters: of the largest model.
        cores: of the CPU; each run keeps one busy.
    """
    return max(1, min(MOST, cores, free // (PER_RUN + PER_PARAMETER * parameters)))
