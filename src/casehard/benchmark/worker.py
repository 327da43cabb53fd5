"""A node's work as its caller sees it, in this process or a worker: what went wrong comes back as plain values."""

from __future__ import annotations

import builtins
import logging
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from casehard.errors import Interrupted, StorageError, UserError
from casehard.io.leash import end_with
from casehard.io.logs import AsWarnings
from casehard.train import progress

if TYPE_CHECKING:
    from casehard.benchmark.execute import Executor, Task


def attempt(task: Task, executor: Executor) -> dict[str, Any]:
    """Run :func:`work`; return ``{"summary": ...}``, or ``{"error", "message", "hint"}`` for a failure.

    Errors travel as plain values, because an exception that cannot be unpickled would take the worker down with it.

    Raises:
        Interrupted: the run was asked to stop, which is no failure of this node and no reason to begin the next.
        StorageError: the disk is full or closed; so it will be for the next.
    """
    from casehard.benchmark.execute import work

    try:
        return work(task, executor)
    except (Interrupted, StorageError):
        raise
    except Exception as error:
        return describe(error)


def attempt_apart(task: Task, executor: Executor) -> dict[str, Any]:
    """Do what :func:`attempt` does in a worker process; what it raises comes back as ``interrupted`` or
    ``storage``.

    Warnings come back as plain values under ``warnings``, for :func:`warn_again`: the caller decides what becomes of
    them, and sees those of all workers.
    """
    with warnings.catch_warnings(record=True) as told:
        try:
            result = attempt(task, executor)
        except Interrupted as error:
            result = {"interrupted": error.exit_code}
        except StorageError as error:
            result = {"storage": error.message, "hint": error.hint}
    result["warnings"] = [(str(w.message), w.category.__name__, w.filename, w.lineno) for w in told]
    return result


def warn_again(told: Iterable[tuple[str, str, str, int]], registry: dict[Any, Any]) -> None:
    """Give the warnings of a worker process in this one, from the places they had there.

    A category that is no built-in one becomes UserWarning: its module may not be imported here.

    Args:
        registry: what was given before, as in :func:`warnings.warn_explicit`.
    """
    for message, name, file, line in told:
        category: Any = getattr(builtins, name, UserWarning)
        warnings.warn_explicit(message, category, file, line, registry=registry)


def describe(error: BaseException) -> dict[str, Any]:
    """Return what a report says about a failure."""
    known = isinstance(error, UserError)
    message = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    hint = error.hint if isinstance(error, UserError) else ""
    return {"error": type(error).__name__, "message": message[:500], "hint": hint, "expected": known}


def start_worker(threads: int) -> None:
    """Prepare a worker process: on a leash, thread counts before torch is imported, no progress lines of its own."""
    if (parent := multiprocessing.parent_process()) is not None:
        end_with(parent.sentinel)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    # The parent decides when to stop and tells the workers; a Ctrl-C reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.setLogRecordFactory(AsWarnings().records(logging.getLogRecordFactory()))
    progress.set_quiet()
