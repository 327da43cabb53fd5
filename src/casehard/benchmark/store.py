"""Run folders: what every command leaves behind, complete or plainly marked as not.

run.json      what ran, on what, from what, how it ended, what it took, and the digests of the two files below
events.jsonl  one line per thing that happened, with its time, appended
rows.jsonl    one line per prompt; readable by the owner only, because it holds what attacked models said
summary.json  the numbers: the same bytes for the same settings and seed
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from casehard import __version__
from casehard.benchmark.shapes import Begun, Event, Finished
from casehard.compat import version_of
from casehard.config import digest
from casehard.errors import Corrupt, Interrupted, StorageError
from casehard.io import stored
from casehard.io.disk import make_folder, storage_errors
from casehard.io.files import read_json as read_json
from casehard.io.files import replacing, write_text_atomic
from casehard.io.manifest import file_digest
from casehard.io.secrets import Redactor, redact

Status = Literal["running", "ok", "failed", "interrupted"]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "trl", "datasets")


def _json(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(redact(value), indent=indent, ensure_ascii=True)


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def _code() -> dict[str, Any]:
    """Return version, commit and dirty flag of the source tree; no commit for an installed wheel."""
    root = Path(__file__).resolve().parents[3]
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    dirty = bool(_git(root, "status", "--porcelain", "--", "src")) if commit else None
    return {"version": __version__, "commit": commit, "dirty": dirty}


@cache
def _versions() -> dict[str, str]:
    found = {name: version_of(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """Return processor, cores, memory and, when torch is already loaded, the GPUs it sees."""
    out: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        out["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch = sys.modules.get("torch")
    if torch is not None:
        out["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            out["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return out


def provenance() -> dict[str, Any]:
    """Return what does not change from one run to the next on one machine: code, packages, hardware."""
    return {"code": dict(_code()), "packages": dict(_versions()), "hardware": hardware()}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_run(place: Path) -> dict[str, Any]:
    """Return the run.json of a run, however far it has come.

    Raises:
        UserError: there is none.
        Corrupt: it is damaged.
    """
    return stored.read(place / "run.json", Begun)


def read_finished(place: Path) -> dict[str, Any]:
    """Return the run.json of a run that came to its end.

    Raises:
        Corrupt: it is damaged.
    """
    path = place / "run.json"
    run = stored.read(path, Finished)
    if (actual := digest(run["config"])) != run["config_digest"]:
        raise Corrupt(f"{path}: config was changed: expected sha256 {run['config_digest']}, actual {actual}")
    return run


def unchanged(place: Path, run: Mapping[str, Any], name: str) -> Path:
    """Return the path of a file of a finished run, which is as that run left it.

    Args:
        run: its run.json; one of an older version records no digests.

    Raises:
        Corrupt: the file is missing or was changed.
    """
    path, expected = place / name, run.get("files", {}).get(name)
    if not path.is_file():
        raise Corrupt(f"{path} is missing", hint="take another copy of the run folder, or run it again")
    if expected is not None and (actual := file_digest(path)) != expected:
        raise Corrupt(
            f"{path} was changed: expected sha256 {expected}, actual {actual}",
            hint="take another copy of the run folder, or run it again",
        )
    return path


def read_summary(place: Path, run: Mapping[str, Any], shape: Any) -> dict[str, Any]:
    """Return the summary.json of a finished run, together with what the run took.

    Raises:
        Corrupt: it is missing, damaged, or not that of this run.
    """
    path = unchanged(place, run, "summary.json")
    whole = stored.together(read_json(path), run.get("took"), place / "run.json")
    return dict(stored.checked(whole, shape, path))


def read_rows(path: Path, shape: Any = dict) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file.

    Raises:
        Corrupt: a line is not JSON, or not an object of the shape; the message names it.
    """
    return stored.read_lines(path, shape)


def read_events(place: Path) -> list[dict[str, Any]]:
    """Return what happened in the last run in a folder: one that was killed there before it left its events.

    Raises:
        Corrupt: a line is damaged.
    """
    path = place / "events.jsonl"
    last: list[dict[str, Any]] = []
    for event in stored.read_lines(path, Event) if path.is_file() else ():
        last = [event] if event["event"] == "started" else [*last, event]
    return last


