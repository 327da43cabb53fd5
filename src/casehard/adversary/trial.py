"""One attacker: train a copy of the model as it says, measure the end. Works in any process; weights stay in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

from casehard.benchmark.worker import DIED, Worker, describe, unless_stopped
from casehard.errors import ConfigError, Diverged, Interrupted, StorageError, UserError
from casehard.evaluation.contamination import require_unseen
from casehard.evaluation.metrics import scores
from casehard.evaluation.suite import Suite, evaluate
from casehard.model.load import load
from casehard.model.model import Model
from casehard.steps.attack import Attack, attack_with
from casehard.steps.defence import Examples
from casehard.train.cost import training_flops

AGAIN = "run the same command again to go on"
RATES = ("leak", "asr", "asr_partial", "utility", "nll", "over_refusal", "coherence")
HEARTBEAT = 1.0
"""Seconds between two looks at the workers."""
Key = TypeVar("Key")
_loaded: dict[tuple[str, str], Model] = {}
"""The model of a worker process, which it reads once."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is sent; picklable where the model is a path."""

    model: Model | str
    step: Attack
    suite: Suite
    """Prompts to measure on."""
    rows: Examples
    """The attacker's rows, by data role."""
    label: str = "attacker"
    still: bool = False
    """Measure the model as it is, without an attack."""


def attempt(job: Job) -> dict[str, Any]:
    """Do a job; return ``{"status", "found", "rows", "cost", "facts"}``.

    The status is ok, diverged (a loss was no longer finite) or failed (anything else that went wrong in this attacker,
    memory among it); ``message`` says how. ``found`` has the rates of :data:`RATES` that the suite supports.

    Raises:
        Interrupted, StorageError: the search was asked to stop, or the disk is full.
    """
    try:
        return _measured(job)
    except (Interrupted, StorageError):
        raise
    except Diverged as error:
        return {"status": "diverged", "message": error.message}
    except Exception as error:
        return {"status": "failed", **describe(error)}


def _measured(job: Job) -> dict[str, Any]:
    start = job.model if isinstance(job.model, Model) else _load(job.model, job.step.device)
    if job.still:
        require_unseen(job.suite, start.trained_prompts, start.path or "the model")
        rows = evaluate(start.net, start.tokenizer, job.suite, limit=job.step.limit, system=job.step.system)
        return {"status": "ok", "found": found(rows), "rows": rows}
    done = attack_with(job.step, job.step.build(job.suite), job.rows, job.suite, start, label=job.label)
    last = max(row["step"] for row in done.rows)
    rows = [row for row in done.rows if row["step"] == last]
    cost = {
        "steps": done.budget.steps,
        "tokens": done.budget.tokens,
        "flops": training_flops(done.model.net, done.budget.tokens),
        "seconds": round(done.budget.seconds, 3),
    }
    return {"status": "ok", "found": found(rows), "rows": rows, "cost": cost, "facts": dict(done.facts)}


def _load(path: str, device: str) -> Model:
    if (path, device) not in _loaded:
        _loaded[path, device] = load(path, device=device)
    return _loaded[path, device]


def found(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the rates of rows of one moment by metric, each with its counts and its 95 % interval."""
    out = {}
    for score in scores(rows):
        if score.metric in RATES:
            values = {"k": score.k, "n": score.n, "rate": score.rate, "low": score.low, "high": score.high}
            doubt = {"unreliable": score.context["unreliable"]} if score.context.get("unreliable") else {}
            out[score.metric] = {**values, **doubt}
    return out


class Crew:
    """Workers that do jobs: processes with one torch thread each, or this process where there is one only.

    Use as a context manager; an exception inside tells the processes to stop.

    Args:
        workers: how many.
    """

    def __init__(self, workers: int) -> None:
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

    def each(self, jobs: Iterator[tuple[Key, Job]]) -> Iterator[tuple[Key, dict[str, Any]]]:
        """Yield (key, result) of every job as it ends; a job is taken from ``jobs`` when somebody is free to do it.

        Raises:
            ConfigError and its like: what was wrong with the settings or the rows, and so with every attacker.
            Interrupted, StorageError: see :func:`attempt`.
        """
        for key, result in self._apart(jobs) if self.workers else ((key, attempt(job)) for key, job in jobs):
            if result.get("expected"):
                raise _same(result)
            yield key, result

    def _apart(self, jobs: Iterator[tuple[Key, Job]]) -> Iterator[tuple[Key, dict[str, Any]]]:
        idle, busy = list(self.workers), dict[Future[dict[str, Any]], tuple[Worker, Key]]()
        while True:
            while idle and (drawn := next(jobs, None)) is not None:
                worker = idle.pop()
                busy[worker.submit(attempt, drawn[1])] = (worker, drawn[0])
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
    import casehard.errors

    kind = getattr(casehard.errors, str(result["error"]), ConfigError)
    known = isinstance(kind, type) and issubclass(kind, UserError) and kind.__init__ is UserError.__init__
    return (kind if known else ConfigError)(str(result["message"]), hint=str(result["hint"]))
