"""Work as its caller sees it, in this process or a worker: what went wrong comes back as plain values."""

from __future__ import annotations

import builtins
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
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


def apart(do: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Call a function in a worker process; what stops the whole run comes back as ``interrupted`` or ``storage``.

    Warnings come back as plain values under ``warnings``, for :func:`warn_again`: the caller decides what becomes of
    them, and sees those of all workers.
    """
    with warnings.catch_warnings(record=True) as told:
        try:
            result = do(*given)
        except Interrupted as error:
            result = {"interrupted": error.exit_code}
        except StorageError as error:
            result = {"storage": error.message, "hint": error.hint}
    result["warnings"] = [(str(w.message), w.category.__name__, w.filename, w.lineno) for w in told]
    return result


def unless_stopped(result: dict[str, Any], told: dict[Any, Any], *, hint: str) -> dict[str, Any]:
    """Give the warnings that came back with what :func:`apart` returned, and return the rest of it.

    Args:
        told: registry of the warnings given before.
        hint: of the interruption.

    Raises:
        Interrupted, StorageError: the worker was stopped so.
    """
    warn_again(result.pop("warnings", ()), told)
    if "interrupted" in result:
        raise Interrupted("a worker was told to stop", hint=hint, exit_code=int(result["interrupted"]))
    if "storage" in result:
        raise StorageError(result["storage"], hint=result["hint"])
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


DIED = {"error": "Killed", "message": "the worker died (out of memory?)"}
"""What stands for the result of a worker that is gone."""


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Keep processes that are started here from running the caller's script again.

    A spawned process imports the main module of its parent, all of it where a script has no ``__main__`` guard. Workers
    need nothing of it: what they do is found by the name of a module.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Worker:
    """One worker process; if it dies, only what it was doing is lost."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = self._open()

    def _open(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=start_worker, initargs=(self.threads,)
        )

    def submit(self, do: Callable[..., dict[str, Any]], *given: Any) -> Future[dict[str, Any]]:
        """Call :func:`apart` there; function and arguments must be picklable."""
        with without_main():  # a pool starts its process when it gets its first work
            try:
                return self.pool.submit(apart, do, *given)
            except BrokenProcessPool:
                self.pool = self._open()
                return self.pool.submit(apart, do, *given)

    def terminate(self) -> None:
        """Tell this worker's process to stop; other children of the caller are none of our business."""
        for process in list((getattr(self.pool, "_processes", None) or {}).values()):
            process.terminate()

    def close(self) -> None:
        """Wait for the process to end."""
        # A signal can arrive while a pool is starting its manager thread: then there is nothing to wait for.
        with contextlib.suppress(RuntimeError):
            self.pool.shutdown(wait=True, cancel_futures=True)
