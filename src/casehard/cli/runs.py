"""The run folder around a verb's work: refuse to overwrite, record, and leave nothing behind for bad input."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casehard import secrets
from casehard.errors import ConfigError, DataError, MissingExtra, Unsupported
from casehard.files import MANIFEST, file_digest, read_json
from casehard.locks import LOCK, lock

if TYPE_CHECKING:
    from casehard.bench.store import RunFolder

COMPLETE = ("config.json", "adapter_config.json", "assets.json")
"""Beside a manifest, any of these tells a model, an adapter or a provider's assets from somebody else's folder."""
BAD_INPUT = (ConfigError, DataError, MissingExtra, Unsupported)


def check_out(out: Path, kind: str, *, again: bool = False) -> None:
    """Refuse an output folder that holds something else than a run of the same kind.

    Args:
        again: whether a finished run may be gone over once more; else only an unfinished one.

    Raises:
        ConfigError: names what is there.
    """
    hint = "give another folder with --out, or remove this one"
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} exists and is not a folder", hint=hint)
    for above in out.resolve().parents:
        if (above / MANIFEST).is_file() and any((above / mark).is_file() for mark in COMPLETE):
            raise ConfigError(
                f"{out} lies inside {above}, a finished folder whose manifest would no longer be true",
                hint="give a folder outside it with --out",
            )
    if not out.is_dir() or {p.name for p in out.iterdir()} <= {LOCK}:
        return
    if not (out / "run.json").is_file():
        raise ConfigError(f"{out} is not empty and is not a run folder of casehard", hint=hint)
    run = read_json(out / "run.json")
    found = run.get("kind") if isinstance(run, dict) else None
    if found != kind:
        raise ConfigError(f"{out} holds a run of {found!r}, not of {kind!r}", hint=hint)
    if run.get("status") == "ok" and not again:
        raise ConfigError(f"{out} already holds a finished run", hint=hint)


@contextmanager
def run_folder(
    out: Path,
    kind: str,
    config: Mapping[str, Any],
    *,
    seeds: Iterable[int] = (),
    data: Iterable[str] = (),
    suite: str = "",
) -> Iterator[RunFolder]:
    """Lock and open the run folder of a verb; bad input found inside leaves no new folder behind.

    Args:
        data: file specs whose digests are recorded.
        suite: evaluation suite, whose digest covers what its parts point to.

    Raises:
        ConfigError: the settings hold a secret, or the folder is taken or in use.
    """
    from casehard.bench.store import RunFolder

    secrets.refuse(config, where=kind)
    check_out(out, kind)
    new = not out.exists()
    digests = {spec: data_digest(spec) for spec in data}
    if suite:
        from casehard.bench.inputs import suite_digest

        digests[suite] = suite_digest(Path(suite))
    with lock(out):
        # Whoever held the lock until now may just have finished.
        check_out(out, kind)
        try:
            with RunFolder(out, kind, config, seeds=seeds, data=digests) as run:
                yield run
        except BAD_INPUT:
            if new:
                _remove_record(out)
            raise


def _remove_record(out: Path) -> None:
    """Empty a folder that holds nothing but the record of the failure."""
    training = out / "training"
    if training.is_dir() and not any(p.is_file() for p in training.rglob("*")):  # refused before the first step
        shutil.rmtree(training)
    if {p.name for p in out.iterdir()} <= {"run.json", "events.jsonl", LOCK}:
        for name in ("run.json", "events.jsonl"):
            (out / name).unlink(missing_ok=True)


def made_from(run: RunFolder, digest: str, origin: str, **others: str) -> None:
    """Record which checkpoint a run started from, and the Hub model it is or descends from, if there is one.

    Args:
        others: name -> digest of what else it started from.
    """
    run.record({"parents": {"model": digest, **others}, **({"origin": origin} if origin else {})})


def data_digest(spec: str) -> str:
    """Return the SHA-256 of the file behind a data spec; "" for a hub spec."""
    return "" if spec.startswith("hub:") else file_digest(Path(spec.partition("?")[0]))


def cost_rows(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the cost of a run as table rows with units."""
    return [
        ("wall time", f"{cost['seconds']:.1f} s"),
        ("optimiser steps", f"{cost['steps']:,}"),
        ("forward-backward passes", f"{cost['passes']:,}"),
        ("tokens", f"{cost['tokens']:,}"),
        ("peak memory", f"{cost['peak_bytes'] / 2**20:,.0f} MiB"),
    ]
