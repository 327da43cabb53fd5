"""Norms, products and shifts over lists of parameters, seen as one long vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return half-precision tensors in fp32, others as they are."""
    return x if torch.finfo(x.dtype).bits >= 32 else x.float()


def whole(scalar: torch.Tensor) -> torch.Tensor:
    """Return a reduction over a tensor as a plain scalar; that of a DTensor adds up its shards by itself."""
    return scalar.full_tensor() if hasattr(scalar, "full_tensor") else scalar


def dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """Return the inner product of two parameter lists, products in fp32, summed over tensors in float64."""
    parts = [torch.sum(x.float() * y.float(), dtype=torch.float64) for x, y in zip(a, b, strict=True)]
    return float(torch.stack(parts).sum()) if parts else 0.0


def norm(a: Iterable[torch.Tensor]) -> float:
    """Return the L2 norm of a parameter list (one global norm, not per tensor)."""
    norms = [torch.linalg.vector_norm(x, dtype=torch.float32).double() for x in a]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def cosine(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """Return the cosine between two parameter lists; 0 when either is the zero vector."""
    size = norm(a) * norm(b)
    return dot(a, b) / size if size > 0 else 0.0


def same_keys(left: Mapping[str, object], right: Mapping[str, object]) -> list[str]:
    """Return the names that are in one mapping only, sorted; empty when the key sets match."""
    return sorted(set(left) ^ set(right))
