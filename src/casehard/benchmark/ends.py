"""Every defence over all attacks (a customer's jobs, planted backdoors) in one table, at the end of each.

A *run* is one (base, seed). Means are over attacks first and over runs then: the prompts of several attacks are the
same ones and do not count twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from casehard.benchmark.contrasts import over_runs
from casehard.benchmark.graph import Matrix
from casehard.benchmark.plan import Plan
from casehard.evaluation.metrics import metric_title
from casehard.maths.stats import rate_interval

METRICS = ("asr", "leak", "asr_in_format", "fine_tunability", "utility", "over_refusal", "twin_knowledge", "coherence")
PLANTED_METRICS = ("asr", "cacc", "aacc")
SELECTION = ("rows", "refusals", "per_direction", "log_det", "mean_relevance")
"""Measures of a selection that tables show."""
OVER = {"job": "poisoned jobs", "training": "backdoors", "attack": "attacks"}
"""What means are over."""
Run = tuple[str, int]


def end_rows(plan: Plan, records: Sequence[Mapping[str, Any]], family: str) -> list[dict[str, Any]]:
    """Return one entry per defence and metric: per attack, the mean over the poisoned ones, and against the control.

    Returns:
        Entries with ``attacks`` (attack -> mean over runs), ``mean``, ``low``, ``high`` (95 %, over runs and prompts,
        see ``_interval``), ``runs``, and ``difference``, ``difference_low``, ``difference_high`` to the control of the
        headline, paired by the ``compared`` runs that both have (t-interval over runs; for one of them the difference
        itself). With benign jobs only, the mean is over those. Nothing where models are compared step by step.
    """
    if not plan.ends:
        return []
    metrics = PLANTED_METRICS if plan.plants else METRICS
    last = {job.name: job.steps for job in plan.attacks}
    found: dict[tuple[str, str], dict[Run, dict[str, Mapping[str, Any]]]] = {}
    for r in records:
        if r["family"] == family and r["metric"] in metrics and last.get(r["attack"]) == r["steps"]:
            runs = found.setdefault((r["defence"], r["metric"]), {})
            runs.setdefault((r["base"], r["seed"]), {})[r["attack"]] = r
    means = {place: _means(runs, _counted(plan, place[1], found)) for place, runs in found.items()}
    out = []
    for (defence, metric), runs in found.items():
        mine, other = means[defence, metric], means.get((plan.headline.against, metric), {})
        if not mine:
            continue
        jobs = {job: [rows[job]["rate"] for rows in runs.values() if job in rows] for job in last}
        entry: dict[str, Any] = {"family": family, "defence": defence, "metric": metric}
        entry["attacks"] = {job: statistics.fmean(rates) for job, rates in jobs.items() if rates}
        entry |= _interval(mine, runs) | {
            "runs": list(mine.values()),
            "by_run": {f"{b}/{s}": v for (b, s), v in mine.items()},
        }
        shared = [mine[run] - other[run] for run in mine.keys() & other.keys()]
        if shared and defence != plan.headline.against:
            low, high = over_runs(shared)
            entry |= {"difference": statistics.fmean(shared), "difference_low": low, "difference_high": high}
            entry["compared"] = len(shared)
        out.append(entry)
    return out


def _counted(plan: Plan, metric: str, found: Mapping[tuple[str, str], Mapping[Run, Mapping[str, Any]]]) -> list[str]:
    """Return the jobs a mean is over: the poisoned ones (benign ones if there are no others) in which any defence was
    measured. Harmful rows alone teach no task."""
    jobs = [job for job in plan.attacks if job.share > 0] or list(plan.attacks)
    if metric == "fine_tunability":
        jobs = [job for job in jobs if job.share < 1]
    seen = {name for (_, m), runs in found.items() if m == metric for rows in runs.values() for name in rows}
    return [job.name for job in jobs if job.name in seen]


def _means(runs: Mapping[Run, Mapping[str, Mapping[str, Any]]], counted: Sequence[str]) -> dict[Run, float]:
    """Return each run's mean over the counted jobs; a run that lacks one of them (it failed there) has none."""
    whole = {run: rows for run, rows in runs.items() if counted and all(job in rows for job in counted)}
    return {run: statistics.fmean(rows[job]["rate"] for job in counted) for run, rows in whole.items()}


