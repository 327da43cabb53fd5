"""The defender's end: requests go out and vectors come in on threads of their own, so that training need not wait."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from casehard import errors
from casehard.defences.patcher.pool import AttackRequest, AttackResult
from casehard.defences.patcher.workers.resharding import join_rows, rows_for
from casehard.defences.patcher.workers.spec import AttackerSpec
from casehard.defences.patcher.workers.transport import Channel
from casehard.distributed.ranks import RankInfo
from casehard.errors import Corrupt, Lost, UserError

POLL = 0.2
"""Seconds between two looks at whether a silent attacker still lives."""
PATIENCE = 300.0
"""Seconds without a sign of life in the middle of an attack after which an attacker counts as lost."""

Weights = Mapping[str, torch.Tensor]
Signs = Callable[[], tuple[str, str]]
"""Why an attacker's process ended ("" while it runs, or nobody can tell), and its last sign of life."""


class _Courier(threading.Thread):
    """Serves one attacker: connects to its processes, then sends a request and waits for its result, in turn."""

    def __init__(
        self, backend: RemoteBackend, attacker: int, connect: Callable[[], list[Channel]], spec: AttackerSpec
    ) -> None:
        super().__init__(name=f"attacker-{attacker}", daemon=True)
        self.backend, self.attacker, self._connect, self._spec = backend, attacker, connect, spec
        self.requests: queue.SimpleQueue[tuple[AttackRequest, Weights, int] | None] = queue.SimpleQueue()
        self.channels: list[Channel] = []
        self.out = 0
        """Requests that no result has answered yet."""

    def run(self) -> None:
        try:
            self.channels = self._connect()
            header, tensors = self._spec.pack()
            for channel in self.channels:
                channel.send(header, tensors.items(), count=len(tensors))
            for channel in self.channels:
                channel.receive()  # it is ready
            del header, tensors
            self.backend._joined(self.attacker)
            while (job := self.requests.get()) is not None:
                self._carry(*job)
                del job
            for channel in self.channels:
                channel.send({"kind": "stop"})
        except UserError as error:
            self.backend._failed(self.attacker, error)
        except Exception as error:  # whatever it is, the defender must hear of it
            self.backend._failed(self.attacker, Lost(f"{type(error).__name__}: {error}"))

    def _carry(self, request: AttackRequest, weights: Weights, run: int) -> None:
        header = {"kind": "attack", "number": request.number, "source_step": request.source_step}
        sent, mine = 0, self.backend.place
        for number, channel in enumerate(self.channels):
            pieces = rows_for(weights, self._spec.row_counts, mine, RankInfo(number, len(self.channels)))
            sent += channel.send(header, pieces.items(), count=len(pieces))
        messages = [channel.receive() for channel in self.channels]
        top = messages[0].header
        if top["kind"] == "error":
            self.backend._refused(request, top, run)
            return
        sender = f"attacker {request.attacker}"
        for message in messages:
            named = (message.header.get("number"), message.header.get("source_step"))
            if named != (request.number, request.source_step):
                raise Corrupt(f"{sender} answered request {named[0]} of step {named[1]}, not {request}")
        size = sum(message.size for message in messages)
        delta = join_rows([message.tensors for message in messages], weights, sender)
        tokens = top["tokens"] if mine.rank == 0 else 0  # of the whole attack: one process counts them
        result = AttackResult(request, delta, top["steps"], top["losses"], tokens, top["seconds"])
        self.backend._arrived(result, sent, size, run)


class RemoteBackend:
    """Attackers in other processes, an ``AttackBackend``.

    Args:
        connect: for each attacker, makes the channels to its processes; called on its thread, may take its time.
        spec: what each attacker gets first.
        signs: for each attacker, signs of its life.
        dtype: of the weights on their way out; float32 makes attacks the same as in the defender's own process.
        patience: see :data:`PATIENCE`.
        place: which part of every weight is in this process, when the defender is several (``consensus``).
    """

    def __init__(
        self,
        connect: Sequence[Callable[[], list[Channel]]],
        spec: AttackerSpec,
        *,
        signs: Sequence[Signs] = (),
        dtype: torch.dtype = torch.float32,
        patience: float = PATIENCE,
        place: RankInfo = RankInfo(),
    ) -> None:
        self.dtype, self.patience, self.place = dtype, patience, place
        self.processes: list[int] = []
        """Process ids of attackers that were started here."""
        self.bytes_out = self.bytes_in = 0
        """Payload of all requests and vectors so far."""
        self._signs = list(signs)
        self._heard: dict[int, tuple[str, float]] = {}
        self._changed = threading.Condition()
        self._inbox: list[AttackResult] = []
        self._lost: dict[int, str] = {}
        self._there: set[int] = set()
        self._raised: UserError | None = None
        self._run = 0
        self._weights: tuple[int, Weights] = (-1, {})
        self._couriers = [_Courier(self, i, make, spec) for i, make in enumerate(connect)]
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
        """Start a run: what an earlier one requested will be dropped when it arrives."""
        with self._changed:
            self._run += 1
            self._inbox, self._raised, self._weights = [], None, (-1, {})

    def submit(self, request: AttackRequest, source: Mapping[str, torch.Tensor], *, stable: bool) -> None:
        """Queue the attack on a copy of the weights on the host, shared by requests of the same step.

        Args:
            stable: nobody writes to ``source`` any more, so it need not be copied.
        """
        if request.attacker in self.lost():
            return  # nobody would ever take it from the queue
        if self._weights[0] != request.source_step:
            copy = {name: t.detach().to("cpu", self.dtype, copy=not stable) for name, t in source.items()}
            self._weights = (request.source_step, copy)
        with self._changed:
            self._couriers[request.attacker].out += 1
            self._heard.pop(request.attacker, None)
        self._couriers[request.attacker].requests.put((request, self._weights[1], self._run))

    def collect(self) -> list[AttackResult]:
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
        """Return whether no living attacker has a request."""
        with self._changed:
            return not any(c.out for c in self._couriers if c.attacker not in self._lost)

    def close(self, timeout: float = 5.0) -> None:
        """Ask every attacker to stop; one in the middle of an attack is left to whoever started it."""
        self._weights = (-1, {})
        for courier in self._couriers:
            courier.requests.put(None)
        for courier in self._couriers:
            courier.join(timeout)

    # -- what the couriers call ------------------------------------------------------------------------------

    def _arrived(self, result: AttackResult, sent: int, received: int, run: int) -> None:
        with self._changed:
            self._couriers[result.request.attacker].out -= 1
            if run == self._run:
                self.bytes_out, self.bytes_in = self.bytes_out + sent, self.bytes_in + received
                self._inbox.append(result)
                self._changed.notify_all()

    def _refused(self, request: AttackRequest, top: Mapping[str, str], run: int) -> None:
        with self._changed:
            self._couriers[request.attacker].out -= 1
            if run == self._run:
                kind = getattr(errors, top["error"], UserError)
                known = isinstance(kind, type) and issubclass(kind, UserError) and kind is not errors.MissingExtra
                self._raised = (kind if known else UserError)(
                    f"attacker {request.attacker}: {top['message']}", hint=top["hint"]
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
        requests = self._couriers[attacker].requests
        while not requests.empty():
            requests.get()  # the copies of the weights go with them
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
