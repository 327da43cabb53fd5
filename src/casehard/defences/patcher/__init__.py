"""Patcher: equations (``method``), the sequential algorithm (``in_turn``) and other schedules (``scheduled``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casehard.defences.patcher.method import PRESETS, Patcher, PatcherConfig

__all__ = ["PRESETS", "Patcher", "PatcherConfig"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is used first: an attacker's process starts here too, and must not wait for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    from casehard.defences.patcher import method

    return getattr(method, name)
