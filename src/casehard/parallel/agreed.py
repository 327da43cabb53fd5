"""One defender of several processes: all of them see the same vectors, and the same losses, at the same step.

A vector reaches each process by itself, at its own moment. Were it adopted then, the processes would train on different
weights, and wait for each other in different places. So each look at what arrived (:meth:`AgreedSide.collect`) takes
the minimum of a few numbers over the processes, and gives what *all* of them have; an attacker that one of them lost is
lost to all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from casehard.defend.attackers import Arrival, Order
from casehard.errors import Lost, UserError
from casehard.maths.collective import why
from casehard.parallel.parts import Part
from casehard.parallel.remote import RemoteSide
from casehard.parallel.wire import dist


class AgreedSide:
    """A process's :class:`RemoteSide` behind an agreement with the same of the others; as ``AttackSide``.

    Args:
        side: this process's own.
        group: process group (``parallel.wire.group``) of the defender's processes, used for nothing else.
        count: number of attackers.
    """

    def __init__(self, side: RemoteSide, group: Any, count: int) -> None:
        self.local, self._group, self._count = side, group, count
        self._gone: dict[int, str] = {}
        self.begin()

    @property
    def part(self) -> Part:
        """The part of every weight this process holds."""
        return self.local.part

    def begin(self) -> None:
        """Start a run; every process of the defender does."""
        self.local.begin()
        self._held: list[deque[Arrival]] = [deque() for _ in range(self._count)]
        self._given = [0] * self._count
        self._error: UserError | None = None

    def submit(self, order: Order, source: Mapping[str, torch.Tensor], *, stable: bool) -> None:
        """Queue the attack on this process's part of the weights."""
        if order.attacker not in self._gone:
            self.local.submit(order, source, stable=stable)

    def collect(self) -> list[Arrival]:
        """Return what has reached every process since the last call; all of them call this alike.

        Raises:
            Diverged: an attack did.
            Lost: another process of the defender is gone.
        """
        try:
            for arrival in self.local.collect():
                if arrival.order.attacker not in self._gone:
                    self._held[arrival.order.attacker].append(arrival)
        except UserError as error:
            self._error = error
        lost = self.local.lost()
        mine = [given + len(held) for given, held in zip(self._given, self._held, strict=True)]
        alive = [int(i not in lost) for i in range(self._count)]
        agreed = self._least([*mine, *alive, int(self._error is not None)])
        if agreed[-1]:
            assert self._error is not None
            raise self._error
        for i in range(self._count):
            if not agreed[self._count + i] and i not in self._gone:
                self._gone[i] = lost.get(i, "another process of the defender lost it")
        done = []
        for i, held in enumerate(self._held):
            while self._given[i] < agreed[i]:
                self._given[i] += 1
                done.append(held.popleft())
            if i in self._gone:
                held.clear()  # the others will never have it
        return done

    def wait(self) -> None:
        """Return when something arrived here, and after a moment in any case."""
        if not any(self._held):  # else the others are what is waited for, and collect() does that
            self.local.wait()

    def lost(self) -> dict[int, str]:
        """Return the attackers that any process had lost at the last :meth:`collect`."""
        return dict(self._gone)

    def _least(self, numbers: list[int]) -> list[int]:
        held, options = torch.tensor(numbers, dtype=torch.int64), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        try:
            self._group.allreduce([held], options).wait()
        except RuntimeError as error:
            raise Lost(f"another process of the defender is gone: {why(error)}") from None
        return held.tolist()
