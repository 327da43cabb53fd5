"""An attacker: receives weights, attacks them, sends the vector back; its weights exist in its memory only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from casehard.defend.attackers import Arrival, Order, carry_out
from casehard.errors import Lost, UserError
from casehard.maths.bilevel import parameters
from casehard.parallel.brief import Brief
from casehard.parallel.wire import Channel, dist

BRIEF = "casehard/brief"
DONE = "casehard/done"
"""Store keys: the brief, and the mark that the defender needs no more attacks."""


class _Abandoned(Exception):
    """The attack under way is of no use to anybody any more."""


def serve(store: Any, number: int, *, device: torch.device, loopback: bool, watch: Callable[[], bool]) -> None:
    """Carry out orders until the defender says stop or is gone.

    Args:
        number: position in the list of attackers.
        watch: returns True when the attack under way should be abandoned; asked at every step.

    Raises:
        Lost: the defender went away without a word.
    """
    store.wait([BRIEF])
    brief = Brief.parse(store.get(BRIEF).decode())
    if brief.threads:
        torch.set_num_threads(brief.threads)
    model = brief.model(device)
    channel = Channel(store, f"attacker-{number}", first=False, device=_wire_device(store, device), loopback=loopback)
    rows, attacker = brief.rows[number], brief.attackers[number]

    def progress(step: int) -> None:
        if watch():
            raise _Abandoned

    while True:
        try:
            message = channel.receive()
        except Lost:
            if watch():
                return
            raise
        if message.header["kind"] == "stop":
            return
        order = Order(number, int(message.header["number"]), int(message.header["source_step"]))
        source = parameters(model)
        with torch.no_grad():
            for name, p in source.items():
                p.copy_(message.tensors.pop(name))
        try:
            dtype = getattr(torch, brief.delta_dtype)
            done = carry_out(model, source, rows, attacker, order, seed=brief.seed, dtype=dtype, progress=progress)
        except _Abandoned:
            return
        except UserError as error:
            channel.send({"kind": "error", "error": type(error).__name__, "message": error.message, "hint": error.hint})
            continue
        channel.send(_header(done), _emptied(done.delta), count=len(done.delta))


def _wire_device(store: Any, device: torch.device) -> torch.device | str:
    """Return where tensors leave from: the accelerator when the defender speaks NCCL, else host memory."""
    return device if store.check(["casehard/nccl"]) else "cpu"


def _header(done: Arrival) -> dict[str, Any]:
    order = done.order
    top = {"kind": "vector", "number": order.number, "source_step": order.source_step, "steps": done.steps}
    return {**top, "losses": done.losses, "tokens": done.tokens, "seconds": done.seconds}


def _emptied(delta: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in list(delta):
        yield name, delta.pop(name)


def main(path: str, number: int) -> int:
    """Run as ``python -m casehard.parallel.worker STORE NUMBER``, started by the defender on the same machine."""
    store, parent = dist.FileStore(path, -1), os.getppid()

    def watch() -> bool:
        return os.getppid() != parent or not os.path.exists(path) or bool(store.check([DONE]))  # noqa: PTH110

    device = torch.device(os.environ.get("CASEHARD_ATTACKER_DEVICE", "cpu"))
    try:
        serve(store, number, device=device, loopback=True, watch=watch)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
