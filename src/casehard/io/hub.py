"""Questions to a Hub of huggingface_hub or datasets: none is waited for without end, and what they log is a warning."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from typing import Any

PATIENCE = 10.0
"""Seconds until a question that a Hub does not answer is given up."""
TRIES = 2
"""Questions in a row without an answer until the Hub is given up."""
SILENT = "no answer"
_LOGGERS = ("huggingface_hub", "datasets")


class Silence(Exception):
    """A Hub that takes questions and does not answer them."""


class _Warner(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warnings.warn(record.getMessage(), stacklevel=7)


@contextlib.contextmanager
def answers() -> Iterator[None]:
    """Ask a Hub with a limit of time for each question; whatever the client logs reaches the user as a warning.

    The client asks some of its questions (which files there are) without any limit, and asks again and again where
    there is one. The transfer of a file takes as long as it takes while bytes arrive.

    Raises:
        Silence: several questions in a row stayed without an answer.
    """
    from huggingface_hub import get_session

    since: list[float] = []  # when the first of the questions was asked that nothing was answered after

    def ask(request: Any) -> None:
        if since and time.monotonic() - since[0] > TRIES * PATIENCE:
            raise Silence(SILENT)
        since.append(time.monotonic())
        limits = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            kind: min(limits.get(kind) or PATIENCE, PATIENCE) for kind in ("connect", "read", "write", "pool")
        }

    def answered(response: Any) -> None:
        since.clear()

    hooks = get_session().event_hooks
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.handlers for logger in loggers]
    hooks["request"].append(ask)
    hooks["response"].append(answered)
    for logger in loggers:
        logger.handlers = [_Warner(logging.WARNING)]
    try:
        yield
    finally:
        hooks["request"].remove(ask)
        hooks["response"].remove(answered)
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers = handlers
