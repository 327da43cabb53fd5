"""The defender's end: orders go out and vectors come in on threads of their own, so that training need not wait."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from casehard import errors
from casehard.defend.attackers import Arrival, Order
from casehard.errors import Corrupt, Lost, UserError
from casehard.parallel.brief import Brief
from casehard.parallel.parts import Part, cut, put_together
from casehard.parallel.wire import Channel

POLL = 0.2
"""Seconds between two looks at whether a silent attacker still lives."""
PATIENCE = 300.0
"""Seconds without a sign of life in the middle of an attack after which an attacker counts as lost."""

Snapshot = Mapping[str, torch.Tensor]
Signs = Callable[[], tuple[str, str]]
"""Why an attacker's process ended ("" while it runs, or nobody can tell), and its last sign of life."""


class _Courier(threading.Thread):
    """Serves one attacker: connects to its processes, then sends an order and waits for its arrival, in turn."""

    def __init__(self, side: RemoteSide, attacker: int, connect: Callable[[], list[Channel]], brief: Brief) -> None:
        super().__init__(name=f"attacker-{attacker}", daemon=True)
        self.side, self.attacker, self._connect, self._brief = side, attacker, connect, brief
        self.orders: queue.SimpleQueue[tuple[Order, Snapshot, int] | None] = queue.SimpleQueue()
        self.channels: list[Channel] = []
        self.out = 0
        """Orders that no arrival has answered yet."""

    def run(self) -> None:
        try:
            self.channels = self._connect()
            header, tensors = self._brief.pack()
            for channel in self.channels:
                channel.send(header, tensors.items(), count=len(tensors))
            for channel in self.channels:
                channel.receive()  # it stands ready
            del header, tensors
            self.side._joined(self.attacker)
            while (job := self.orders.get()) is not None:
                self._carry(*job)
                del job
            for channel in self.channels:
                channel.send({"kind": "stop"})
        except UserError as error:
            self.side._failed(self.attacker, error)
        except Exception as error:  # whatever it is, the defender must hear of it
            self.side._failed(self.attacker, Lost(f"{type(error).__name__}: {error}"))

    def _carry(self, order: Order, snapshot: Snapshot, run: int) -> None:
        header = {"kind": "attack", "number": order.number, "source_step": order.source_step}
        sent, mine = 0, self.side.part
        for number, channel in enumerate(self.channels):
            pieces = cut(snapshot, self._brief.heights, mine, Part(number, len(self.channels)))
            sent += channel.send(header, pieces.items(), count=len(pieces))
        messages = [channel.receive() for channel in self.channels]
        top = messages[0].header
        if top["kind"] == "error":
            self.side._refused(order, top, run)
            return
        whence = f"attacker {order.attacker}"
        for message in messages:
            named = (message.header.get("number"), message.header.get("source_step"))
            if named != (order.number, order.source_step):
                raise Corrupt(f"{whence} answered order {named[0]} of step {named[1]}, not {order}")
        size = sum(message.size for message in messages)
        delta = put_together([message.tensors for message in messages], snapshot, whence)
        tokens = top["tokens"] if mine.number == 0 else 0  # of the whole attack: one process counts them
        arrival = Arrival(order, delta, top["steps"], top["losses"], tokens, top["seconds"])
        self.side._arrived(arrival, sent, size, run)


