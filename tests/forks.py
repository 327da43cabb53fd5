"""Processes of their own without the seconds that each would spend on importing torch.

One server a test process imports what others wrote, and every child is forked from it. Nothing of casehard is among
that: a child imports it as the program does. What a new interpreter decides is tested with one.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preloaded"])
OURS = ("CASEHARD_", "GROUP_", "LOCAL_", "MASTER_", "PYTEST_", "RANK", "ROLE_", "TMPDIR", "TORCHELASTIC_", "WORLD_SIZE")
OURS += ("HF_TOKEN", "OPENAI_API_KEY")
"""Variables that nothing reads while it is imported: a child may have others than the server had."""
SAME = ("HF_HUB_DISABLE_PROGRESS_BARS", "USE_HUB_KERNELS")
"""Variables that casehard sets before it imports what reads them, and ``preloaded`` with it."""
_server_env: dict[str, str] = {}


def ensure_running() -> None:
    """Start the server if there is none; it finds what to import through the environment only."""
    if not _server_env:
        _server_env.update(os.environ)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), before)))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def started(fn, *args):
    """Return a process that runs a function of a module, started."""
    ensure_running()
    process = CONTEXT.Process(target=fn, args=args)
    process.start()
    return process


def spawn(fn, args, nprocs):
    """Run ``fn(rank, *args)`` in ``nprocs`` processes that may form a process group; raise what one of them raised."""
    import torch.multiprocessing as mp

    ensure_running()
    mp.start_processes(_and_leave, (fn, *args), nprocs=nprocs, start_method="forkserver")


def _and_leave(rank, fn, *args):
    """Leave as ``casehard.cli.script`` does: a gloo thread that drops a tensor at the interpreter's end aborts it."""
    fn(rank, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def can_fork(env: dict[str, str]) -> bool:
    """Return whether a child of the server is what a new process with this environment would be."""
    ensure_running()
    changed = {name for name, _ in env.items() ^ _server_env.items()}
    return all(name.startswith(OURS) or name in SAME for name in changed)


class Command:
    """The command line in a process of its own: what a test needs of ``subprocess.Popen``."""

    def __init__(
        self,
        arguments: list[object],
        *,
        env: dict[str, str] | None = None,
        cwd: object = None,
        first: Callable[[], object] | None = None,
    ) -> None:
        self._said = tempfile.TemporaryDirectory(prefix="casehard-said-")
        self._files = [Path(self._said.name) / name for name in ("out", "err")]
        env = {**os.environ, **(env or {})}
        assert can_fork(env), "this environment decides what is imported: use a new interpreter"
        words = [str(word) for word in arguments]
        given = (words, env, str(cwd or Path.cwd()), [str(path) for path in self._files], first)
        self.process = CONTEXT.Process(target=_command, args=given)
        self.process.start()

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it."""
        self.process.kill()

    def wait(self, timeout: float = 240) -> int:
        """Return its exit code; kill it and raise when it takes longer."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.process.name, timeout, *self.said())
        return self.process.exitcode

    def said(self) -> tuple[str, str]:
        """Return what it wrote so far to standard output and standard error."""
        return tuple(p.read_text(encoding="utf-8") if p.exists() else "" for p in self._files)

    def done(self, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait for its end and return it."""
        return subprocess.CompletedProcess([], self.wait(timeout), *self.said())


class Ranks:
    """The command line in several processes, told of each other as torchrun tells them, which keeps their store."""

    def __init__(self, ranks: int, arguments: list[object], *, cwd: object = None) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "TORCHELASTIC_RESTART_COUNT": "0"}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "0"}
        place |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(ranks))
        own = [dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank)) for rank in range(ranks)]
        self.commands = [Command(arguments, env={**place, **mine}, cwd=cwd) for mine in own]

    def poll(self) -> int | None:
        """Return the exit code of a rank that failed, or None; end the others then."""
        for code in (command.poll() for command in self.commands):
            if code:
                self.kill()
                return code
        return None

    def send_signal(self, number: int) -> None:
        """Pass a signal on to every rank."""
        for command in self.commands:
            command.send_signal(number)

    def kill(self) -> None:
        """End them."""
        for command in self.commands:
            command.kill()

    def done(self, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait for the end of all; return the first exit code that is not 0 and what they said, rank by rank."""
        deadline, codes = time.monotonic() + timeout, [None]
        while None in codes:
            codes = [command.poll() for command in self.commands]
            if any(codes) or time.monotonic() > deadline:
                time.sleep(1)  # the others notice, or are ended
                self.kill()
            time.sleep(0.02)
        said = ["".join(part) for part in zip(*(command.said() for command in self.commands), strict=True)]
        return subprocess.CompletedProcess([], next((code for code in codes if code), 0), *said)


def _command(
    words: list[str], env: dict[str, str], cwd: str, files: list[str], first: Callable[[], object] | None
) -> None:
    """Become ``casehard`` with these arguments."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    tempfile.tempdir = None
    for number, path in enumerate(files, start=1):
        there = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(there, number)
        os.close(there)
    sys.argv = ["casehard", *words]
    if first is not None:
        first()
    code = 1
    try:
        from casehard.cli import script

        script()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # a forked child of multiprocessing leaves without them
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
