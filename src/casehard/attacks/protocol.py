"""What an attack is: an object with a name and a configuration that turns a model into an attacked one, in memory.

An attack never writes weights. It gets rows by role and a way to measure, and gives back everything that was measured
together with the attacked model, whose ``may_leave`` is False.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import nn

from casehard.data.chat import ChatFormat
from casehard.model.model import Model
from casehard.train.tune import Measure, Rows
from casehard.types import Budget, Example


class Ask(Protocol):
    """Asks a model the prompts of the suite in a way of the attacker's own; one row per prompt."""

    def __call__(
        self,
        net: nn.Module,
        *,
        roles: Collection[str] | None = None,
        system: str | None = None,
        prefix: Callable[[ChatFormat, Example], Sequence[int]] | None = None,
    ) -> Rows:
        """Ask, with what ``casehard.evaluation.suite.evaluate`` is given; no system message: that of the run."""
        ...


def ask_nothing(net: nn.Module, **how: Any) -> Rows:
    """Ask no prompt: for an attack of which nothing is measured on the way."""
    return []


@dataclass(frozen=True, kw_only=True)
class AttackInputs:
    """What an attack is given besides the model."""

    rows: Mapping[str, Sequence[Example]]
    """Rows by data role, those that its spec needs and takes."""
    measure: Measure
    """Called as ``measure(model, step)`` at the moments of ``checkpoints``; returns one row per prompt."""
    ask: Ask = ask_nothing
    """For attacks that change how a model is asked."""
    seed: int = 0
    system: str | None = None
    """System message of every row; None keeps the template's own."""
    max_length: int | None = None
    """Longest row in tokens; None = the model's context."""
    method: Any = None
    """Defence inside the training run: this is then a customer's job at a provider who defends."""
    assets: str = ""
    """Folder of assets of the provider whose job this is, for an attacker who knows it; empty where there is none."""
    label: str = "attack"
    """Name on the progress bar."""


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What an attack did and what was measured."""

    model: Model
    """The attacked model, in memory."""
    rows: Rows
    """Everything ``measure`` returned, each row with its ``step``."""
    budget: Budget
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: how many rows of which kind, what was planted. ``variants``: what was tried, a list of flat records
    with the same keys, of which the command line prints a table."""
    log: list[dict[str, Any]] = field(default_factory=list)


@runtime_checkable
class Attack(Protocol):
    """An attack, built from its configuration alone.

    One that trains on a mixture may offer ``mixture(model, inputs) -> rows``: a method can then run inside its
    training. One that changes rows may offer ``poisoned(rows, seed=) -> (rows, manifest)`` and ``untouched(rows,
    manifest) -> rows``: a pipeline can then train on them in its place, and the rows it left alone can be verified. One
    that can tell without a model that its rows are too few may offer ``check_rows(rows)``. One
    whose attacker asks in words of its own may offer ``asks(prompts) -> prompts``: it is measured on what that returns.
    """

    name: str
    config: Any

    @property
    def checkpoints(self) -> Sequence[int]:
        """Return the steps at which the attacked model is measured, ascending; (0,) where nothing is trained."""
        ...

    def run(self, model: Model, inputs: AttackInputs) -> Attacked:
        """Attack a copy of ``model``, which is left as it is.

        Raises:
            DataError: too few rows.
            Diverged: a loss stopped being finite.
        """
        ...