class RemoteSide:
    """Attackers in other processes, as ``defend.attackers.AttackSide``.

    Args:
        connect: for each attacker, makes the channels to its processes; called on its thread, may take its time.
        brief: what each attacker is told first.
        signs: for each attacker, signs of its life.
        dtype: of the weights on their way out; float32 makes attacks the same as in the defender's own process.
        patience: see :data:`PATIENCE`.
        part: what this process holds of every weight, when the defender is several (``parallel.agreed``).
    """

    def __init__(
        self,
        connect: Sequence[Callable[[], list[Channel]]],
        brief: Brief,
        *,
        signs: Sequence[Signs] = (),
        dtype: torch.dtype = torch.float32,
        patience: float = PATIENCE,
        part: Part = Part(),
    ) -> None:
        self.dtype, self.patience, self.part = dtype, patience, part
        self.processes: list[int] = []
        """Process ids of attackers that were started here."""
        self.bytes_out = self.bytes_in = 0
        """Payload of all orders and vectors so far."""
        self._signs = list(signs)
        self._heard: dict[int, tuple[str, float]] = {}
        self._changed = threading.Condition()
        self._inbox: list[Arrival] = []
        self._lost: dict[int, str] = {}
        self._there: set[int] = set()
        self._raised: UserError | None = None
        self._run = 0
        self._snapshot: tuple[int, Snapshot] = (-1, {})
        self._couriers = [_Courier(self, i, make, brief) for i, make in enumerate(connect)]
        for courier in self._couriers:
            courier.start()

    # -- what the defender calls -----------------------------------------------------------------------------

    def ready(self) -> None:
        """Return when every attacker has joined or is lost: starting up is no part of anybody's schedule."""
        with self._changed:
            while len(self._there | set(self._lost)) < len(self._couriers):
                self._changed.wait(POLL)
                self._look()

    def begin(self) -> None:
        """Start a run: what an earlier one ordered will be dropped when it arrives."""
        with self._changed:
            self._run += 1
            self._inbox, self._raised, self._snapshot = [], None, (-1, {})

    def submit(self, order: Order, source: Mapping[str, torch.Tensor], *, stable: bool) -> None:
        """Queue the attack on a copy of the weights on the host, shared by attackers ordered at the same step.

        Args:
            stable: nobody writes to ``source`` any more, so it need not be copied.
        """
        if order.attacker in self.lost():
            return  # nobody would ever take it from the queue
        if self._snapshot[0] != order.source_step:
            copy = {name: t.detach().to("cpu", self.dtype, copy=not stable) for name, t in source.items()}
            self._snapshot = (order.source_step, copy)
        with self._changed:
            self._couriers[order.attacker].out += 1
            self._heard.pop(order.attacker, None)
        self._couriers[order.attacker].orders.put((order, self._snapshot[1], self._run))

    def collect(self) -> list[Arrival]:
        """Return what arrived since the last call.

        Raises:
            Diverged: an attack did.
        """
        with self._changed:
            if self._raised is not None:
                raise self._raised
            done, self._inbox = self._inbox, []
        return done

    def wait(self) -> None:
        """Return as soon as something arrived or was lost, and after a moment in any case."""
        with self._changed:
            if not self._inbox and self._raised is None:
                self._changed.wait(POLL)
            self._look()

    def lost(self) -> dict[int, str]:
        """Return the attackers that are gone, with the reason."""
        with self._changed:
            self._look()
            return dict(self._lost)

    def idle(self) -> bool:
        """Return whether no living attacker has an order."""
        with self._changed:
            return not any(c.out for c in self._couriers if c.attacker not in self._lost)

    def close(self, timeout: float = 5.0) -> None:
        """Tell every attacker to stop; one in the middle of an attack is left to whoever started it."""
        self._snapshot = (-1, {})
        for courier in self._couriers:
            courier.orders.put(None)
        for courier in self._couriers:
            courier.join(timeout)

    # -- what the couriers call ------------------------------------------------------------------------------

    def _arrived(self, arrival: Arrival, sent: int, received: int, run: int) -> None:
        with self._changed:
            self._couriers[arrival.order.attacker].out -= 1
            if run == self._run:
                self.bytes_out, self.bytes_in = self.bytes_out + sent, self.bytes_in + received
                self._inbox.append(arrival)
                self._changed.notify_all()

    def _refused(self, order: Order, top: Mapping[str, str], run: int) -> None:
        with self._changed:
            self._couriers[order.attacker].out -= 1
            if run == self._run:
                kind = getattr(errors, top["error"], UserError)
                known = isinstance(kind, type) and issubclass(kind, UserError) and kind is not errors.MissingExtra
                self._raised = (kind if known else UserError)(
                    f"attacker {order.attacker}: {top['message']}", hint=top["hint"]
                )
                self._changed.notify_all()

    def _joined(self, attacker: int) -> None:
        with self._changed:
            self._there.add(attacker)
            self._changed.notify_all()

    def _failed(self, attacker: int, error: UserError) -> None:
        # A broken connection says little; why its process ended says more, and may be known in a moment.
        until = time.monotonic() + 1.0
        why = ""
        while attacker < len(self._signs) and not why and time.monotonic() < until:
            why = self._signs[attacker]()[0]
            time.sleep(0.0 if why else 0.05)
        with self._changed:
            self._lose(attacker, why or error.message)

    def _lose(self, attacker: int, reason: str) -> None:
        self._lost.setdefault(attacker, reason)
        orders = self._couriers[attacker].orders
        while not orders.empty():
            orders.get()  # the copies of the weights go with them
        self._changed.notify_all()

    def _look(self) -> None:
        for i, signs in enumerate(self._signs):
            if i in self._lost:
                continue
            ended, sign = signs()
            said, since = self._heard.get(i, ("", time.monotonic()))
            if sign != said or not self._couriers[i].out:
                since = time.monotonic()
            self._heard[i] = (sign, since)
            if ended:
                self._lose(i, ended)
            elif time.monotonic() - since > self.patience:
                self._lose(i, f"no sign of life for {self.patience:.0f} s")
