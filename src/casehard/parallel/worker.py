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

from casehard.defend.attackers import Arrival, Order, carry_out
from casehard.errors import Corrupt, Lost, UserError
from casehard.maths.collective import why
from casehard.maths.sharded import masters
from casehard.parallel.brief import Brief
from casehard.parallel.parts import Part, channel_name, cut, put_together
from casehard.parallel.wire import Channel, Message, dist

OPEN = "casehard/open"
DONE = "casehard/done"
BEAT = "casehard/beat"
"""Store keys: the defender is there; it needs no more attacks; an attacker's last sign of life."""
EVERY = 2.0
"""Seconds between two signs of life in an attack."""


class _Abandoned(Exception):
    """The attack under way is of no use to anybody any more."""


def serve(
    store: Any,
    number: int,
    *,
    device: torch.device,
    loopback: bool,
    watch: Callable[[], bool],
    part: Part = Part(),
    defenders: int = 1,
) -> None:
    """Carry out orders until the defender says stop or is gone.

    Args:
        number: position in the list of attackers.
        watch: returns True when nobody needs this attacker any more; asked while waiting and at every attack step.
        part: which of the processes of this attacker this one is; together they are a process group.
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
    names = [channel_name(number, part.number, d) for d in range(defenders)]
    channels = [Channel(store, name, first=False, loopback=loopback) for name in names]
    try:
        briefs = [channel.receive() for channel in channels]
        brief = Brief.unpack(briefs[0].header, briefs[0].tensors)
        if brief.threads:
            torch.set_num_threads(brief.threads)
        model = brief.model(device, part.of)
        for channel in channels:
            channel.send({"kind": "ready"})
        desk = _Desk(channels, model, brief, number, part)
        beat = _Beat(store, number, watch, part)
        while (orders := [channel.receive() for channel in channels])[0].header["kind"] != "stop":
            desk.attack(orders, beat)
    except (Lost, _Abandoned):
        if not watch():
            raise
    except RuntimeError as error:  # from a collective of this attacker's processes
        if part.of == 1:
            raise
        if not watch():
            raise Lost(f"another process of attacker {number} is gone, or this one failed: {why(error)}") from error


class _Beat:
    """Leaves signs of life at attack steps, and ends an attack that nobody needs."""

    def __init__(self, store: Any, number: int, watch: Callable[[], bool], part: Part) -> None:
        self.store, self.key, self.watch, self.part, self.last = store, f"{BEAT}-{number}", watch, part, 0.0

    def __call__(self, step: int) -> None:
        useless = self.watch()
        if self.part.of > 1:  # who stopped alone would leave the others waiting in the middle of a pass
            flag = torch.tensor(int(useless))
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            useless = bool(flag)
        if useless:
            raise _Abandoned
        if not self.part.number and time.monotonic() - self.last > EVERY:
            self.last = time.monotonic()
            self.store.set(self.key, str(self.last))


@dataclass(frozen=True)
class _Desk:
    """Takes an order from every process of the defender, and gives each its part of the vector."""

    channels: list[Channel]
    model: nn.Module
    brief: Brief
    number: int
    part: Part

    def attack(self, orders: list[Message], beat: _Beat) -> None:
        brief, number, top = self.brief, self.number, orders[0].header
        if odd := [message.header for message in orders if message.header != top]:
            raise Corrupt(f"the defender's processes ordered different attacks: {top} and {odd[0]}")
        order = Order(number, int(top["number"]), int(top["source_step"]))
        source = masters(self.model)
        sent = put_together([message.tensors for message in orders], source, "the defender")
        with torch.no_grad():
            for name, p in source.items():
                p.copy_(sent.pop(name))
        rows, attacker, dtype = brief.rows[number], brief.attackers[number], getattr(torch, brief.delta_dtype)
        try:
            done = carry_out(self.model, source, rows, attacker, order, seed=brief.seed, dtype=dtype, progress=beat)
        except UserError as error:
            said = {"kind": "error", "error": type(error).__name__, "message": error.message, "hint": error.hint}
            for channel in self.channels:
                channel.send(said)
            return
        for d, channel in enumerate(self.channels):
            pieces = cut(done.delta, brief.heights, self.part, Part(d, len(self.channels)))
            channel.send(_header(done), pieces.items(), count=len(pieces))


def _header(done: Arrival) -> dict[str, Any]:
    order = done.order
    top = {"kind": "vector", "number": order.number, "source_step": order.source_step, "steps": done.steps}
    return {**top, "losses": done.losses, "tokens": done.tokens, "seconds": done.seconds}


def unmoved_by(*signals: int) -> None:
    """Leave stopping to the defender, which is sent the same signals and then tells its attackers."""
    for number in signals:
        with contextlib.suppress(ValueError):  # not in the main thread: the embedding program decides
            signal.signal(number, signal.SIG_IGN)


def main(path: str, number: int) -> int:
    """Run as ``casehard.parallel.worker STORE NUMBER`` on a leash, started by the defender on the same machine.

    SIGTERM ends it as it ends any process: it holds nothing worth saving, and the defender notices.
    """
    unmoved_by(signal.SIGINT)
    store = dist.FileStore(path, -1)

    def watch() -> bool:
        return not Path(path).exists() or bool(store.check([DONE]))

    device = torch.device(os.environ.get("CASEHARD_ATTACKER_DEVICE", "cpu"))
    try:
        serve(store, number, device=device, loopback=True, watch=watch)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
