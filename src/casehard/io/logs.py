"""What libraries log, handed to whoever speaks to the user; files and the like that somebody set up stay."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

from casehard.errors import visible

Factory = Callable[..., logging.LogRecord]


class LibraryLogs(logging.Handler):
    """Takes the place of the stream handlers of every library that logs anything."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[str, list[logging.Handler]] = {}

    def records(self, make: Factory) -> Factory:
        """Return a maker of log records that takes a library over when it logs for the first time.

        Handlers are exchanged then, because a library installs its own while it is imported, by whichever verb.
        """

        def made(*values: Any, **named: Any) -> logging.LogRecord:
            record = make(*values, **named)
            with contextlib.suppress(Exception):  # a record that cannot be formatted is logging's to complain about
                # Libraries log names and values of others: a terminal must not obey them.
                record.msg, record.args = visible(record.getMessage(), lines=True), None
            self._take(record.name.partition(".")[0])
            return record

        return made

    def _take(self, library: str) -> None:
        logger = logging.getLogger(library)
        if library != "root" and self not in logger.handlers:
            self._taken.setdefault(library, logger.handlers)
            logger.handlers = [h for h in logger.handlers if type(h) is not logging.StreamHandler] + [self]

    def give_back(self) -> None:
        """Put every library's handlers back."""
        for library, handlers in self._taken.items():
            logging.getLogger(library).handlers = handlers


class AsWarnings(LibraryLogs):
    """Turns warnings and errors of libraries into Python warnings, which a worker process hands to its caller."""

    def emit(self, record: logging.LogRecord) -> None:
        """Warn, from the place in the library."""
        if record.levelno >= logging.WARNING:
            warnings.warn_explicit(record.getMessage(), UserWarning, record.pathname, record.lineno)
