"""What is asked of an attacker, what comes back, and the attack vectors in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.distributed.fsdp import local_weights, rank_info
from casehard.distributed.ranks import norm_and_cosine
from casehard.maths.bilevel import AttackVector, Params
from casehard.seeds import generator
from casehard.train.protocol import StateValue


class AttackRequest(NamedTuple):
    """Attack the weights of ``source_step``."""

    attacker: int
    """Position in the list of attackers."""
    number: int
    """Seeds the attack together with the attacker; the round in schedules with rounds."""
    source_step: int


@dataclass(frozen=True)
class AttackResult:
    """A finished attack."""

    request: AttackRequest
    delta: Params
    """Attacked minus source weights, subtracted in the master dtype and cast last."""
    steps: int
    """k1 of this attack."""
    losses: list[float]
    """First and last loss of the attack, nats a token; empty for an attack of 0 steps."""
    tokens: int
    seconds: float = field(default=0.0, compare=False)


class AttackVectorPool:
    """One vector for each attacker, None before its first; they live in memory only.

    Args:
        count: number of attackers.
        seed: of the run; seeds the choice among several vectors.
        log: telemetry.
    """

    def __init__(self, count: int, *, seed: int, log: Callable[[Mapping[str, float]], None] = lambda _: None) -> None:
        self.vectors: list[AttackVector | None] = [None] * count
        self.seed, self.log = seed, log
        self.used = False
        """Whether any vector has been in use, in this process or before a resume."""
        self.passes = 0
        """Forward-backward passes of all attacks whose vectors came into use."""
        self.oldest = 0
        """Largest age of all vectors used, before a resume too."""
        self._ages: list[int] = []

    def draw(self, step: int) -> Params | None:
        """Return the delta of this step, one of the pool at random; None before the first."""
        vector = self.choose(step)
        if vector is None:
            return None
        self._ages.append(step - vector.source_step)
        self.oldest = max(self.oldest, self._ages[-1])
        return vector.delta

    def choose(self, step: int) -> AttackVector | None:
        """Return the vector that a step uses, a function of seed and step."""
        there = [vector for vector in self.vectors if vector is not None]
        if len(there) > 1:
            return there[int(torch.randint(len(there), (), generator=generator(self.seed, step, "patcher-pool")))]
        return there[0] if there else None

    def put(self, model: nn.Module, results: Sequence[AttackResult], *, again: bool = False) -> None:
        """Take vectors into use.

        Args:
            again: they were in use before a resume, counted and logged.
        """
        previous, place = list(self.vectors), rank_info(model)
        if not again:
            self.passes += sum(result.steps for result in results)
            self.log({"tokens": sum(result.tokens for result in results)})
        for result in results:
            i, old = result.request.attacker, previous[result.request.attacker]
            for name, p in local_weights(model).items():
                result.delta[name] = result.delta[name].to(p.device)
            names = list(result.delta)
            before = None if old is None else [old.delta[name] for name in names]
            size, cosine = norm_and_cosine([result.delta[name] for name in names], before, place)
            self.vectors[i] = AttackVector(result.delta, result.request.source_step, result.steps, size)
            self.used = True
            if not again:
                self._log(result, size, cosine)

    def _log(self, result: AttackResult, size: float, cosine: float | None) -> None:
        tag = "" if len(self.vectors) == 1 else f"_{result.request.attacker}"
        values = {f"attack_norm{tag}": size, f"attack_steps{tag}": float(result.steps)}
        if result.losses:
            values |= {f"attack_loss_first{tag}": result.losses[0], f"attack_loss_last{tag}": result.losses[-1]}
        if cosine is not None:
            values[f"attack_cosine{tag}"] = cosine
        self.log(values)

    def ages(self) -> dict[str, float]:
        """Return mean and largest age of the vectors used since the last call, for the log."""
        ages, self._ages = self._ages, []
        return {"attack_age": sum(ages) / len(ages), "attack_age_max": float(max(ages))} if ages else {}

    def clear(self) -> None:
        """Drop every vector."""
        self.vectors = [None] * len(self.vectors)

    def state(self) -> dict[str, StateValue]:
        """Return numbers; never a vector."""
        return {"passes": self.passes, "used": self.used, "ages": list(self._ages), "oldest": self.oldest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a saved state; whoever fills the pool makes the vectors again."""
        self.passes, self.used = int(state["passes"]), bool(state["used"])
        self._ages, self.oldest = list(state["ages"]), int(state["oldest"])
