"""Who carries out simulated attacks: this process, or other processes (``workers``).

A backend takes requests (attack these weights) and hands back results (the vectors). It knows nothing about when either
happens; that is ``schedule``'s. :class:`InProcessBackend` attacks at once, in this process; every other backend must
give the same results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from casehard.defences.patcher.in_turn import SimulatedAttacks
from casehard.defences.patcher.pool import AttackRequest, AttackResult
from casehard.distributed.ranks import RankInfo


class AttackBackend(Protocol):
    """Where requests go. Results of one attacker come in the order of its requests."""

    @property
    def place(self) -> RankInfo:
        """Which part of every weight this process of the defender passes on."""

    def begin(self) -> None:
        """Start a run; nothing an earlier one requested will be handed out."""

    def submit(self, request: AttackRequest, source: Mapping[str, torch.Tensor], *, stable: bool) -> None:
        """Queue an attack on ``source``; unless that is ``stable``, it is read before this returns."""

    def collect(self) -> list[AttackResult]:
        """Return what finished since the last call, without waiting; raise what an attack raised."""

    def wait(self) -> None:
        """Return when there may be something to collect, and after a moment in any case."""

    def lost(self) -> dict[int, str]:
        """Return the attackers that are gone, with the reason."""


class InProcessBackend:
    """Attack in this process, at once; the defender does not train meanwhile."""

    place = RankInfo()

    def __init__(self, attacks: SimulatedAttacks, model: nn.Module) -> None:
        self.attacks, self.model = attacks, model
        self._done: list[AttackResult] = []

    def begin(self) -> None:
        """Start a run."""
        self._done.clear()

    def submit(self, request: AttackRequest, source: Mapping[str, torch.Tensor], *, stable: bool) -> None:
        """Carry the request out; the result can be collected afterwards."""
        self._done.append(self.attacks.run(self.model, source, request))

    def collect(self) -> list[AttackResult]:
        """Return the results since the last call."""
        done, self._done = self._done, []
        return done

    def wait(self) -> None:
        """Return: nothing is ever under way here."""

    def lost(self) -> dict[int, str]:
        """Return nothing: this process is here."""
        return {}
