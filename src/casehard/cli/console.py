"""What the user reads: the plan of a command, its closing table, and errors in one shape."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from casehard.errors import UserError, visible

LONGEST = 2000
"""Characters of a message that are shown."""


def debugging() -> bool:
    """Return whether tracebacks are wanted (``--debug`` or CASEHARD_DEBUG=1)."""
    return os.environ.get("CASEHARD_DEBUG", "") not in ("", "0")


def write(text: str, stream: TextIO | None = None) -> None:
    """Write lines; nothing in them is obeyed by a terminal."""
    _put(visible(text, lines=True), stream or sys.stdout)


def _put(text: str, stream: TextIO) -> None:
    """Write text at once (the next may be minutes away); when nobody reads any more, go on without.

    A reader that leaves early (``| head``) must neither stop the work nor change its exit code.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe, or a terminal, that is gone
            raise
        mute(stream)


def mute(stream: TextIO) -> None:
    """Send the rest of a broken stream nowhere; the interpreter flushes it once more at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(text: str) -> None:
    """Print one line to stdout, without markup."""
    write(f"{visible(text)}\n")


def warn(text: str) -> None:
    """Print one warning line to stderr."""
    write(f"warning: {_line(text)}\n", sys.stderr)


def note(text: str) -> None:
    """Print one line to stderr about something that is as it should be."""
    write(f"note: {text}\n", sys.stderr)


def fail(message: str, hint: str = "") -> None:
    """Print ``error:`` and ``hint:`` lines to stderr."""
    write(f"error: {_line(message)}\n" + (f"hint: {_line(hint)}\n" if hint else ""), sys.stderr)


def _line(text: str) -> str:
    """Return a message as one line, what others put into it cut to what can be read."""
    text = visible(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"


def shown(value: Any) -> str:
    """Return a value the way the plan shows it: paths relative to the working folder, lists joined."""
    if isinstance(value, Path):
        try:
            return str(value.resolve().relative_to(Path.cwd()))
        except (ValueError, OSError):
            return str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={shown(v)}" for k, v in value.items()) or "defaults"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(shown(v) for v in value)
    return str(value)


def plan(title: str, items: Mapping[str, Any]) -> None:
    """Print what is about to happen: a sentence, then one aligned line per setting; None and "" are left out."""
    say(title)
    kept = {k: v for k, v in items.items() if v is not None and v != "" and v != []}
    width = max((len(visible(k)) for k in kept), default=0)
    for name, value in kept.items():
        say(f"  {visible(name):<{width}}  {shown(value)}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, stderr: bool = False) -> None:
    """Print a short rich table; text is shown as it is, never read as markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def plain(value: Any) -> Text:
        return Text(visible(str(value)))

    grid = Table(title=plain(title), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        grid.add_column(plain(column), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*map(plain, row))
    stream = sys.stderr if stderr else sys.stdout
    console = Console(file=stream, highlight=False)
    if not console.is_terminal and console.width < 110:
        console = Console(file=stream, highlight=False, width=110)
    # Rich ends the program when its reader is gone, so it only draws.
    with console.capture() as drawn:
        console.print(grid)
    _put(drawn.get(), stream)


def made(what: str, path: Path) -> None:
    """Print the closing line of a command: what was made and where it is."""
    say(f"{what}: {shown(path)}")


def os_error(error: OSError) -> UserError:
    """Turn an operating-system refusal into an error with the path seen and a hint."""
    import errno

    from casehard.errors import ConfigError, StorageError

    name = error.filename if error.filename is not None else "a file"
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(f"cannot write {name}: {reason}", hint="free space or give another folder with --out")
    if error.errno == errno.EROFS:
        return StorageError(f"cannot write {name}: {reason}", hint="give a writable folder with --out")
    hints = {
        errno.ENOENT: "check the path",
        errno.EACCES: "check the permissions of the path",
        errno.EEXIST: "give another path with --out",
        errno.ENAMETOOLONG: "give a shorter path",
    }
    return ConfigError(f"{name}: {reason}", hint=hints.get(error.errno or 0, "check the path"))
