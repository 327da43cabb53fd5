"""An attacker in a process of its own on this machine, which ends with the defender."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LEASH = (sys.executable, "-m", "casehard.io.leash")


RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")


class _Child:
    """A started attacker and what it printed last."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def ended(self) -> str:
        """Return why it ended, or "" while it runs."""
        code = self.process.poll()
        if code is None:
            return ""
        said = self.log.read_text(errors="replace").strip().splitlines()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process {self.process.pid} ended, {how}" + (f": {said[-1]}" if said else "")


def _without_secrets() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not re.search("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", k.upper())}


def _worker(store: Path, number: int) -> list[str]:
    return ["casehard.defences.patcher.workers.worker", str(store), str(number)]


@contextlib.contextmanager
def child_process(store: Path, number: int, device: str) -> Iterator[_Child]:
    log = store.with_name(f"attacker-{number}.log")
    # Closed when this process ends, and by nothing else: the attacker gets the watched end only.
    watched, held = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, held)
        try:
            with log.open("wb") as sink:
                process = subprocess.Popen(
                    [*LEASH, str(watched), str(store.parent), *_worker(store, number)],
                    env={**_without_secrets(), "CASEHARD_ATTACKER_DEVICE": device},
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    pass_fds=[watched],
                    start_new_session=True,  # Ctrl-C is for the defender, which then stops its attackers
                )
        finally:
            os.close(watched)
        stack.callback(_end, process)
        yield _Child(process, log)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait a moment for an attacker that was told to stop, then stop it: it holds nothing worth saving."""
    deadline = time.monotonic() + 2.0
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        process.kill()
    process.wait()
