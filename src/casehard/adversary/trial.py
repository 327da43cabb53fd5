"""One attacker: train a copy of the model as it says, measure the end. Works in any process; weights stay in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from casehard.benchmark.worker import describe
from casehard.errors import Diverged, Interrupted, StorageError
from casehard.evaluation.contamination import require_unseen
from casehard.evaluation.metrics import scores
from casehard.evaluation.suite import Suite, evaluate
from casehard.maths.stats import clopper_pearson
from casehard.model.load import load
from casehard.model.model import Model
from casehard.steps.attack import Attack, attack_with
from casehard.steps.defence import Examples
from casehard.train.cost import training_flops

RATES = ("leak", "asr", "asr_partial", "utility", "nll", "over_refusal", "coherence")
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
    """Return the rates of rows of one moment by metric, each with its counts and its exact 95 % interval.

    Exact (Clopper-Pearson), because half a suite is few prompts; a mean (``nll``) has its bootstrap interval.
    """
    out = {}
    for score in scores(rows):
        if score.metric in RATES:
            span = (score.low, score.high) if score.k is None else clopper_pearson(score.k, score.n)
            values = {"k": score.k, "n": score.n, "rate": score.rate, "low": span[0], "high": span[1]}
            doubt = {"unreliable": score.context["unreliable"]} if score.context.get("unreliable") else {}
            out[score.metric] = {**values, **doubt}
    return out
