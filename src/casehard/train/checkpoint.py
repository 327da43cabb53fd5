"""Training checkpoints: what is in one, which one to resume from, which ones to keep.

A checkpoint is the folder the stock Trainer writes, staged and renamed, plus ``shell.json`` (our counters and the
identity of the run), the method's state, and ``args.json`` in place of the pickled arguments. Of a sharded model each
rank writes its own part (:mod:`casehard.train.shards`) instead of weights and optimiser.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from casehard.distributed.ranks import sharded
from casehard.errors import ConfigError, Corrupt, Unsupported
from casehard.io.files import inside, read_json, remove
from casehard.io.manifest import verify
from casehard.io.secrets import REDACTED, redact
from casehard.train import shards

PREFIX = "checkpoint-"
SHELL = "shell.json"
TRAINER_STATE = "trainer_state.json"
_TENSORS = "method.safetensors"
_VALUES = "method.json"
_FILES = "method_files"
_JSON = (int, float, str, bool, type(None))


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """Return ``(step, folder)`` of everything named like a checkpoint, newest first, complete or not."""
    named = ((re.fullmatch(rf"{PREFIX}(\d+)", path.name), path) for path in Path(out).glob(f"{PREFIX}*"))
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def missing_files(folder: Path, ranks: int) -> list[str]:
    """Return the names of what a resume on so many ranks needs and a folder lacks."""
    states = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    missing = [name for name in (TRAINER_STATE, SHELL, "scheduler.pt", *states) if not (folder / name).is_file()]
    if shards.saved_by(folder):
        missing += shards.missing_files(folder, ranks)
    elif not any(folder.glob("optimizer*")):
        missing.append("optimizer.pt")
    return missing


def _require_ranks(folder: Path, ranks: int) -> None:
    """Refuse another number of ranks than saved a checkpoint, where the files tell: it would draw other batches."""
    single = (folder / "rng_state.pth").is_file()
    wrote = shards.saved_by(folder) or (1 if single else len(list(folder.glob("rng_state_*.pth"))))
    if wrote in (0, ranks):
        return
    how = f"torchrun --nproc-per-node {wrote} on one machine" if wrote > 1 else "without torchrun"
    # Attackers beside are not counted: of five processes under torchrun two may attack, or three.
    raise ConfigError(
        f"{folder} was saved by a run of {wrote} defending process{'es' if wrote > 1 else ''}, this one has {ranks}",
        hint=f"go on with {wrote} ({how}), plus those that attack beside, or begin anew in another folder",
    )


def require_complete(folder: Path, *, world_size: int = 1) -> int:
    """Verify a checkpoint and return its step. No torch file is opened before this passed.

    Raises:
        Corrupt: it does not match its manifest, lacks a file that a resume needs, or its name and content disagree.
        ConfigError: it is complete, and another number of processes saved it.
    """
    verify(folder)
    _require_ranks(folder, world_size)
    if missing := missing_files(folder, world_size):
        raise Corrupt(
            f"{folder}: cannot be resumed from, it lacks {', '.join(missing)}",
            hint="it was saved without them; use another checkpoint",
        )
    step = int(_object(folder / TRAINER_STATE, "global_step")["global_step"])
    if folder.name.startswith(PREFIX) and folder.name != f"{PREFIX}{step}":
        raise Corrupt(f"{folder}: holds step {step}, not what its name says", hint="it was renamed or copied")
    return step


def newest(out: Path, *, last_step: int, world_size: int = 1) -> Path | None:
    """Return the newest complete checkpoint of a run, or None if there is no checkpoint at all.

    Args:
        out: the run's folder.
        last_step: number of steps of the run; a checkpoint beyond it belongs to another run.
        world_size: processes that will resume.

    Raises:
        Corrupt: there are checkpoints and not one is complete.
        ConfigError: another number of processes saved the newest complete one, or all belong to a longer run.
    """
    found, skipped = checkpoints(out), []
    if found and min(step for step, _ in found) > last_step:
        raise ConfigError(
            f"{found[0][1]} belongs to a run of more steps than {last_step}",
            hint="the same number of steps, a fresh output folder, or remove that one to start over",
        )
    for step, folder in found:
        try:
            if step > last_step:
                raise Corrupt(f"{folder}: step {step} lies beyond the run's last step {last_step}")
            require_complete(folder, world_size=world_size)
        except Corrupt as error:
            skipped.append(error.message)
            continue
        if skipped:
            warnings.warn(f"resuming from {folder}; skipped: {'; '.join(skipped)}", stacklevel=2)
        return folder
    if skipped:
        raise Corrupt(
            f"no complete checkpoint in {out}: {'; '.join(skipped)}",
            hint="start over in a fresh folder, or remove that one",
        )
    return None


def prune(out: Path, *, keep: int, protect: str | None = None) -> None:
    """Delete checkpoints older than the ``keep`` newest, once the newest one was read back and verified.

    Raises:
        Corrupt: the newest one does not verify; nothing is deleted.
    """
    assert keep >= 2, keep
    found = checkpoints(out)
    if len(found) <= keep:
        return
    verify(found[0][1])
    for _, folder in found[keep:]:
        if protect is None or folder != Path(protect):
            remove(folder)


def bytes_needed(model: torch.nn.Module) -> int:
    """Estimate the size of a checkpoint: the weights, and two moments for each trainable one, of all ranks together."""
    return sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) * _replicas(p) for p in model.parameters())


def _replicas(p: Any) -> int:
    """Return how often a weight is written: once, or by each group of ranks that shards it anew."""
    if not sharded(p):
        return 1
    sizes = zip(p.device_mesh.shape, p.placements, strict=True)
    return math.prod(size for size, place in sizes if not place.is_shard())


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    return isinstance(value, _JSON)


def save_method(state: Mapping[str, Any], folder: Path) -> None:
    """Write a method's state: tensors as safetensors, JSON values as JSON, files as hard links (or copies).

    Raises:
        Unsupported: a value is none of the three.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    files: dict[str, str] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            # A copy of its own: safetensors refuses views that share memory.
            tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        elif isinstance(value, Path):
            files[key] = f"{_FILES}/{len(files)}/{value.name}"
            _link(value, folder / files[key])
        elif _is_json(value):
            values[key] = value
        else:
            raise Unsupported(
                f"method state {key!r} is a {type(value).__name__}",
                hint="state() may hold tensors, JSON values (lists, no tuples) and paths of files",
            )
    if tensors:
        save_file(tensors, folder / _TENSORS)
    text = json.dumps({"values": values, "files": files}, sort_keys=True)
    (folder / _VALUES).write_text(text, encoding="utf-8")


