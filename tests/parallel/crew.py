"""Attackers as threads of this process: the real messages and the real attacker, without the start of a process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from casehard.defend.patcher import Patcher
from casehard.errors import Lost
from casehard.parallel.brief import brief_for
from casehard.parallel.parts import channel_name
from casehard.parallel.remote import RemoteSide
from casehard.parallel.wire import Channel
from casehard.parallel.worker import DONE, OPEN, serve


@contextlib.contextmanager
def threads(method: Patcher, model: torch.nn.Module, *, seed: int = 0) -> Iterator[RemoteSide]:
    """Give ``method`` one attacker thread for each of its attackers."""
    config, store = method.config, torch.distributed.HashStore()
    brief = brief_for(model, method.unsafe, config.attackers, seed=seed, delta_dtype=config.delta_dtype, bf16=False)
    store.set(OPEN, "1")

    def attack(i: int) -> None:
        with contextlib.suppress(Lost):
            serve(store, i, device=torch.device("cpu"), loopback=True, watch=lambda: bool(store.check([DONE])))

    count = len(config.attackers)
    workers = [threading.Thread(target=attack, args=(i,), daemon=True) for i in range(count)]
    [w.start() for w in workers]
    names = [channel_name(i, 0, 0) for i in range(count)]
    makers = [lambda name=name: [Channel(store, name, first=True, loopback=True)] for name in names]
    side = RemoteSide(makers, brief, dtype=getattr(torch, config.weights_dtype))
    side.ready()
    method.side = side
    try:
        yield side
    finally:
        store.set(DONE, "1")
        side.close()
        [w.join(10) for w in workers]
