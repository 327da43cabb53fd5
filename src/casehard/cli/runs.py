"""The run folder around a verb's work: refuse to overwrite, record, and leave nothing behind for bad input."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casehard.errors import ConfigError, DataError, MissingExtra, Unsupported

if TYPE_CHECKING:
    from casehard.bench.store import RunFolder

BAD_INPUT = (ConfigError, DataError, MissingExtra, Unsupported)


def check_out(out: Path, kind: str) -> None:
    """Refuse an output folder that holds something else than an unfinished run of the same kind.

    Raises:
        ConfigError: names what is there.
    """
    from casehard.bench.store import read_json

    hint = "give another folder with --out, or remove this one"
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} exists and is not a folder", hint=hint)
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / "run.json").is_file():
        raise ConfigError(f"{out} is not empty and is not a run folder of casehard", hint=hint)
    run = read_json(out / "run.json")
    if run.get("kind") != kind:
        raise ConfigError(f"{out} holds a run of {run.get('kind')!r}, not of {kind!r}", hint=hint)
    if run.get("status") == "ok":
        raise ConfigError(f"{out} already holds a finished run", hint=hint)


@contextmanager
def run_folder(
    out: Path,
    kind: str,
    config: Mapping[str, Any],
    *,
    seeds: Iterable[int] = (),
    data: Iterable[str] = (),
) -> Iterator[RunFolder]:
    """Open the run folder of a verb; bad input found inside leaves no new folder behind.

    Args:
        data: file specs whose digests are recorded.
    """
    from casehard.bench.store import RunFolder

    check_out(out, kind)
    new = not out.exists()
    digests = {spec: file_digest(spec) for spec in data}
    try:
        with RunFolder(out, kind, config, seeds=seeds, data=digests) as run:
            yield run
    except BAD_INPUT:
        if new:
            _remove_record(out)
        raise


def _remove_record(out: Path) -> None:
    """Remove a folder that holds nothing but the record of the failure."""
    if {p.name for p in out.iterdir()} <= {"run.json", "events.jsonl"}:
        for path in out.iterdir():
            path.unlink()
        out.rmdir()


def file_digest(spec: str) -> str:
    """Return the SHA-256 of the file behind a data spec; of every file when it is a folder; "" for a hub spec."""
    path = Path(spec.partition("?")[0])
    if spec.startswith("hub:"):
        return ""
    sha = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as handle:
            sha.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return sha.hexdigest()
