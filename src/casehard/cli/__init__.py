"""The command line: one file per verb. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import cache
from types import FrameType
from typing import Any, NoReturn, TextIO

from casehard.cli import console
from casehard.errors import Note, UserError, is_panic
from casehard.io.logs import LibraryLogs

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
BROKEN_PIPE = 141  # 128 + SIGPIPE, as any other program that writes to a closed pipe


class _Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that staging folders are removed on the way out just as on Ctrl-C."""


def _on_term(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _on_hangup(number: int, frame: FrameType | None) -> None:
    """A terminal that closed stops the work as SIGTERM does, whoever listens for that: nothing is left lying about."""
    os.kill(os.getpid(), signal.SIGTERM)


class _Messages(LibraryLogs):
    """Warnings and log records of libraries: each said once, as a line for users rather than for programmers."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def tell(self, text: str, whence: str, *, harmless: bool = False) -> None:
        text = " ".join(text.split())
        if text not in self._told:
            self._told.add(text)
            (console.note if harmless else console.warn)(f"{text} ({whence})" if console.debugging() else text)

    def show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Be ``warnings.showwarning``."""
        self.tell(str(message), f"{category.__name__}, {filename}:{lineno}", harmless=issubclass(category, Note))

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        whence = f"{record.name}, {record.pathname}:{record.lineno}"
        self.tell(record.getMessage(), whence, harmless=record.levelno < logging.WARNING)


@cache
def _command() -> Any:
    """Return all commands as typer builds them from their functions, which is not done twice in a process."""
    import typer

    from casehard.cli.app import app

    return typer.main.get_command(app)


def _invoke(arguments: list[str]) -> int:
    """Parse and run one command; typer's own main would swallow signals and print errors in another shape."""
    import typer

    command = _command()
    try:
        with command.make_context("casehard", arguments) as context:
            result = command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    return result if isinstance(result, int) else 0


def _usage(error: BaseException) -> int:
    """Print a mistake in the arguments (an exception of typer's parser) and return its exit code."""
    context = getattr(error, "ctx", None)
    message = str(getattr(error, "format_message")()).strip()  # noqa: B009  no public base class to name
    if type(error).__name__ == "NoArgsIsHelpError":
        console.write(f"{message}\n")
        return 2
    message = message[:1].lower() + message[1:].rstrip(".")
    console.fail(message, f"see {context.command_path if context else 'casehard'} --help")
    return 2


def _run(arguments: list[str]) -> int:
    try:
        return _invoke(arguments)
    except KeyboardInterrupt as stop:
        code = TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED
        console.fail("stopped by SIGTERM" if code == TERMINATED else "interrupted")
        return code
    except UserError as error:
        # A launcher ends its other processes just when the first one leaves with an error; the code is decided.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if console.debugging():
            console.write(traceback.format_exc(), sys.stderr)
        console.fail(error.message, error.hint)
        return error.exit_code
    except BrokenPipeError:
        # Only what is printed past the console (a help page) gets here; the work itself never does.
        console.mute(sys.stdout)
        return BROKEN_PIPE
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if hasattr(error, "format_message"):
            return _usage(error)
        if console.debugging():
            console.write(traceback.format_exc(), sys.stderr)
        if isinstance(error, OSError):
            told = console.os_error(error)
            console.fail(told.message, told.hint)
            return told.exit_code
        console.fail(
            f"internal error: {type(error).__name__}: {error}",
            "this is a defect of casehard: run again with --debug and report what it prints",
        )
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program name; ``sys.argv[1:]`` by default.

    Returns:
        0, or the exit code of the error whose message and hint were printed; tracebacks only with ``--debug`` or
        CASEHARD_DEBUG=1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in arguments:
        arguments.remove("--debug")
        os.environ["CASEHARD_DEBUG"] = "1"
    # Two progress displays at once garble each other; ours stays.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    previous, shown = signal.signal(signal.SIGTERM, _on_term), warnings.showwarning
    hangup = signal.getsignal(signal.SIGHUP)
    if hangup is signal.SIG_DFL:  # nohup asks to be left alone
        signal.signal(signal.SIGHUP, _on_hangup)
    messages, records = _Messages(), logging.getLogRecordFactory()
    warnings.showwarning = messages.show
    logging.setLogRecordFactory(messages.records(records))
    try:
        return _run(arguments)
    finally:
        warnings.showwarning = shown
        logging.setLogRecordFactory(records)
        messages.give_back()
        signal.signal(signal.SIGTERM, previous)
        if hangup is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, hangup)


def script() -> NoReturn:
    """Run the command line as the program of this process."""
    launched = os.environ.get("WORLD_SIZE", "1") != "1"  # asked first: a run changes it
    code = main()
    if not launched:
        sys.exit(code)
    # Not through the interpreter's end. torch's caches of sharded tensors keep a process group past its destruction,
    # and a thread of gloo may not yet have dropped the tensors of the last collective: asking for the interpreter's
    # lock during its end aborts the process, exit code 134 after a whole run.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(code)
