"""Workers for many jobs, one after another: processes, or this one. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from casehard import errors
from casehard.benchmark.worker import DIED, Worker, unless_stopped
from casehard.errors import ConfigError, UserError

AGAIN = "run the same command again to go on"
HEARTBEAT = 1.0
"""Seconds between two looks at the workers."""
Key = TypeVar("Key")


class Crew:
    """Workers that do jobs: processes with one torch thread each, or this process where there is one only.

    Use as a context manager; an exception inside tells the processes to stop.

    Args:
        do: does a job; at the top of a module, so that a process finds it. A result whose ``expected`` is True is an
            error of the user's, see ``casehard.benchmark.worker.describe``.
        workers: how many.
    """

    def __init__(self, do: Callable[[Any], dict[str, Any]], workers: int) -> None:
        self.do = do
        self.workers = [Worker(1) for _ in range(workers)] if workers > 1 else []
        self._told: dict[Any, Any] = {}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for worker in self.workers:
            if error is not None:
                worker.terminate()
        for worker in self.workers:
            worker.close()

    def each(self, jobs: Iterator[tuple[Key, Any]]) -> Iterator[tuple[Key, dict[str, Any]]]:
        """Yield (key, result) of every job as it ends; a job is taken from ``jobs`` when somebody is free to do it.

        Raises:
            ConfigError and its like: what was wrong with the settings or the rows, and so with every attacker.
            Interrupted, StorageError: the search was asked to stop, or the disk is full.
        """
        for key, result in self._apart(jobs) if self.workers else ((key, self.do(job)) for key, job in jobs):
            if result.get("expected"):
                raise _same(result)
            yield key, result

    def _apart(self, jobs: Iterator[tuple[Key, Any]]) -> Iterator[tuple[Key, dict[str, Any]]]:
        idle, busy = list(self.workers), dict[Future[dict[str, Any]], tuple[Worker, Key]]()
        while True:
            while idle and (drawn := next(jobs, None)) is not None:
                worker = idle.pop()
                busy[worker.submit(self.do, drawn[1])] = (worker, drawn[0])
            if not busy:
                return
            for future in wait(busy, HEARTBEAT, return_when=FIRST_COMPLETED).done:
                worker, key = busy.pop(future)
                try:
                    result = unless_stopped(future.result(), self._told, hint=AGAIN)
                except BrokenProcessPool:
                    result = {"status": "failed", **DIED}
                idle.append(worker)
                yield key, result


def _same(result: Mapping[str, Any]) -> UserError:
    """Return the error that a worker met, as far as plain values tell it."""
    kind = getattr(errors, str(result["error"]), ConfigError)
    known = isinstance(kind, type) and issubclass(kind, UserError) and kind.__init__ is UserError.__init__
    return (kind if known else ConfigError)(str(result["message"]), hint=str(result["hint"]))
