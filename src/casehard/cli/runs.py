"""The folder around a verb's work: refuse to overwrite, clear up after a kill, record, leave nothing for bad input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from casehard.benchmark.outfolder import check_out as check_out
from casehard.benchmark.outfolder import hold as hold
from casehard.benchmark.outfolder import made_from as made_from
from casehard.benchmark.outfolder import run_folder as run_folder
from casehard.errors import ConfigError
from casehard.io.files import sweep
from casehard.io.locks import lock


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


def cost_rows(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the cost of a run as table rows with units."""
    return [
        ("wall time", f"{cost['seconds']:.1f} s"),
        ("optimiser steps", f"{cost['steps']:,}"),
        ("forward-backward passes", f"{cost['passes']:,}"),
        ("tokens", f"{cost['tokens']:,}"),
        ("peak memory", f"{cost['peak_bytes'] / 2**20:,.0f} MiB"),
    ]
