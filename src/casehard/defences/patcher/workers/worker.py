"""An attacker: receives weights, attacks them, sends the vector back; its weights exist in its memory only."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.defences.patcher.in_turn import SimulatedAttacks
from casehard.defences.patcher.pool import AttackRequest, AttackResult
from casehard.defences.patcher.workers.resharding import channel_name, join_rows, rows_for
from casehard.defences.patcher.workers.spec import AttackerSpec
from casehard.defences.patcher.workers.transport import Channel, Message, dist
from casehard.distributed.fsdp import local_weights
from casehard.distributed.ranks import RankInfo, why
from casehard.errors import Corrupt, Lost, UserError, visible

OPEN = "casehard/open"
DONE = "casehard/done"
HEARTBEAT = "casehard/heartbeat"
"""Store keys: the defender is there; it needs no more attacks; an attacker's last heartbeat."""
EVERY = 2.0
"""Seconds between two heartbeats in an attack."""


class _Abandoned(Exception):
    """The attack under way is of no use to anybody any more."""


def serve(
    store: Any,
    number: int,
    *,
    device: torch.device,
    loopback: bool,
    watch: Callable[[], bool],
    place: RankInfo = RankInfo(),
    defenders: int = 1,
) -> None:
    """Carry out requests until the defender says stop or is gone.

    Args:
        number: position in the list of attackers.
        watch: returns True when nobody needs this attacker any more; asked while waiting and at every attack step.
        place: which of the processes of this attacker this one is; together they are a process group.
        defenders: processes of the defender.

    Raises:
        Lost: the defender, or another process of this attacker, went away without a word.
    """
    while not watch():
        if store.check([OPEN]):
            break
        time.sleep(0.1)
    else:
        return
    names = [channel_name(number, place.rank, d) for d in range(defenders)]
    channels = [Channel(store, name, first=False, loopback=loopback) for name in names]
    try:
        specs = [channel.receive() for channel in channels]
        spec = AttackerSpec.unpack(specs[0].header, specs[0].tensors)
        if spec.threads:
            torch.set_num_threads(spec.threads)
        model = spec.model(device, place.world_size)
        for channel in channels:
            channel.send({"kind": "ready"})
        attacker = _Attacker(channels, model, spec, number, place)
        heartbeat = _Heartbeat(store, number, watch, place)
        while (requests := [channel.receive() for channel in channels])[0].header["kind"] != "stop":
            attacker.attack(requests, heartbeat)
    except (Lost, _Abandoned):
        if not watch():
            raise
    except RuntimeError as error:  # from a collective of this attacker's processes
        if place.world_size == 1:
            raise
        if not watch():
            raise Lost(f"another process of attacker {number} is gone, or this one failed: {why(error)}") from error


class _Heartbeat:
    """Leaves signs of life at attack steps, and ends an attack that nobody needs."""

    def __init__(self, store: Any, number: int, watch: Callable[[], bool], place: RankInfo) -> None:
        self.store, self.key, self.watch, self.place, self.last = store, f"{HEARTBEAT}-{number}", watch, place, 0.0

    def __call__(self, step: int) -> None:
        useless = self.watch()
        if self.place.world_size > 1:  # who stopped alone would leave the others waiting in the middle of a pass
            flag = torch.tensor(int(useless))
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            useless = bool(flag)
        if useless:
            raise _Abandoned
        if not self.place.rank and time.monotonic() - self.last > EVERY:
            self.last = time.monotonic()
            self.store.set(self.key, str(self.last))


@dataclass(frozen=True)
class _Attacker:
    """Takes a request from every process of the defender, and gives each its part of the vector."""

    channels: list[Channel]
    model: nn.Module
    spec: AttackerSpec
    number: int
    place: RankInfo

    def attack(self, messages: list[Message], heartbeat: _Heartbeat) -> None:
        spec, top = self.spec, messages[0].header
        if odd := [message.header for message in messages if message.header != top]:
            raise Corrupt(f"the defender's processes requested different attacks: {top} and {odd[0]}")
        request = AttackRequest(self.number, int(top["number"]), int(top["source_step"]))
        source = local_weights(self.model)
        sent = join_rows([message.tensors for message in messages], source, "the defender")
        with torch.no_grad():
            for name, p in source.items():
                p.copy_(sent.pop(name))
        attacks = SimulatedAttacks(spec.rows, spec.attackers, spec.seed, getattr(torch, spec.delta_dtype))
        try:
            done = attacks.run(self.model, source, request, progress=heartbeat)
        except UserError as error:
            answer = {"kind": "error", "error": type(error).__name__, "message": error.message, "hint": error.hint}
            for channel in self.channels:
                channel.send(answer)
            return
        for d, channel in enumerate(self.channels):
            pieces = rows_for(done.delta, spec.row_counts, self.place, RankInfo(d, len(self.channels)))
            channel.send(_header(done), pieces.items(), count=len(pieces))


def _header(done: AttackResult) -> dict[str, Any]:
    request = done.request
    top = {"kind": "vector", "number": request.number, "source_step": request.source_step, "steps": done.steps}
    return {**top, "losses": done.losses, "tokens": done.tokens, "seconds": done.seconds}


def ignore_signals(*signals: int) -> None:
    """Leave stopping to the defender, which gets the same signals and then stops its attackers."""
    for number in signals:
        with contextlib.suppress(ValueError):  # not in the main thread: the embedding program decides
            signal.signal(number, signal.SIG_IGN)


def main(path: str, number: int) -> int:
    """Run as ``casehard.defences.patcher.workers.worker STORE NUMBER`` on a leash, as a defender here does.

    SIGTERM ends it as it ends any process: it holds nothing worth saving, and the defender notices.
    """
    ignore_signals(signal.SIGINT)
    store = dist.FileStore(path, -1)

    def watch() -> bool:
        return not Path(path).exists() or bool(store.check([DONE]))

    device = torch.device(os.environ.get("CASEHARD_ATTACKER_DEVICE", "cpu"))
    try:
        serve(store, number, device=device, loopback=True, watch=watch)
    except UserError as error:
        print(visible(str(error), lines=True), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
