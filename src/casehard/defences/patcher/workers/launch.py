"""Where attackers come from: processes started here, or ranks that torchrun or accelerate started.

Under a launcher with W ranks and N attackers of Q ranks each, ranks 0 .. W-NQ-1 defend and the last N Q attack. Several
ranks of a defender, or of an attacker, are a process group of their own, over which the model is sharded (FSDP2).
Without a launcher, N processes are started on this machine; they listen on the loopback address only and end with the
defender.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.defences.patcher.workers.child import RANKS, child_process
from casehard.defences.patcher.workers.consensus import ConsensusBackend
from casehard.defences.patcher.workers.remote import RemoteBackend, Signs
from casehard.defences.patcher.workers.resharding import channel_name
from casehard.defences.patcher.workers.spec import AttackerSpec, spec_for
from casehard.defences.patcher.workers.transport import Channel, dist, group
from casehard.defences.patcher.workers.worker import DONE, HEARTBEAT, OPEN, ignore_signals, serve
from casehard.distributed.ranks import RankInfo, world
from casehard.errors import ConfigError, Unsupported


@dataclass
class _Job:
    """A launched job, as :func:`join` found it from a rank of the defender."""

    store: Any
    place: RankInfo
    """This rank's place in the defender."""
    each: int
    """Ranks of an attacker."""
    used: bool = False
    """Whether the attackers served a run already; they are gone after it."""


_job: _Job | None = None


def launched() -> bool:
    """Return whether torchrun, accelerate or another launcher started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(attackers: int, *, each: int = 1, sharing: bool = False) -> bool:
    """Take this rank's part in a launched job: serve as an attacker until the job ends, or go on as its defender.

    A lone defender's process from then on looks like a job of one rank, so that nothing waits for the attackers. Ranks
    that defend together are a process group (``torch.distributed``), on a device each.

    Args:
        attackers: N; the last ranks.
        each: ranks of an attacker, over which its model is sharded.
        sharing: whether the defender may have several ranks.

    Returns:
        True when this rank attacked and is done; False for a defender.

    Raises:
        Unsupported: a number of ranks that the defender cannot take.
    """
    global _job
    if _job is not None:
        return False
    if not launched():
        if attackers and each > 1:
            raise Unsupported(
                f"attackers of {each} processes without a launcher",
                hint=f"torchrun --nproc-per-node {attackers * each + 1} ..., or leave out --attacker-ranks",
            )
        return False
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    defenders = ranks - attackers * each
    if defenders < 1 or (defenders > 1 and not sharing):
        others = f"{attackers * each} that attack" if attackers else "this method"
        raise Unsupported(
            f"{ranks} ranks leave {defenders} for the defender, with {others}",
            hint=f"start at least {attackers * each + 1} ranks"
            if sharing
            else "start it without torchrun or accelerate launch",
        )
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not attackers:
        if not dist.is_initialized():
            dist.init_process_group(_backend(device))
        return False
    store, _, _ = next(iter(dist.rendezvous("env://", rank, ranks)))
    if rank >= defenders:
        number, own = divmod(rank - defenders, each)
        _attack(store, number, RankInfo(own, each), defenders, device)
        return True
    atexit.register(_done, store)  # however this rank ends, the attackers need not wait for it
    _alone_with(defenders)
    if defenders > 1:
        own = dist.PrefixStore("casehard/defender", store)
        dist.init_process_group(_backend(device), store=own, rank=rank, world_size=defenders)
    _job = _Job(store, RankInfo(rank, defenders), each)
    return False


def _attack(store: Any, number: int, place: RankInfo, defenders: int, device: torch.device) -> None:
    ignore_signals(signal.SIGINT, signal.SIGTERM)
    if place.world_size > 1:
        own = dist.PrefixStore(f"casehard/attackers-{number}", store)
        dist.init_process_group(_backend(device), store=own, rank=place.rank, world_size=place.world_size)

    def watch() -> bool:
        try:
            return bool(store.check([DONE]))
        except RuntimeError:  # whoever keeps the store is gone, and the job with it
            return True

    serve(store, number, device=device, loopback=False, watch=watch, place=place, defenders=defenders)
    leave()


def _alone_with(defenders: int) -> None:
    """Make the environment that of a job of the defender's ranks alone."""
    if defenders == 1:
        for name in RANKS:
            os.environ.pop(name, None)
        return
    os.environ["WORLD_SIZE"] = str(defenders)
    first = int(os.environ["RANK"]) - int(os.environ.get("LOCAL_RANK", "0"))  # of this machine
    local = int(os.environ.get("LOCAL_WORLD_SIZE", defenders))
    os.environ["LOCAL_WORLD_SIZE"] = str(min(local, defenders - first))


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _done(store: Any) -> None:
    with contextlib.suppress(RuntimeError):
        store.set(DONE, "1")