class RunFolder:
    """A run folder being written; use it as a context manager around the work.

    Leaving the block marks the run ``ok``; an exception marks it ``failed`` (or ``interrupted``) and goes on.

    Args:
        out: the folder, made if missing.
        kind: the verb: defend, attack, evaluate, bench ...
        config: everything the result depends on.
        seeds: seeds used.
        parents: name -> digest of each checkpoint it starts from.
        data: name -> digest of each data file it reads.
    """

    def __init__(
        self,
        out: str | Path,
        kind: str,
        config: Mapping[str, Any],
        *,
        seeds: Iterable[int] = (),
        parents: Mapping[str, str] | None = None,
        data: Mapping[str, str] | None = None,
    ) -> None:
        self.out = Path(out)
        make_folder(self.out)
        self._started = time.monotonic()
        self._problem = ""
        self._peak = 0
        self.measures_memory = True
        """False where the process's peak is not this run's: its peak is then null."""
        self.info: dict[str, Any] = {
            "kind": kind,
            "status": "running",
            "config": dict(config),
            "config_digest": digest(redact(config)),  # as it will be read back
            "seeds": list(seeds),
            "parents": dict(parents or {}),
            "data": dict(data or {}),
            **provenance(),
            "started": _now(),
            "files": {},
        }

    def __enter__(self) -> RunFolder:
        self._save()
        _end_line(self.out / "events.jsonl")
        self.event("started")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish("failed" if self._problem else "ok", self._problem)
            return
        with suppress(StorageError):  # a full disk: what went wrong first says more
            if isinstance(error, KeyboardInterrupt | Interrupted):
                self.finish("interrupted", str(error) or "interrupted")
            else:
                self.finish("failed", f"{type(error).__name__}: {error}")

    def fail(self, problem: str) -> None:
        """Mark a run that goes on to its end, but whose result is not whole, as failed."""
        self._problem = problem

    def saw_peak(self, peak: int | None) -> None:
        """int the peak memory of a part that ran elsewhere, or before the process's own peak was reset."""
        self._peak = max(self._peak, peak or 0)

    def _save(self) -> None:
        write_text_atomic(self.out / "run.json", _json(self.info, indent=1) + "\n")

    def record(self, values: Mapping[str, Any]) -> None:
        """Add facts learned on the way (digests, versions) to run.json."""
        self.info.update(values)
        self._save()

    def event(self, name: str, values: Mapping[str, Any] | None = None) -> None:
        """Append one line to events.jsonl."""
        line = _json({"time": _now(), "event": name, **(values or {})}) + "\n"
        _append(self.out / "events.jsonl", line.encode())

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> str:
        """Write rows.jsonl whole, readable by the owner only; return its SHA-256."""
        self.info["files"]["rows.jsonl"] = sha = write_rows(self.out / "rows.jsonl", rows)
        return sha

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json whole; what the run took stands in run.json, in the same places."""
        kept, self.info["took"] = stored.apart(redact(values))
        text = _json(kept, indent=1) + "\n"
        write_text_atomic(self.out / "summary.json", text)
        self.info["files"]["summary.json"] = hashlib.sha256(text.encode()).hexdigest()

    def finish(self, status: Status, error: str = "") -> None:
        """Set the final status, wall time and peak memory."""
        from casehard.train.cost import peak_bytes

        self.info.update(
            status=status,
            ended=_now(),
            wall_seconds=round(time.monotonic() - self._started, 3),
            peak_bytes=max(self._peak, peak_bytes()) if self.measures_memory else None,
            hardware=hardware(),
        )
        if error:
            self.info["error"] = error
        self._save()
        self.event(status, {"error": error} if error else None)


def _append(path: Path, line: bytes) -> None:
    """Add a line to a file, whole or not at all."""
    with storage_errors(path.parent, needs=len(line)), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(before)
            raise


def _end_line(path: Path) -> None:
    """Drop the line that a killed process did not finish."""
    if path.is_file():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write JSONL that is never readable by others nor half-written.

    Returns:
        SHA-256 of the file.
    """
    redactor, sha = Redactor(), hashlib.sha256()
    with replacing(path, private=True) as fresh, fresh.open("wb") as file:
        for row in rows:
            line = f"{json.dumps(redactor.values(row), ensure_ascii=True)}\n".encode()
            sha.update(line)
            file.write(line)
    return sha.hexdigest()
