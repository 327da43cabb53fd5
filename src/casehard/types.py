"""The nouns of the library: frozen, plain, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Role
    content: str
    extra: Mapping[str, Any] | None = field(default=None, hash=False)
    """What a tool call and its result carry besides: ``tool_calls``; ``tool_call_id``, ``name``."""


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation row: a chat whose last assistant turn, if any, is what is learned.

    ``tags`` holds every further key of the row (``kind``, ``group``, ``role``, ``source``, ``phrasing``, ``answer``
    ...), JSON values only.
    """

    messages: tuple[Message, ...]
    id: str = ""
    tags: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def pair(cls, prompt: str, response: str = "", *, id: str = "", **tags: Any) -> Example:
        """Build a one-turn example; an empty ``response`` makes a prompt without an answer."""
        turns = [Message("user", prompt)]
        if response:
            turns.append(Message("assistant", response))
        return cls(tuple(turns), id, tags)

    @property
    def prompt(self) -> str:
        """Text of the last user turn."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")

    @property
    def response(self) -> str:
        """Text of the final assistant turn, or the empty string."""
        last = self.messages[-1]
        return last.content if last.role == "assistant" else ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder with a manifest: what it is, what it was made from."""

    path: Path
    digest: str
    parent: str = ""
    method: str = ""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run really spent."""

    steps: int = 0
    """Optimiser updates applied to the model."""
    passes: int = 0
    """Forward-backward passes over a micro-batch, simulated attacks included."""
    tokens: int = 0
    """Input tokens seen, padding excluded."""
    seconds: float = 0.0
    """Wall time."""
    peak_bytes: int = 0
    """Peak resident memory of the process (CPU) or peak allocated (GPU)."""

    def __add__(self, other: Budget) -> Budget:
        """Return what two runs one after the other spent; memory is that of the larger."""
        keys = ("steps", "passes", "tokens", "seconds")
        sums: dict[str, Any] = {key: getattr(self, key) + getattr(other, key) for key in keys}
        return Budget(**sums, peak_bytes=max(self.peak_bytes, other.peak_bytes))


@dataclass(frozen=True, slots=True)
class Score:
    """A rate k/n with its 95 % interval, or a mean with a bootstrap interval when ``k`` is None."""

    metric: str
    n: int
    rate: float
    low: float
    high: float
    k: int | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
