"""What a step is: ``run(model) -> Outcome``, a frozen record of plain values that says all it depends on.

Step = (Model, inputs, seed) -> Outcome(model | None, rows, cost, facts, log)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from casehard.data.sources import load_many
from casehard.limits import Count, Length, Limited, Seed
from casehard.model.load import load
from casehard.model.model import Model
from casehard.types import Example

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What a step gave."""

    model: Model | None = None
    """The model it made; None where it only measures."""
    rows: Rows = field(default_factory=list)
    """One per prompt, and per ``step`` where a model was measured on the way."""
    cost: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON values worth keeping: counts, telemetry, what was selected."""
    log: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Inputs(Limited):
    """What every step reads, as plain values."""

    model: str = ""
    """Model folder or Hub id to start from; empty where the model is handed over in memory."""
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Data role -> files or other sources (``casehard.data.sources``)."""
    suite: str = ""
    """Evaluation suite; its prompts must not occur in any training row."""
    system: str | None = None
    """System message of every row; None keeps the template's own."""
    max_length: Length | None = None
    """Longest row in tokens; None = the model's context."""
    limit: Count | None = None
    """Measure at most this many prompts a group (a look, not a result)."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU when there is one."""
    seed: Seed = 0

    def start(self, model: Model | None) -> Model:
        """Return the model to start from: the one handed over, or the one that is named."""
        return model if model is not None else load(self.model, device=self.device)

    def examples(self, *, of: Sequence[str] = ()) -> dict[str, list[Example]]:
        """Load the rows of every role, or of the roles ``of``."""
        wanted = {role: specs for role, specs in self.rows.items() if specs and (not of or role in of)}
        return {role: load_many(specs, require_response=True) for role, specs in wanted.items()}


class Step(Protocol):
    """Anything that a chain can be made of."""

    seed: int

    def run(self, model: Model | None = None, *, out: Path | None = None, label: str = "") -> Outcome:
        """Do the work on a model handed over, or on the one the step names; an interrupted run in ``out`` goes on."""
        ...
