"""The folder of a run: refuse one that holds something else, lock it, clear up what kills left. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from casehard.errors import ConfigError, StorageError
from casehard.io.files import is_left_over, sweep
from casehard.io.locks import LOCK, lock
from casehard.io.manifest import MANIFEST

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
