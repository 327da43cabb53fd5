"""One defender of several processes: all of them see the same vectors, and the same losses, at the same step.

A vector reaches each process by itself, at its own moment. If each adopted it then, the processes would train on
different weights, and wait for each other in different places. So :meth:`ConsensusBackend.collect` takes the minimum of
a few numbers over the processes, and returns what *all* of them have; an attacker that one of them lost is lost to all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from casehard.defences.patcher.pool import AttackRequest, AttackResult
from casehard.defences.patcher.workers.remote import RemoteBackend
from casehard.defences.patcher.workers.transport import dist
from casehard.distributed.ranks import RankInfo, why
from casehard.errors import Lost, UserError


class ConsensusBackend:
    """A process's :class:`RemoteBackend`, whose results are those that all processes have; an ``AttackBackend``.

    Args:
        local: this process's own backend.
        group: process group (``transport.group``) of the defender's processes, used for nothing else.
        count: number of attackers.
    """

    def __init__(self, local: RemoteBackend, group: Any, count: int) -> None:
        self.local, self._group, self._count = local, group, count
        self._gone: dict[int, str] = {}
        self.begin()

    @property
    def place(self) -> RankInfo:
        """The part of every weight that is in this process."""
        return self.local.place

    def begin(self) -> None:
        """Start a run; every process of the defender does."""
        self.local.begin()
        self._waiting: list[deque[AttackResult]] = [deque() for _ in range(self._count)]
        self._given = [0] * self._count
        self._error: UserError | None = None

    def submit(self, request: AttackRequest, source: Mapping[str, torch.Tensor], *, stable: bool) -> None:
        """Queue the attack on this process's part of the weights."""
        if request.attacker not in self._gone:
            self.local.submit(request, source, stable=stable)

    def collect(self) -> list[AttackResult]:
        """Return what has reached every process since the last call; all of them call this alike.

        Raises:
            Diverged: an attack did.
            Lost: another process of the defender is gone.
        """
        try:
            for result in self.local.collect():
                if result.request.attacker not in self._gone:
                    self._waiting[result.request.attacker].append(result)
        except UserError as error:
            self._error = error
        lost = self.local.lost()
        mine = [given + len(waiting) for given, waiting in zip(self._given, self._waiting, strict=True)]
        alive = [int(i not in lost) for i in range(self._count)]
        agreed = self._least([*mine, *alive, int(self._error is not None)])
        if agreed[-1]:
            assert self._error is not None
            raise self._error
        for i in range(self._count):
            if not agreed[self._count + i] and i not in self._gone:
                self._gone[i] = lost.get(i, "another process of the defender lost it")
        done = []
        for i, waiting in enumerate(self._waiting):
            while self._given[i] < agreed[i]:
                self._given[i] += 1
                done.append(waiting.popleft())
            if i in self._gone:
                waiting.clear()  # the others will never have it
        return done

    def wait(self) -> None:
        """Return when something arrived here, and after a moment in any case."""
        if not any(self._waiting):  # else the others are what is waited for, and collect() does that
            self.local.wait()

    def lost(self) -> dict[int, str]:
        """Return the attackers that any process had lost at the last :meth:`collect`."""
        return dict(self._gone)

    def _least(self, numbers: list[int]) -> list[int]:
        values, options = torch.tensor(numbers, dtype=torch.int64), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        try:
            self._group.allreduce([values], options).wait()
        except RuntimeError as error:
            raise Lost(f"another process of the defender is gone: {why(error)}") from None
        return values.tolist()
