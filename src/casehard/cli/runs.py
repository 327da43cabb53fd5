"""The folder around a verb's work: refuse to overwrite, clear up after a kill, record, leave nothing for bad input."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casehard.benchmark.outfolder import check_out as check_out
from casehard.benchmark.outfolder import hold as hold
from casehard.errors import ConfigError, DataError, MissingExtra, Unsupported
from casehard.io import secrets
from casehard.io.files import sweep
from casehard.io.locks import LOCK, lock
from casehard.io.manifest import file_digest

if TYPE_CHECKING:
    from casehard.benchmark.store import RunFolder

BAD_INPUT = (ConfigError, DataError, MissingExtra, Unsupported)


@contextmanager
def new_folder(out: Path) -> Iterator[None]:
    """Hold the name of a folder that will appear whole; what a killed run left beside it is deleted.

    Raises:
        ConfigError: it exists, or another run is making it.
        StorageError: nobody may write there, or the disk is full.
    """
    with beside(out):
        if out.is_symlink() or out.exists():
            raise ConfigError(f"{out} already exists", hint="give another folder with --out, or remove it")
        yield


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """Lock, and return, DIR.run: what a folder that appears whole cannot hold itself while it is made."""
    place = out.absolute()
    if not place.name:
        raise ConfigError(f"{out} already exists", hint="give another folder with --out")
    record = place.with_name(f"{place.name}.run")
    with lock(record):
        sweep(record)
        sweep(place.parent, of=place.name)
        yield record


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


def cost_rows(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the cost of a run as table rows with units."""
    return [
        ("wall time", f"{cost['seconds']:.1f} s"),
        ("optimiser steps", f"{cost['steps']:,}"),
        ("forward-backward passes", f"{cost['passes']:,}"),
        ("tokens", f"{cost['tokens']:,}"),
        ("peak memory", f"{cost['peak_bytes'] / 2**20:,.0f} MiB"),
    ]
