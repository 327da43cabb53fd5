"""The defender's end: orders go out and vectors come in on threads of their own, so that training need not wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from casehard import errors
from casehard.defend.attackers import Arrival, Order
from casehard.errors import Lost, UserError
from casehard.parallel.wire import Channel, Message

POLL = 0.2
"""Seconds between two looks at whether a silent attacker's process still runs."""

Snapshot = dict[str, torch.Tensor]


class _Courier(threading.Thread):
    """Serves one attacker: connects, then sends an order and waits for its arrival, in turn."""

    def __init__(self, side: RemoteSide, attacker: int, connect: Callable[[], Channel]) -> None:
        super().__init__(name=f"attacker-{attacker}", daemon=True)
        self.side, self.attacker, self._connect = side, attacker, connect
        self.orders: queue.SimpleQueue[tuple[Order, Snapshot] | None] = queue.SimpleQueue()
        self.channel: Channel | None = None

    def run(self) -> None:
        try:
            self.channel = self._connect()
            self.side._joined(self.attacker)
            while (job := self.orders.get()) is not None:
                order, snapshot = job
                header = {"kind": "attack", "number": order.number, "source_step": order.source_step}
                sent = self.channel.send(header, snapshot.items(), count=len(snapshot))
                del job, snapshot
                message = self.channel.receive()
                self.side._arrived(order, message, sent)
            self.channel.send({"kind": "stop"})
        except UserError as error:
            self.side._failed(self.attacker, error)
        except Exception as error:  # whatever it is, the defender must hear of it
            self.side._failed(self.attacker, Lost(f"{type(error).__name__}: {error}"))


class RemoteSide:
    """Attackers in other processes, as ``defend.attackers.AttackSide``.

    Args:
        connect: for each attacker, makes the channel to it; called on its thread, may take its time.
        running: for each attacker, returns why its process ended, or "" while it runs (or nobody can tell).
        dtype: of the weights on their way out; float32 makes attacks the same as in the defender's own process.
    """

    def __init__(
        self,
        connect: Sequence[Callable[[], Channel]],
        *,
        running: Sequence[Callable[[], str]] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        self.bytes_out = self.bytes_in = 0
        """Payload of all messages so far."""
        self._running = list(running)
        self._changed = threading.Condition()
        self._inbox: list[Arrival] = []
        self._lost: dict[int, str] = {}
        self._there: set[int] = set()
        self._raised: UserError | None = None
        self._snapshot: tuple[int, Snapshot] = (-1, {})
        self._couriers = [_Courier(self, i, make) for i, make in enumerate(connect)]
        for courier in self._couriers:
            courier.start()

    # -- what the defender calls -----------------------------------------------------------------------------

    def ready(self) -> None:
        """Return when every attacker has joined or is lost: starting up is no part of anybody's schedule."""
        with self._changed:
            while len(self._there | set(self._lost)) < len(self._couriers):
                self._changed.wait(POLL)
                self._look()

    def submit(self, order: Order, source: Mapping[str, torch.Tensor], *, stable: bool) -> None:
        """Queue the attack on a copy of the weights on the host, shared by attackers ordered at the same step.

        Args:
            stable: nobody writes to ``source`` any more, so it need not be copied.
        """
        if self._snapshot[0] != order.source_step:
            copy = {name: t.detach().to("cpu", self.dtype, copy=not stable) for name, t in source.items()}
            self._snapshot = (order.source_step, copy)
        self._couriers[order.attacker].orders.put((order, self._snapshot[1]))

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
        """Return when something arrived or an attacker was lost; looks at silent attackers' processes meanwhile."""
        with self._changed:
            known = len(self._lost)
            while not self._inbox and self._raised is None and len(self._lost) == known:
                self._changed.wait(POLL)
                self._look()

    def lost(self) -> dict[int, str]:
        """Return the attackers that are gone, with the reason."""
        with self._changed:
            self._look()
            return dict(self._lost)

    def close(self, timeout: float = 5.0) -> None:
        """Tell every attacker to stop; one in the middle of an attack is left to whoever started it."""
        self._snapshot = (-1, {})
        for courier in self._couriers:
            courier.orders.put(None)
        for courier in self._couriers:
            courier.join(timeout)

    # -- what the couriers call ------------------------------------------------------------------------------

    def _arrived(self, order: Order, message: Message, sent: int) -> None:
        top = message.header
        if top["kind"] == "error":
            kind = getattr(errors, top["error"], UserError)
            known = isinstance(kind, type) and issubclass(kind, UserError) and kind is not errors.MissingExtra
            error = (kind if known else UserError)(f"attacker {order.attacker}: {top['message']}", hint=top["hint"])
            with self._changed:
                self._raised = error
                self._changed.notify_all()
            return
        if (top["number"], top["source_step"]) != (order.number, order.source_step):
            raise errors.Corrupt(f"attacker {order.attacker} answered order {top['number']}, not {order.number}")
        arrival = Arrival(order, message.tensors, top["steps"], top["losses"], top["tokens"], top["seconds"])
        with self._changed:
            self.bytes_out, self.bytes_in = self.bytes_out + sent, self.bytes_in + message.size
            self._inbox.append(arrival)
            self._changed.notify_all()

    def _joined(self, attacker: int) -> None:
        with self._changed:
            self._there.add(attacker)
            self._changed.notify_all()

    def _failed(self, attacker: int, error: UserError) -> None:
        with self._changed:
            self._lost.setdefault(attacker, error.message)
            self._changed.notify_all()

    def _look(self) -> None:
        for i, ended in enumerate(self._running):
            if i not in self._lost and (why := ended()):
                self._lost[i] = why
