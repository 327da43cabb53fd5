"""Programs of somebody else: started without a shell and without secrets, and ended with all that they started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from casehard.errors import ConfigError, Refused, UserError, visible
from casehard.io.secrets import environment

ALLOWED = "CASEHARD_EXTERNAL"
"""Environment variable that has to be 1 before a program that settings name is started."""
COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TAIL = 1500
"""Last characters of what the program said on stderr that an error shows."""


def require_allowed(program: str) -> None:
    """Refuse a program that settings name, which may be a stranger's, unless the environment allows programs.

    Raises:
        Refused: it does not.
    """
    if os.environ.get(ALLOWED) != "1":
        raise Refused(
            f"settings ask to run the program {visible(program)!r}",
            hint=f"read the command, then set {ALLOWED}=1 in the environment",
        )


def run_program(
    command: Sequence[str], place: Path, *, seconds: float, more_time: str = "config.minutes: more"
) -> None:
    """Run a program in ``place``, without the secrets of the environment, and wait for its end.

    What it says on stderr stays in ``place/stderr``.

    Args:
        more_time: hint where it takes too long.

    Raises:
        ConfigError: no such program.
        UserError: it failed, or did not end in time; the whole process group is killed then.
    """
    secret = environment()
    kept = {name: value for name, value in os.environ.items() if name not in secret}
    with (place / "stderr").open("w+b") as said:
        try:
            process = subprocess.Popen(
                command,
                cwd=place,
                env=kept,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(
                f"{command[0]!r} cannot be run: {error.strerror}", hint="the program's full path?"
            ) from None
        try:
            code = process.wait(timeout=seconds)
            _end_group(process.pid)  # what it left behind would go on writing in ``place``
        except BaseException as error:  # an interrupt too: nobody else ends a process of another session
            _end_group(process.pid)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            what = f"{command[0]} did not end within {seconds / 60:g} minutes and was killed"
            raise UserError(what + _tail(said), hint=more_time) from None
        if code != 0:
            raise UserError(
                f"{command[0]} failed with exit code {code}" + _tail(said), hint="run it by hand to see more"
            )


def _end_group(leader: int) -> None:
    """Kill a process with everything it started in its group; all of it may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _tail(said: Any) -> str:
    """Return the end of what a program said on stderr, for a message of one line."""
    said.seek(0, os.SEEK_END)
    said.seek(max(0, said.tell() - TAIL))
    text = COLOUR.sub("", said.read().decode("utf-8", "replace"))
    lines = [line for line in map(str.strip, re.split(r"[\r\n]+", text)) if line]
    return f"; stderr ends: {visible(' | '.join(lines))}" if lines else "; it said nothing on stderr"