def leave() -> None:
    """End the process group that :func:`join` made, once every rank is done with it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def shards_wanted(device: str) -> int:
    """Return over how many ranks to shard the model while loading it; 0 for one rank, or where accelerate will do it.

    Raises:
        Unsupported: several ranks, and a device other than the one that sharding would take.
    """
    if world() == 1:
        return 0
    accelerator = torch.cuda.is_available()
    if accelerator and device not in ("auto", "cuda"):
        raise Unsupported(f"device {device!r} for {world()} ranks", hint="--device auto: every rank takes its own GPU")
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return 0 if asked and accelerator else world()


def _device(local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    return torch.device("cuda", local_rank % count) if count else torch.device("cpu")


@contextlib.contextmanager
def start_attackers(
    spec: AttackerSpec, *, device: torch.device, weights_dtype: torch.dtype = torch.float32, shared: bool = True
) -> Iterator[RemoteBackend | ConsensusBackend]:
    """Run the attackers of ``spec`` in processes of their own for the length of a ``with`` block.

    Args:
        device: the defender's. Attackers get the devices after it, or share it when there are too few.
        weights_dtype: of the weights sent to attackers.
        shared: divide a CPU's cores between defender and attackers; not where the defender waits for them anyway.

    Raises:
        Unsupported: attackers of a launched job for a second time.

    Yields:
        The backend to pass to ``Patcher(backend=...)``.
    """
    if _job is None:
        with _threads_shared(spec, device, shared) as known, _children(known, device, weights_dtype) as backend:
            yield backend
        return
    if _job.used:
        raise Unsupported(
            "attackers for a second time in one launched job: its attackers served the first and are gone",
            hint="start a job for each run",
        )
    _job.used = True
    signs = [_signs(_job.store, i) for i in range(len(spec.attackers))]
    with _served(_job.store, spec, signs, weights_dtype, place=_job.place, each=_job.each) as backend:
        place = _job.place
        if place.world_size == 1:
            yield backend
        else:
            store = dist.PrefixStore("casehard/consensus", _job.store)
            yield ConsensusBackend(backend, group(store, place.rank, place.world_size), len(spec.attackers))


def _signs(store: Any, number: int, ended: Callable[[], str] = lambda: "") -> Signs:
    """Return a function that tells why an attacker ended, and its last heartbeat in the store."""
    key = f"{HEARTBEAT}-{number}"

    def look() -> tuple[str, str]:
        if why := ended():
            return why, ""
        try:
            return "", store.get(key).decode() if store.check([key]) else ""
        except RuntimeError:
            return "the process that keeps the job's store is gone", ""

    return look


@contextlib.contextmanager
def _served(
    store: Any,
    spec: AttackerSpec,
    signs: Sequence[Signs],
    dtype: torch.dtype,
    *,
    place: RankInfo = RankInfo(),
    each: int = 1,
    loopback: bool = False,
) -> Iterator[RemoteBackend]:
    def connect(i: int) -> list[Channel]:
        names = [channel_name(i, q, place.rank) for q in range(each)]
        return [Channel(store, name, first=True, loopback=loopback) for name in names]

    store.set(OPEN, "1")
    makers = [lambda i=i: connect(i) for i in range(len(spec.attackers))]
    backend = RemoteBackend(makers, spec, signs=signs, dtype=dtype, place=place)
    try:
        backend.ready()
        yield backend
    finally:
        _done(store)
        backend.close()


@contextlib.contextmanager
def _threads_shared(spec: AttackerSpec, device: torch.device, shared: bool) -> Iterator[AttackerSpec]:
    """Divide the cores between defender and attackers, unless the user has said how many threads there are."""
    before = torch.get_num_threads()
    if spec.threads or device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or not shared:
        yield spec if spec.threads else replace(spec, threads=before)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, min(before, cores // (1 + len(spec.attackers))))
    torch.set_num_threads(share)
    try:
        yield replace(spec, threads=share)
    finally:
        torch.set_num_threads(before)


def _places(device: torch.device, count: int) -> list[str]:
    """Return a device for each attacker: the other GPUs in turn, the defender's own only when it is alone."""
    if device.type != "cuda":
        return [str(device)] * count
    own = device.index or 0
    total = torch.cuda.device_count()
    others = [f"cuda:{(own + i) % total}" for i in range(1, total)] or [f"cuda:{own}"]
    return [others[i % len(others)] for i in range(count)]


