"""The folder of a run: refuse one that holds something else, lock it, clear up, record. No torch here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casehard.errors import ConfigError, DataError, MissingExtra, StorageError, Unsupported
from casehard.io import secrets
from casehard.io.files import is_left_over, sweep
from casehard.io.locks import LOCK, lock
from casehard.io.manifest import MANIFEST, file_digest

if TYPE_CHECKING:
    from casehard.benchmark.store import RunFolder

BAD_INPUT = (ConfigError, DataError, MissingExtra, Unsupported)
COMPLETE = ("config.json", "adapter_config.json", "assets.json")
"""Beside a manifest, any of these tells a model, an adapter or a provider's assets from somebody else's folder."""


def check_out(out: Path, kind: str, *, again: bool = False, what: str = "run") -> None:
    """Refuse an output folder that holds something else than a run of the same kind.

    What a killed run left behind counts as nothing.

    Args:
        what: what messages call a finished one.
        again: whether a finished run may be gone over once more; else only an unfinished one.

    Raises:
        ConfigError: names what is there.
        Corrupt: its record is damaged.
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
    if not out.is_dir() or all(name == LOCK or is_left_over(name) for name in (p.name for p in out.iterdir())):
        return
    if not (out / "run.json").is_file():
        raise ConfigError(f"{out} is not empty and is not a run folder of casehard", hint=hint)
    from casehard.benchmark.store import read_run

    run = read_run(out)
    if run.get("kind") != kind:
        raise ConfigError(f"{out} holds a run of {run.get('kind')!r}, not of {kind!r}", hint=hint)
    if run.get("status") == "ok" and not again:
        with suppress(ConfigError, StorageError), hold(out):  # its last moments may have left a lock file
            pass
        raise ConfigError(f"{out} already holds a finished {what}", hint=hint)


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Lock a run folder for the block, and delete what killed runs left in it.

    Raises:
        ConfigError: another run holds the folder.
        StorageError: nobody may write there, or the disk is full.
    """
    with lock(out):
        sweep(out, deep=True)
        yield


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
    from casehard.benchmark.store import RunFolder

    secrets.refuse(config, where=kind)
    check_out(out, kind)
    digests = {spec: data_digest(spec) for spec in data}
    if suite:
        from casehard.benchmark.inputs import suite_digest

        digests[suite] = suite_digest(Path(suite))
    with hold(out):
        # Whoever held the lock until now may just have finished.
        check_out(out, kind)
        new = not (out / "run.json").exists()
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
        for name in ("events.jsonl", "run.json"):  # in this order: a run folder is known by its run.json
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
