"""Harden language models against harmful fine-tuning and backdoors, and show the evidence.

Public names load lazily: ``import casehard`` costs milliseconds and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC: dict[str, str] = {
    "Message": "casehard.types",
    "Example": "casehard.types",
    "Checkpoint": "casehard.types",
    "Budget": "casehard.types",
    "Score": "casehard.types",
    "UserError": "casehard.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name the first time it is used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'casehard' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