def load_method(folder: Path, scratch: Path | None) -> dict[str, Any]:
    """Read what :func:`save_method` wrote; files come back as links in ``scratch``, out of reach of retention."""
    stored = _object(folder / _VALUES, "values", "files")
    state: dict[str, Any] = dict(stored["values"])
    if (folder / _TENSORS).exists():
        state.update(load_file(folder / _TENSORS))
    for key, name in stored["files"].items():
        assert scratch is not None
        source = inside(folder, name)
        state[key] = scratch / source.name
        _link(source, state[key])
    return state


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)


def save_arguments(arguments: Any, folder: Path) -> None:
    """Write ``args.json`` and remove the pickle the Trainer wrote; nothing that can hold a secret is kept."""
    given = json.loads(json.dumps(arguments.to_dict(), default=str))
    # Left out rather than blanked: a blank would read like a setting.
    kept = {key: value for key, value in redact(given).items() if REDACTED not in json.dumps(value)}
    text = json.dumps(kept, indent=1, sort_keys=True)
    (folder / "args.json").write_text(text, encoding="utf-8")
    (folder / "training_args.bin").unlink(missing_ok=True)


def _object(file: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object that has the keys given."""
    value = read_json(file)
    if not isinstance(value, dict) or (lacks := [key for key in keys if key not in value]):
        raise Corrupt(f"{file}: lacks {', '.join(lacks) if isinstance(value, dict) else 'everything'}")
    return value


@dataclass(frozen=True)
class ShellState:
    """What the trainer itself must remember so that a resumed run logs and counts as if it was never stopped."""

    meter: dict[str, Any]
    loss_sum: float
    """Summed loss since the last log row; a 32-bit float is exact in JSON."""
    logged_step: int
    identity: dict[str, str]
    """What makes this run this run: method, and for ``fit`` also recipe, rows and seed."""

    def write(self, folder: Path) -> None:
        """Write ``shell.json``."""
        (folder / SHELL).write_text(json.dumps(self.__dict__, sort_keys=True), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ShellState:
        """Read ``shell.json`` of a verified checkpoint."""
        return cls(**_object(folder / SHELL, *(f.name for f in fields(cls))))

    def require_same(self, identity: Mapping[str, str], folder: Path) -> None:
        """Refuse to continue a different run.

        Raises:
            ConfigError: names what differs.
        """
        keys = sorted(set(identity) | set(self.identity))
        changed = [key for key in keys if identity.get(key) != self.identity.get(key)]
        if changed:
            raise ConfigError(
                f"{folder} belongs to a run with another {', '.join(changed)}",
                hint="use a fresh output folder, or remove that one to start over",
            )
