"""Run folders: what every command leaves behind, complete or plainly marked as not.

run.json      what ran, on what, from what, how it ended: the only file with times in it
events.jsonl  one line per thing that happened, appended
rows.jsonl    one line per prompt; readable by the owner only, because it holds what attacked models said
summary.json  the numbers
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
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from casehard import __version__
from casehard.compat import version_of
from casehard.config import digest
from casehard.errors import Corrupt, Interrupted
from casehard.files import read_json as read_json
from casehard.files import write_text_atomic
from casehard.secrets import Redactor, redact

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


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file.

    Raises:
        Corrupt: a line is not JSON; the message names it.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise Corrupt(f"{path}, line {number}: not JSON: {error}") from None


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
        self.out.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        self._problem = ""
        self._peak = 0
        self.measures_memory = True
        """False where the process's peak is not this run's: its peak is then null."""
        self.info: dict[str, Any] = {
            "kind": kind,
            "status": "running",
            "config": dict(config),
            "config_digest": digest(dict(config)),
            "seeds": list(seeds),
            "parents": dict(parents or {}),
            "data": dict(data or {}),
            **provenance(),
            "started": _now(),
        }

    def __enter__(self) -> RunFolder:
        self._save()
        self.event("started")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish("failed" if self._problem else "ok", self._problem)
        elif isinstance(error, KeyboardInterrupt | Interrupted):
            self.finish("interrupted", str(error) or "interrupted")
        else:
            self.finish("failed", f"{type(error).__name__}: {error}")

    def fail(self, problem: str) -> None:
        """Mark a run that goes on to its end, but whose result is not whole, as failed."""
        self._problem = problem

    def saw_peak(self, peak: int | None) -> None:
        """Count the peak memory of a part that ran elsewhere, or before the process's own peak was reset."""
        self._peak = max(self._peak, peak or 0)

    def _save(self) -> None:
        write_text_atomic(self.out / "run.json", _json(self.info, indent=1) + "\n")

    def record(self, values: Mapping[str, Any]) -> None:
        """Add facts learned on the way (digests, versions) to run.json."""
        self.info.update(values)
        self._save()

    def event(self, name: str, values: Mapping[str, Any] | None = None) -> None:
        """Append one line to events.jsonl."""
        with (self.out / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(_json({"time": _now(), "event": name, **(values or {})}) + "\n")

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> str:
        """Write rows.jsonl whole, readable by the owner only; return its SHA-256."""
        return write_rows(self.out / "rows.jsonl", rows)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json whole."""
        write_text_atomic(self.out / "summary.json", _json(values, indent=1) + "\n")

    def finish(self, status: Status, error: str = "") -> None:
        """Set the final status, wall time and peak memory."""
        from casehard.train.meter import peak_bytes

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


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write JSONL through a private temporary file, so that it is never readable by others nor half-written.

    Returns:
        SHA-256 of the file.
    """
    redactor = Redactor()
    staging = path.with_name(path.name + ".part")
    sha = hashlib.sha256()
    staging.unlink(missing_ok=True)
    handle = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            for row in rows:
                line = f"{json.dumps(redactor.values(row), ensure_ascii=True)}\n".encode()
                sha.update(line)
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    return sha.hexdigest()
