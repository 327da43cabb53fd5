"""Stage tuning in one table: every defence over all of the customers' jobs, at the end of each job.

A *run* is one (base, seed). Means are over jobs first and over runs then, so that intervals are about runs: the prompts
of several jobs are the same ones and do not count twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from casehard.bench.matrix import Matrix
from casehard.bench.plan import Plan
from casehard.maths.stats import seed_band

METRICS = ("asr", "leak", "fine_tunability", "utility", "over_refusal", "twin_knowledge", "coherence")
Run = tuple[str, int]


def job_rows(plan: Plan, records: Sequence[Mapping[str, Any]], family: str) -> list[dict[str, Any]]:
    """Return one entry per defence and metric: per job, the mean over the poisoned jobs, and against the reference.

    Returns:
        Entries with ``jobs`` (job -> mean over runs), ``mean``, ``low``, ``high`` (95 % t-interval over runs; equal to
        the mean for one run), ``runs``, and ``difference``, ``difference_low``, ``difference_high`` to the control of
        the headline, paired by run. With benign jobs only, the mean is over those. Nothing at other stages.
    """
    if plan.stage != "tuning":
        return []
    last = {job.name: job.steps for job in plan.attacks}
    counted = [job.name for job in plan.attacks if job.share > 0] or list(last)
    found: dict[tuple[str, str], dict[Run, dict[str, float]]] = {}
    for r in records:
        if r["family"] == family and r["metric"] in METRICS and last.get(r["attack"]) == r["steps"]:
            runs = found.setdefault((r["defence"], r["metric"]), {})
            runs.setdefault((r["base"], r["seed"]), {})[r["attack"]] = r["rate"]
    means = {place: _means(runs, counted) for place, runs in found.items()}
    out = []
    for (defence, metric), runs in found.items():
        mine, other = means[defence, metric], means.get((plan.headline.against, metric), {})
        if not mine:
            continue
        jobs = {job: [rates[job] for rates in runs.values() if job in rates] for job in last}
        entry: dict[str, Any] = {"family": family, "defence": defence, "metric": metric}
        entry["jobs"] = {job: statistics.fmean(rates) for job, rates in jobs.items() if rates}
        band = seed_band(list(mine.values()), bounds=(0.0, 1.0))
        entry |= {"mean": band.mean, "low": band.low, "high": band.high, "runs": list(mine.values())}
        shared = [mine[run] - other[run] for run in mine.keys() & other.keys()]
        if shared and defence != plan.headline.against:
            gap = seed_band(shared, bounds=(-1.0, 1.0))
            entry |= {"difference": gap.mean, "difference_low": gap.low, "difference_high": gap.high}
        out.append(entry)
    return out


def _means(runs: Mapping[Run, Mapping[str, float]], counted: Sequence[str]) -> dict[Run, float]:
    """Return each run's mean over the counted jobs; a run that lacks one of them (with a task of its own) is left out.

    Jobs of harmful rows alone have no user task, so a metric is averaged over the jobs that any run measured it in.
    """
    there = [job for job in counted if any(job in rates for rates in runs.values())]
    if not there:
        return {}
    whole = {run: rates for run, rates in runs.items() if all(job in rates for job in there)}
    return {run: statistics.fmean(rates[job] for job in there) for run, rates in whole.items()}


def beside(plan: Plan, rows: Sequence[Mapping[str, Any]], family: str) -> str:
    """Say how the headline's defence stands over all jobs, and which row's mean is lowest: it may be another's."""
    metric = plan.headline.metric
    means = {r["defence"]: r for r in rows if (r["family"], r["metric"]) == (family, metric)}
    mine = means.get(plan.headline.defence)
    if mine is None or len(means) < 2:  # so too at other stages
        return ""
    best = min(means.values(), key=lambda r: float(r["mean"]))
    name = {"asr": "ASR", "leak": "leak"}[metric]
    title = plan.defence(plan.headline.defence).title
    text = f"Mean {name} over the poisoned jobs: {title} {_with_span(mine)}"
    if best is mine:
        return f"{text}, the lowest of all rows."
    return f"{text}; the lowest of all rows is {plan.defence(best['defence']).title} with {_with_span(best)}."


def _with_span(row: Mapping[str, Any]) -> str:
    span = f" ({row['low'] * 100:.0f} to {row['high'] * 100:.0f})" if len(row["runs"]) > 1 else " (single run)"
    return f"{row['mean'] * 100:.0f} %{span}"


def telemetry(matrix: Matrix, done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, per defence, the mean over all its jobs of what the method logged and of its selection's measures."""
    seen: dict[str, list[Mapping[str, Any]]] = {}
    for cell in matrix.cells:
        if cell.attack and cell.digest in done:
            seen.setdefault(cell.defence, []).append(done[cell.digest])
    out = []
    for defence, nodes in seen.items():
        told: dict[str, list[float]] = {}
        for node in nodes:
            picked = node.get("selection") or {}
            numbers = {f"selection {key}": picked.get(key) for key in ("rows", "log_det", "mean_relevance")}
            for key, value in {**(node.get("telemetry") or {}), **numbers}.items():
                if isinstance(value, int | float):
                    told.setdefault(key, []).append(float(value))
        if told:
            out.append({"defence": defence, "means": {key: statistics.fmean(v) for key, v in told.items()}})
    return out
