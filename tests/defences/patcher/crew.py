"""Attackers as threads of this process: the real messages and the real attacker, without the start of a process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from casehard.defences.patcher import Patcher
from casehard.defences.patcher.workers.remote import RemoteBackend
from casehard.defences.patcher.workers.resharding import channel_name
from casehard.defences.patcher.workers.spec import spec_for
from casehard.defences.patcher.workers.transport import Channel
from casehard.defences.patcher.workers.worker import DONE, OPEN, serve
from casehard.errors import Lost


@contextlib.contextmanager
def threads(method: Patcher, model: torch.nn.Module, *, seed: int = 0) -> Iterator[RemoteBackend]:
    """Give ``method`` one attacker thread for each of its attackers."""
    config, store = method.config, torch.distributed.HashStore()
    spec = spec_for(model, method.unsafe, config.attackers, seed=seed, delta_dtype=config.delta_dtype, bf16=False)
    store.set(OPEN, "1")

    def attack(i: int) -> None:
        with contextlib.suppress(Lost):
            serve(store, i, device=torch.device("cpu"), loopback=True, watch=lambda: bool(store.check([DONE])))

    count = len(config.attackers)
    workers = [threading.Thread(target=attack, args=(i,), daemon=True) for i in range(count)]
    [w.start() for w in workers]
    names = [channel_name(i, 0, 0) for i in range(count)]
    makers = [lambda name=name: [Channel(store, name, first=True, loopback=True)] for name in names]
    backend = RemoteBackend(makers, spec, dtype=getattr(torch, config.weights_dtype))
    backend.ready()
    method.backend = backend
    try:
        yield backend
    finally:
        store.set(DONE, "1")
        backend.close()
        [w.join(2) for w in workers]  # one whose defender refused its vector waits for ever
