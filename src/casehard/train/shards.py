"""A rank's own part of a checkpoint, where the model is sharded: nobody ever holds, or writes, the whole.

    checkpoint-N/shards/rank-R-of-K/weights-00000.safetensors     this rank's rows of every weight, and the buffers
                                    optimizer-00000.safetensors   its rows of the optimiser's moments, and step numbers
                                    optimizer.json                learning rates, and what else is no tensor

Everything is read back into the live shards in place, bit for bit, so the same ranks must hold the same rows: a run
goes on with the number of processes that saved it. Files hold about a gigabyte, which bounds the copies on the host.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casehard.distributed.fsdp import reshard
from casehard.distributed.ranks import local, sharded
from casehard.errors import ConfigError, Corrupt, Unsupported
from casehard.io.files import fsync, read_json
from casehard.io.tensorfile import load_tensors, save_tensors

FOLDER = "shards"
_NUMBERS = "optimizer.json"
_PART = re.compile(r"rank-\d+-of-(\d+)")
_CHUNK = 1 << 30


def part(folder: Path, rank: int, ranks: int) -> Path:
    """Return the folder of one rank's part of a checkpoint."""
    return folder / FOLDER / f"rank-{rank}-of-{ranks}"


def saved_by(folder: Path) -> int:
    """Return how many ranks wrote a checkpoint's shards; 0 when it holds a whole model."""
    named = (_PART.fullmatch(path.name) for path in (folder / FOLDER).glob("rank-*"))
    return max((int(match[1]) for match in named if match), default=0)


def missing_files(folder: Path, ranks: int) -> list[str]:
    """Return what is missing of the parts of a checkpoint, by its name below ``folder``."""
    parts = [part(folder, rank, ranks) for rank in range(ranks)]
    needed = [where / name for where in parts for name in (_file("weights", 0), _file("optimizer", 0), _NUMBERS)]
    return [path.relative_to(folder).as_posix() for path in needed if not path.is_file()]


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write this rank's rows of every parameter, tied ones once, and every buffer.

    Raises:
        StorageError: the disk refused the write.
    """
    _write(folder, "weights", _live(model).items())


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy what :func:`save_weights` wrote back into the live shards.

    Raises:
        ConfigError: this rank holds other rows than the one that saved them.
        Corrupt: a file is damaged, or a tensor is missing.
    """
    live = _live(model)
    with torch.no_grad():
        for key, stored in _read(folder, "weights"):
            there = live.pop(key, None)
            if there is None:
                raise _odd(folder, key)
            if (stored.shape, stored.dtype) != (there.shape, there.dtype):
                saved, here = (f"{tuple(t.shape)} of {t.dtype}" for t in (stored, there))
                raise ConfigError(
                    f"{folder}: {key} is {saved}, and {here} on this rank",
                    hint="go on with the mesh and the precision that the run began with",
                )
            there.copy_(stored)
    if live:
        raise Corrupt(f"{folder}: lacks {len(live)} tensors, first {min(live)}", hint="use another checkpoint")


def save_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Write this rank's rows of the optimiser's state; a part that is no shard, such as a step number, as it is.

    Raises:
        Unsupported: a state that is neither a tensor nor a number, or is laid out otherwise than its parameter.
        StorageError: the disk refused the write.
    """
    names = {id(p): name for name, p in _parameters(model).items()}
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for p, state in optimizer.state.items():
        for key, value in state.items():
            entry = f"{key}/{names[id(p)]}"
            if isinstance(value, torch.Tensor):
                tensors[f"{_kind(value, p, entry)}/{entry}"] = value
            elif value is None or isinstance(value, int | float):
                numbers[entry] = value
            else:
                raise Unsupported(
                    f"optimiser state {entry} is a {type(value).__name__}", hint="optim=adamw_torch_fused, or sgd"
                )
    _write(folder, "optimizer", tensors.items())
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    (folder / _NUMBERS).write_text(json.dumps({"lr": rates, "numbers": numbers}, sort_keys=True), encoding="utf-8")
    fsync(folder / _NUMBERS)


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Give an optimiser that stands over the same parameters what :func:`save_optimizer` wrote.

    Raises:
        ConfigError: another number of parameter groups.
        Corrupt: a file is damaged, or speaks of a parameter that the model does not have.
    """
    live = _parameters(model)
    stored = read_json(folder / _NUMBERS)
    if len(stored["lr"]) != len(optimizer.param_groups):
        raise ConfigError(
            f"{folder} holds {len(stored['lr'])} parameter groups, this optimiser has {len(optimizer.param_groups)}",
            hint="go on with the recipe that the run began with",
        )
    for group, rate in zip(optimizer.param_groups, stored["lr"], strict=True):
        group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], torch.Tensor) else rate
    optimizer.state.clear()
    numbers = ((f"number/{entry}", value) for entry, value in stored["numbers"].items())
    for entry, value in itertools.chain(numbers, _read(folder, "optimizer")):
        kind, key, name = entry.split("/", 2)
        if name not in live:
            raise _odd(folder, entry)
        optimizer.state[live[name]][key] = value if kind == "number" else _placed(value, live[name], kind)


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    reshard(model)  # what FSDP2 has gathered stands in the place of the shards
    return dict(model.named_parameters())


def _live(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return this rank's own tensors, not copies: parameters (tied ones once) and buffers."""
    own = {f"parameter/{name}": local(p.detach()) for name, p in _parameters(model).items()}
    return own | {f"buffer/{name}": local(b.detach()) for name, b in model.named_buffers()}


def _kind(value: Any, p: Any, entry: str) -> str:
    """Return how a tensor of the optimiser's state is put back: in shards, on the host, or on the shards' device."""
    if not sharded(value):
        return "host" if value.device.type == "cpu" else "device"
    if sharded(p) and (value.shape, value.placements) == (p.shape, p.placements):
        return "shard"
    raise Unsupported(
        f"optimiser state {entry} is laid out as {value.placements}, not as its weight", hint="optim=adamw_torch_fused"
    )


def _placed(tensor: torch.Tensor, p: Any, kind: str) -> torch.Tensor:
    if kind == "host":
        return tensor
    here = tensor.to(local(p.detach()).device)
    if kind == "device":
        return here
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(here, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _file(stem: str, number: int) -> str:
    return f"{stem}-{number:05d}.safetensors"


def _write(folder: Path, stem: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, torch.Tensor] = {}
    size = written = 0
    for key, tensor in tensors:
        # A copy of its own: safetensors refuses tensors that share memory.
        held[key] = local(tensor.detach()).to("cpu", copy=True).contiguous()
        size += held[key].nbytes
        if size >= _CHUNK:
            save_tensors(folder / _file(stem, written), held)
            held, size, written = {}, 0, written + 1
    if held or not written:
        save_tensors(folder / _file(stem, written), held)


def _read(folder: Path, stem: str) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob(f"{stem}-*.safetensors")):
        yield from load_tensors(file).items()


def _odd(folder: Path, what: str) -> Corrupt:
    return Corrupt(f"{folder}: holds {what}, which the model lacks", hint="use another checkpoint")