@contextlib.contextmanager
def _children(spec: AttackerSpec, device: torch.device, dtype: torch.dtype) -> Iterator[RemoteBackend]:
    with tempfile.TemporaryDirectory(prefix="casehard-") as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "store"
        store = dist.FileStore(str(path), -1)
        store.set("casehard/start", "1")
        places = _places(device, len(spec.attackers))
        children = [stack.enter_context(child_process(path, i, where)) for i, where in enumerate(places)]
        signs = [_signs(store, i, child.ended) for i, child in enumerate(children)]
        with _served(store, spec, signs, dtype, loopback=True) as backend:
            backend.processes = [child.process.pid for child in children]
            yield backend


@contextlib.contextmanager
def with_attackers(method: Any, model: nn.Module, *, wanted: int = 0, seed: int, bf16: bool) -> Iterator[Any]:
    """Give a method the attackers that its schedule needs, in processes of their own, while the block runs.

    Args:
        method: a ``Patcher``; any other method passes through untouched unless attackers are wanted.
        wanted: attackers asked for although the schedule could do without (reference_parallel); 0 for none.
        bf16: whether training computes under bf16 autocast.

    Raises:
        ConfigError: another number of attackers than the settings list, or a schedule that has no use for them.
        Unsupported: a defender of several processes, or a method that simulates no attacks.
    """
    workers = getattr(method, "workers", None)
    if workers is None and wanted:
        raise Unsupported(f"{wanted} attackers for {getattr(method, 'name', method)!r}", hint="it simulates no attacks")
    if not (workers or wanted) or getattr(method, "backend", None) is not None:
        yield None
        return
    if world() > 1 and (_job is None or _job.place.world_size != world()):
        raise Unsupported(
            f"attackers for a defender of {world()} processes, and no rank was set aside for them",
            hint="workers.launch.join(attackers) on every rank before anything else; or schedule=sequential",
        )
    config = method.config
    if wanted not in (0, len(config.attackers)):
        raise ConfigError(
            f"{wanted} attackers asked for, and the settings list {len(config.attackers)}",
            hint="list as many under settings.attackers; the command line repeats a single one",
        )
    if config.schedule == "sequential":
        raise ConfigError(
            "attackers in processes of their own with schedule 'sequential', which attacks in the defender's",
            hint="schedule=lockstep gives the same weights",
        )
    for attacker in config.attackers:
        attacker.numbers()
    spec = spec_for(model, method.unsafe, config.attackers, seed=seed, delta_dtype=config.delta_dtype, bf16=bf16)
    dtype = getattr(torch, config.weights_dtype)
    device, shared = next(model.parameters()).device, config.schedule != "lockstep"
    with start_attackers(spec, device=device, weights_dtype=dtype, shared=shared) as backend:
        method.backend = backend
        try:
            yield backend
        finally:
            method.backend = None
