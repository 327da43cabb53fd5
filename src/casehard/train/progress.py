"""Progress for everything long: a bar on a terminal, a line every few seconds elsewhere, silence on request."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Any

from casehard.errors import visible

quiet = False
"""Set to True (:func:`set_quiet`) to print nothing at all."""

SECONDS_BETWEEN_LINES = 10.0
_bar: Any = None
_users = 0


def set_quiet(value: bool = True) -> None:
    """Switch all progress off or on."""
    global quiet
    quiet = value


def announce(text: str) -> None:
    """Print one line on what comes next and may take a while."""
    if not quiet:
        # Nobody reading any more is no reason to stop working.
        with contextlib.suppress(OSError):  # a pipe or a terminal that is gone
            print(text, file=sys.stderr, flush=True)


class Progress:
    """Show how far a task is; use as ``with progress("train", 300) as bar: bar.advance(1, loss=0.7)``.

    Bars may nest: an inner one becomes a second line of the outer one.

    Args:
        label: what is being done.
        total: units of work; None if unknown.
    """

    def __init__(self, label: str, total: int | None = None) -> None:
        self.label = visible(label)
        self.total = total
        self.done = 0
        self._text = ""
        self._running: int | None = None
        self._task: Any = None
        self._bar: Any = None
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        self._started = self._printed = time.monotonic()
        if not quiet and sys.stderr.isatty():
            self._bar = _acquire()
            self._task = self._bar.add_task(self.label, total=self.total, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._show(force=True)
            _release()
            self._bar = None
        elif kind is None and time.monotonic() - self._started > 1.0:
            self._line()

    def advance(self, n: int = 1, *, loss: float | None = None, note: str = "") -> None:
        """Count ``n`` more units as done; ``loss`` and ``note`` replace what is shown behind the count."""
        self.done += n
        if loss is not None or note:
            self._text = visible(" ".join(t for t in (f"loss {loss:.4g}" if loss is not None else "", note) if t))
        self._show()

    def busy(self, running: int) -> None:
        """Say how many units are being worked on at this moment; where this is known, it stands beside the count."""
        changed, self._running = running != self._running, running
        self._show(force=changed)

    def _show(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if self._bar is not None:
            # The bar redraws ten times a second; telling it more often only costs time.
            if force or now - self._printed > 0.1:
                self._printed = now
                note = ", ".join(t for t in (f"{self._running} running" if self._running else "", self._text) if t)
                self._bar.update(self._task, completed=self.done, note=note)
        elif now - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = now
            self._line()

    def _line(self) -> None:
        if self._running is None:
            said = f"{self.done}/{self.total}" if self.total is not None else f"{self.done}"
        else:
            of = f" of {self.total}" if self.total is not None else ""
            said = f"{self.done} done, {self._running} running{of}" + ("," if self._text else "")
        said += f" {self._text}" if self._text else ""
        announce(f"{self.label}: {said} [{time.monotonic() - self._started:.0f} s]")


def progress(label: str, total: int | None = None) -> Progress:
    """Return a :class:`Progress`; reads better in a ``with`` statement."""
    return Progress(label, total)


def _acquire() -> Any:
    """Return the one live display, started on first use: a terminal can show only one."""
    global _bar, _users
    if _bar is None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        # The note takes what is left: on a narrow terminal it is cut, and never a count or a time.
        _bar = RichProgress(
            TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", max_width=28)
            ),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn(
                "{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            expand=True,
        )
        _bar.start()
    _users += 1
    return _bar


def _release() -> None:
    global _bar, _users
    _users -= 1
    if _users == 0:
        _bar.stop()
        _bar = None
