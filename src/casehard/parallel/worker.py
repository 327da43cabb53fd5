"""An attacker: receives weights, attacks them, sends the vector back; its weights exist in its memory only."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.defend.attackers import Arrival, Order, carry_out
from casehard.errors import Lost, UserError
from casehard.maths.bilevel import parameters
from casehard.parallel.brief import Brief
from casehard.parallel.wire import Channel, Message, dist

OPEN = "casehard/open"
DONE = "casehard/done"
BEAT = "casehard/beat"
"""Store keys: the defender is there; it needs no more attacks; an attacker's last sign of life."""
EVERY = 2.0
"""Seconds between two signs of life in an attack."""


class _Abandoned(Exception):
    """The attack under way is of no use to anybody any more."""


def serve(store: Any, number: int, *, device: torch.device, loopback: bool, watch: Callable[[], bool]) -> None:
    """Carry out orders until the defender says stop or is gone.

    Args:
        number: position in the list of attackers.
        watch: returns True when nobody needs this attacker any more; asked while waiting and at every attack step.

    Raises:
        Lost: the defender went away without a word.
    """
    while not store.check([OPEN]):
        if watch():
            return
        time.sleep(0.1)
    channel = Channel(store, f"attacker-{number}", first=False, loopback=loopback)
    try:
        message = channel.receive()
        brief = Brief.unpack(message.header, message.tensors)
        if brief.threads:
            torch.set_num_threads(brief.threads)
        model = brief.model(device)
        channel.send({"kind": "ready"})
        beat = _Beat(store, number, watch)
        while (message := channel.receive()).header["kind"] != "stop":
            _attack(channel, model, brief, number, message, beat)
    except (Lost, _Abandoned):
        if not watch():
            raise


class _Beat:
    """Leaves signs of life at attack steps, and ends an attack that nobody needs."""

    def __init__(self, store: Any, number: int, watch: Callable[[], bool]) -> None:
        self.store, self.key, self.watch, self.last = store, f"{BEAT}-{number}", watch, 0.0

    def __call__(self, step: int) -> None:
        if self.watch():
            raise _Abandoned
        if time.monotonic() - self.last > EVERY:
            self.last = time.monotonic()
            self.store.set(self.key, str(self.last))


def _attack(channel: Channel, model: nn.Module, brief: Brief, number: int, message: Message, beat: _Beat) -> None:
    order = Order(number, int(message.header["number"]), int(message.header["source_step"]))
    source = parameters(model)
    with torch.no_grad():
        for name, p in source.items():
            p.copy_(message.tensors.pop(name))
    rows, attacker, dtype = brief.rows[number], brief.attackers[number], getattr(torch, brief.delta_dtype)
    try:
        done = carry_out(model, source, rows, attacker, order, seed=brief.seed, dtype=dtype, progress=beat)
    except UserError as error:
        channel.send({"kind": "error", "error": type(error).__name__, "message": error.message, "hint": error.hint})
        return
    channel.send(_header(done), _emptied(done.delta), count=len(done.delta))


def _header(done: Arrival) -> dict[str, Any]:
    order = done.order
    top = {"kind": "vector", "number": order.number, "source_step": order.source_step, "steps": done.steps}
    return {**top, "losses": done.losses, "tokens": done.tokens, "seconds": done.seconds}


def _emptied(delta: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in list(delta):
        yield name, delta.pop(name)


def unmoved_by_signals() -> None:
    """Leave stopping to the defender, which is sent the same signals and then tells its attackers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread: the embedding program decides
            signal.signal(number, signal.SIG_IGN)


def main(path: str, number: int) -> int:
    """Run as ``python -m casehard.parallel.worker STORE NUMBER``, started by the defender on the same machine."""
    unmoved_by_signals()
    store, parent = dist.FileStore(path, -1), os.getppid()

    def watch() -> bool:
        return os.getppid() != parent or not Path(path).exists() or bool(store.check([DONE]))

    device = torch.device(os.environ.get("CASEHARD_ATTACKER_DEVICE", "cpu"))
    try:
        serve(store, number, device=device, loopback=True, watch=watch)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        if os.getppid() != parent:
            shutil.rmtree(Path(path).parent, ignore_errors=True)  # a killed defender cannot
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