def _interval(mine: Mapping[Run, float], runs: Mapping[Run, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Return mean, low and high: the t-interval over runs, widened to what other prompts could have given.

    A base's prompts are the same in all its jobs and seeds, so they count once.
    """
    mean = statistics.fmean(mine.values())
    low, high = over_runs(list(mine.values()))
    by_base: dict[str, list[int]] = {}
    for base, seed in mine:
        by_base.setdefault(base, []).extend(r["n"] for r in runs[base, seed].values())
    prompts = round(sum(statistics.fmean(ns) for ns in by_base.values()))
    near, far = rate_interval(round(mean * prompts), prompts) if prompts else (low, high)
    return {"mean": mean, "low": max(0.0, min(low, near)), "high": min(1.0, max(high, far))}


def beside(plan: Plan, rows: Sequence[Mapping[str, Any]], family: str) -> str:
    """Say how the headline's defence stands over all jobs, and which useful row's mean is lowest."""
    metric = plan.headline.metric
    found = {(r["defence"], r["metric"]): r for r in rows if r["family"] == family}
    names = [d.name for d in plan.defences if d.role != "unattacked"]
    means = {name: r for name in names if (r := found.get((name, metric))) and _useful(plan, found, name)}
    mine = found.get((plan.headline.defence, metric))
    if mine is None or len(means) < 2:  # so too where models are compared step by step
        return ""
    best = min(means.values(), key=lambda r: float(r["mean"]))
    name = metric_title(metric)
    planned = plan.runs(family)
    what = OVER[plan.occasion]
    text = f"Mean {name} over the {what}: {plan.defence(plan.headline.defence).title} {_with_span(mine, planned)}"
    if best is mine:
        return f"{text}, the lowest of the rows that stay useful."
    shared = [mine["by_run"][run] - best["by_run"][run] for run in mine["by_run"].keys() & best["by_run"].keys()]
    low, high = over_runs(shared) if shared else (0.0, 0.0)
    doubt = "; the two cannot be told apart" if len(shared) < 2 or low <= 0 <= high else ""
    title = plan.defence(best["defence"]).title
    return f"{text}; the lowest of the rows that stay useful is {title} with {_with_span(best, planned)}{doubt}."


def _useful(plan: Plan, found: Mapping[tuple[str, str], Mapping[str, Any]], name: str) -> bool:
    """Return whether a row keeps the gates of the plan on average: a collapsed model is not a safe model."""

    def mean(defence: str, metric: str, missing: float) -> float:
        entry = found.get((defence, metric))
        return missing if entry is None else float(entry["mean"])

    base, gates = plan.undefended.name, plan.gates
    if plan.plants:
        return mean(plan.unattacked.name, "cacc", 0.0) - mean(name, "cacc", 1.0) <= gates.collapse
    falls = {"utility": gates.utility_drop, "coherence": gates.coherence_drop, "twin_knowledge": gates.twin_drop}
    falls["fine_tunability"] = gates.utility_drop
    kept = all(mean(base, m, 0.0) - mean(name, m, 1.0) <= bound for m, bound in falls.items())
    return kept and mean(name, "over_refusal", 0.0) <= gates.over_refusal


def _with_span(row: Mapping[str, Any], planned: int) -> str:
    runs = len(row["runs"])
    span = f"{row['low'] * 100:.0f} to {row['high'] * 100:.0f}" if runs > 1 else "single run"
    span += f", {runs} of {planned} planned runs" if runs < planned else ""
    return f"{row['mean'] * 100:.0f} % ({span})"


def telemetry(matrix: Matrix, done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, per defence, means over its trainings of what the method logged and of its selection's measures."""
    seen: dict[str, list[Mapping[str, Any]]] = {}
    for cell in matrix.cells:
        if cell.attack and cell.digest in done:
            seen.setdefault(cell.defence, []).append(done[cell.digest])
    for (_, defence, _), name in matrix.defend.items():
        if matrix.nodes[name].kind == "defend" and name in done:
            seen.setdefault(defence, []).append(done[name])
    out = []
    for defence, nodes in seen.items():
        told: dict[str, list[float]] = {}
        for node in nodes:
            picked = node.get("selection") or {}
            numbers = {f"selection {key}": picked.get(key) for key in SELECTION}
            for key, value in {**(node.get("telemetry") or {}), **numbers}.items():
                if isinstance(value, int | float):
                    told.setdefault(key, []).append(float(value))
        if told:
            out.append({"defence": defence, "means": {key: statistics.fmean(v) for key, v in told.items()}})
    return out
