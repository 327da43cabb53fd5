"""Who carries out simulated attacks: this process, or others beside it.

A side is given orders (attack these weights) and hands back arrivals (the vectors). It knows nothing about when either
happens; that is ``timetable``'s. :class:`LocalSide` attacks at once, in this process, and is the twin that every remote
side is held against.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from casehard.data.batches import EncodedSet
from casehard.maths.bilevel import Attacker, AttackRun, Params, difference, simulate_attack
from casehard.maths.sharded import installed, is_sharded, masters, seat, simulate_attack_sharded
from casehard.seeds import derive, generator


class Order(NamedTuple):
    """Attack the weights of ``source_step``."""

    attacker: int
    """Position in the list of attackers."""
    number: int
    """Seeds the attack together with the attacker; the round in schedules with rounds."""
    source_step: int


@dataclass(frozen=True)
class Arrival:
    """A finished attack."""

    order: Order
    delta: Params
    """Attacked minus source weights, subtracted in the master dtype and cast last."""
    steps: int
    """k1 of this attack."""
    losses: list[float]
    """First and last loss of the attack, nats a token; empty for an attack of 0 steps."""
    tokens: int
    seconds: float = field(default=0.0, compare=False)


class AttackSide(Protocol):
    """Where orders go. Arrivals of one attacker come in the order of its orders."""

    def begin(self) -> None:
        """Start a run; nothing an earlier one ordered will be handed out."""

    def submit(self, order: Order, source: Mapping[str, torch.Tensor], *, stable: bool) -> None:
        """Queue an attack on ``source``; unless that is ``stable``, it is read before this returns."""

    def collect(self) -> list[Arrival]:
        """Return what finished since the last call, without waiting; raise what an attack raised."""

    def wait(self) -> None:
        """Return when there may be something to collect, and after a moment in any case."""

    def lost(self) -> dict[int, str]:
        """Return the attackers that are gone, with the reason."""


def carry_out(
    model: nn.Module,
    source: Mapping[str, torch.Tensor],
    rows: EncodedSet,
    attacker: Attacker,
    order: Order,
    *,
    seed: int,
    dtype: torch.dtype,
    progress: Callable[[int], None] = lambda i: None,
) -> Arrival:
    """Run one attack; a function of its arguments alone, whoever calls it.

    Args:
        source: the weights to attack, by name, fp32; ``model`` lends its architecture and is as before afterwards. Of a
            sharded model they are this rank's shards, and all its ranks make the same call.
        seed: of the whole run.
        dtype: of the vector.
    """
    began = time.perf_counter()
    seed = derive(seed, order.number, f"patcher-attack-{order.attacker}")
    steps = attacker.steps
    if attacker.steps_min is not None:
        low = attacker.steps_min
        steps = low + int(torch.randint(steps - low + 1, (), generator=generator(seed, 0, "length")))
    batch_at = rows.stream(attacker.batch_size, seed=seed, purpose="attack-batch")
    attack = _attack_shards if (split := is_sharded(model)) else simulate_attack
    run = attack(model, source, batch_at, attacker, seed=seed, steps=steps, progress=progress)
    delta = difference(run.weights, source, dtype=dtype)
    ends = [run.losses[0], run.losses[-1]] if run.losses else []
    tokens = 0 if split and seat(model).number else run.tokens  # the ranks share them out
    return Arrival(order, delta, steps, ends, tokens, time.perf_counter() - began)


def _attack_shards(
    model: nn.Module,
    source: Mapping[str, torch.Tensor],
    batch_at: Callable[[int], Mapping[str, torch.Tensor]],
    attacker: Attacker,
    **how: Any,
) -> AttackRun:
    """Attack the shards where they lie; ``source`` is put there first where it is not what is there already."""
    there = masters(model)
    if all(source[name].data_ptr() == p.data_ptr() for name, p in there.items()):
        return simulate_attack_sharded(model, batch_at, attacker, **how)
    with installed(model, source):
        return simulate_attack_sharded(model, batch_at, attacker, **how)


class LocalSide:
    """Attack in this process, at once; the defender stands still meanwhile."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[EncodedSet],
        attackers: Sequence[Attacker],
        *,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.rows, self.attackers = model, rows, attackers
        self.seed, self.dtype = seed, dtype
        self._done: list[Arrival] = []

    def begin(self) -> None:
        """Start a run."""
        self._done.clear()

    def submit(self, order: Order, source: Mapping[str, torch.Tensor], *, stable: bool) -> None:
        """Carry the order out; the arrival can be collected afterwards."""
        rows, attacker = self.rows[order.attacker], self.attackers[order.attacker]
        self._done.append(carry_out(self.model, source, rows, attacker, order, seed=self.seed, dtype=self.dtype))

    def collect(self) -> list[Arrival]:
        """Return the arrivals since the last call."""
        done, self._done = self._done, []
        return done

    def wait(self) -> None:
        """Return: nothing is ever under way here."""

    def lost(self) -> dict[int, str]:
        """Return nothing: this process is here."""
        return {}
