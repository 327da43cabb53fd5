"""Train a model, or a copy of it, and measure it on the way: what every step that changes weights has in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from casehard.config import digest, to_dict
from casehard.data.batches import EncodedSet
from casehard.data.chat import ChatFormat
from casehard.errors import ConfigError
from casehard.limits import Factor, Fraction, Limited, Rank
from casehard.model.adapters import add_lora
from casehard.model.model import Model
from casehard.seeds import derive
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from casehard.types import Budget

Rows = list[dict[str, Any]]
Measure = Callable[[nn.Module, int], Rows]
"""Measures a model after so many steps, in memory; one row per prompt."""


@dataclass(frozen=True, kw_only=True)
class Lora(Limited):
    """A LoRA adapter to train instead of all weights."""

    rank: Rank = 8
    """r, columns of the factor B."""
    alpha: Factor = 16.0
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout of the adapter's input, in [0, 1)."""
    target: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers that get one: every linear layer but the output head, or names of modules."""

    def wrap(self, net: nn.Module, *, seed: int) -> nn.Module:
        """Return the model with an adapter on it; the base is frozen in place."""
        target = self.target if isinstance(self.target, str) else list(self.target)
        return add_lora(net, self.rank, self.alpha, target, self.dropout, seed=seed)


@dataclass(frozen=True)
class Tuned:
    """What a training run gave."""

    net: nn.Module
    rows: Rows
    """Everything ``measure`` returned, each row with its ``step``."""
    budget: Budget
    log: list[dict[str, Any]] = field(default_factory=list)


def chat_format(model: Model, *, system: str | None = None, max_length: int | None = None) -> ChatFormat:
    """Return how rows become tokens of this model.

    Args:
        system: system message of every row, None for the template's default.
        max_length: longest row in tokens, None for the model's context.
    """
    if max_length is not None and max_length < 1:
        raise ConfigError(f"max_length is {max_length}", hint="at least 1 token; leave it out for the model's context")
    config: Any = model.net.config
    limit = max_length or getattr(config, "max_position_embeddings", None)
    return ChatFormat(model.tokenizer, system=system, max_length=limit)


def tune(
    model: Model,
    rows: EncodedSet,
    *,
    train: TrainConfig,
    seed: int,
    purpose: str,
    method: Any = None,
    lora: Lora | None = None,
    measure: Measure | None = None,
    at: Collection[int] = (),
    in_place: bool = False,
    out: Path | None = None,
    identity: Mapping[str, str] | None = None,
    label: str = "",
) -> Tuned:
    """Train ``model`` on ``rows``.

    Args:
        model: left as it is, unless ``in_place``.
        rows: token rows.
        train: the recipe.
        seed: of data order, dropout, the adapter, and whatever the method draws.
        purpose: what the run is, "attack" or "customer": adapters of different purposes start apart.
        method: an object with seams of ``casehard.train.protocol``, or None. One with a ``finish`` seam changes the
            model at the end, so that it is measured at 0 and after that only.
        lora: train this adapter instead of all weights.
        measure: called at the steps ``at``.
        at: steps to measure at; 0 is before the training, ``train.steps`` after it.
        in_place: train the very weights, and save the copy.
        out: folder for checkpoints, which an interrupted run continues from; None writes nothing.
        identity: what else must be the same when a run continues.

    Raises:
        Diverged, Interrupted: the loss stopped being finite; the run was asked to stop.
    """
    start: nn.Module = model.net if in_place else copy.deepcopy(model.net)
    net = start if lora is None else lora.wrap(start, seed=derive(seed, 0, f"{purpose}-lora"))
    measured: Rows = []
    wanted = {*at} & {0, train.steps} if callable(getattr(method, "finish", None)) else {*at}

    def look(current: nn.Module, step: int) -> None:
        if measure is not None and step in wanted:
            measured.extend({**row, "step": step} for row in measure(current, step))

    look(net, 0)
    done = fit(
        net,
        model.tokenizer,
        rows,
        config=train,
        method=method,
        seed=seed,
        out=out,
        on_step=_but_last(look, train.steps) if measure is not None else None,
        identity={**(identity or {}), **({"lora": digest(to_dict(lora))} if lora is not None else {})},
        label=label or purpose,
    )
    look(done.model, train.steps)  # after the method's finish
    return Tuned(done.model, measured, done.budget, done.log)


def _but_last(look: Callable[[nn.Module, int], None], last: int) -> Callable[[nn.Module, int], None]:
    """Return ``look`` for the steps before the last, whose model a method may still change."""
    return lambda net, step: look(net, step) if step < last else None
