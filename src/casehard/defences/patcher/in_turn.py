"""The sequential algorithm of Patcher: attack, then train for k2 steps with the attack vector, in turn.

    for step t = 0, 1, 2, ...
        if t = k2, 2 k2, ...:   theta_att <- k1 optimiser steps on L_u from theta      SimulatedAttacks.run
                                delta     <- theta_att - theta                         (3), used for the next k2 steps
        one step on             alpha L_s(theta + delta) + (1 - alpha) L_s(theta)      method.py; delta = 0 while t < k2

Nothing else happens: no attack runs while the defender trains, none after the last round, and no vector is older than
k2 - 1 steps. Every other schedule (attackers in other processes, delayed vectors) is in ``scheduled.py``.
Source: Wen et al., arXiv 2606.07970, the sequential algorithm; docs/methods/patcher.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from casehard.data.batches import EncodedSet
from casehard.defences.patcher.layout import count_once, simulate
from casehard.defences.patcher.pool import AttackRequest, AttackResult, AttackVectorPool
from casehard.defences.patcher.snapshots import Snapshot, Snapshots
from casehard.distributed.fsdp import local_weights
from casehard.maths.bilevel import Attacker, Params, difference
from casehard.seeds import derive
from casehard.train.protocol import StateValue


@dataclass(frozen=True)
class SimulatedAttacks:
    """How the attacks of a run go: on which rows, with which settings and seeds."""

    rows: tuple[EncodedSet, ...]
    """L_u: one set for each attacker."""
    attackers: tuple[Attacker, ...]
    seed: int
    """Of the whole run."""
    dtype: torch.dtype
    """Of the vector."""

    def run(
        self,
        model: nn.Module,
        source: Mapping[str, torch.Tensor],
        request: AttackRequest,
        *,
        progress: Callable[[int], None] = lambda i: None,
    ) -> AttackResult:
        """Run one attack and return its delta (eq. 3 at age 0); a function of its arguments, whoever calls it.

        Args:
            source: the weights to attack, by name, fp32; ``model`` lends its architecture and is as before afterwards.
                Of a sharded model they are this rank's shards, and all its ranks make the same call.
        """
        began = time.perf_counter()
        attacker = self.attackers[request.attacker]
        seed = derive(self.seed, request.number, f"patcher-attack-{request.attacker}")
        k1 = attacker.length(seed)
        batch_at = self.rows[request.attacker].stream(attacker.batch_size, seed=seed, purpose="attack-batch")
        run = simulate(model, source, batch_at, attacker, seed=seed, steps=k1, progress=progress)  # maths.bilevel
        delta = difference(run.weights, source, dtype=self.dtype)
        ends = [run.losses[0], run.losses[-1]] if run.losses else []
        return AttackResult(request, delta, k1, ends, count_once(model, run.tokens), time.perf_counter() - began)


class AttackVectors(Protocol):
    """Where the delta of a step comes from: :class:`InTurn`, or ``scheduled.Scheduled``."""

    pool: AttackVectorPool

    def at(self, model: nn.Module, step: int) -> Params | None:
        """Return delta for update ``step`` + 1, None while there is none; called once before every step.

        Raises:
            Stopped: the run was asked to stop while this waited for an attacker.
            Lost: no attacker is left and the settings allow none of the vectors that are there.
        """

    def state(self) -> dict[str, StateValue]:
        """Return numbers and files of clean weights; never an attack vector."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a saved state; attacks are repeated at the next step, with the running model."""

    def clear(self) -> None:
        """Drop every vector."""


class InTurn:
    """Attack every k2 steps in this process, which trains on when the attack is done."""

    def __init__(
        self, attacks: SimulatedAttacks, pool: AttackVectorPool, snapshots: Snapshots, *, round_steps: int
    ) -> None:
        self.attacks, self.pool, self.snapshots, self.round_steps = attacks, pool, snapshots, round_steps
        self._source_step = 0
        self._source: Snapshot = {}
        """The weights that the vectors in use started from: a file where the run keeps checkpoints, else nothing."""
        self._resumed = False

    def at(self, model: nn.Module, step: int) -> Params | None:
        """Return delta for update ``step`` + 1, from an attack on the weights of this moment if a round begins."""
        if self._resumed:
            self._attack_again(model)
        if step > 0 and step % self.round_steps == 0:
            source = self.snapshots.take(f"source-{step}", model, in_memory=False)
            self.pool.put(model, self._attack(model, local_weights(model), step))
            self.snapshots.discard(self._source)
            self._source_step, self._source = step, source
        return self.pool.draw(step)

    def _attack(self, model: nn.Module, theta: Mapping[str, torch.Tensor], step: int) -> list[AttackResult]:
        """Return A_k1(theta) - theta of every attacker."""
        requests = [AttackRequest(i, step // self.round_steps, step) for i in range(len(self.attacks.attackers))]
        return [self.attacks.run(model, theta, request) for request in requests]

    def _attack_again(self, model: nn.Module) -> None:
        self._resumed = False
        if isinstance(self._source, Path):
            self._source = self.snapshots.link(self._source)
            theta = self.snapshots.tensors(self._source, model)
            self.pool.put(model, self._attack(model, theta, self._source_step), again=True)

    def state(self) -> dict[str, StateValue]:
        """Return numbers and the file of the clean weights that the attack in use started from."""
        files: dict[str, StateValue] = {"source": self._source} if isinstance(self._source, Path) else {}
        return {**self.pool.state(), "source_step": self._source_step, **files}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a saved state; the attack is repeated at the next step, with the running model."""
        self.pool.restore(state)
        self._source_step, self._source, self._resumed = int(state["source_step"]), state.get("source", {}), True

    def clear(self) -> None:
        """Drop every vector."""
        self.pool.clear()
