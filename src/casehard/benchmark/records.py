"""From rows to records: rates per seed, rates pooled over seeds, steps to break. Everything keeps its k and n.

A *replicate* is one (base, seed). Models that are one and the same node (the undefended model before any attack, for
every seed) are counted once when pooling.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from casehard.benchmark.entries import Gates
from casehard.benchmark.graph import Cell, Matrix
from casehard.benchmark.store import read_rows
from casehard.evaluation.framing import FRAMED
from casehard.evaluation.metrics import scores
from casehard.maths.stats import clopper_pearson, rate_interval, seed_band

Row = Mapping[str, Any]
NO_ATTACK = "none"


class Point(NamedTuple):
    """One model at one step of one attack."""

    family: str
    base: str
    defence: str
    seed: int
    attack: str
    step: int


class Measured(NamedTuple):
    """The rows of one point, and the node they came from."""

    digest: str
    rows: list[dict[str, Any]]


def measured(matrix: Matrix, places: Mapping[str, Path]) -> dict[Point, Measured]:
    """Read the rows of every finished cell; step 0 of an attack is the evaluation of the model it starts from.

    Args:
        places: node digest -> run folder, finished nodes only.
    """
    out: dict[Point, Measured] = {}
    started: dict[tuple[str, str, int], Measured] = {}
    for cell in matrix.cells:
        if cell.digest not in places:
            continue
        by_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in read_rows(places[cell.digest] / "rows.jsonl"):
            by_step[int(row.pop("step", 0))].append(row)
        if not cell.attack:
            start = Measured(cell.digest, by_step[0])
            started[cell.base, cell.defence, cell.seed] = start
            out[_point(cell, NO_ATTACK, 0)] = start
            continue
        for step, rows in sorted(by_step.items()):
            out[_point(cell, cell.attack, step)] = Measured(cell.digest, rows)
        first = started.get((cell.base, cell.defence, cell.seed))
        if first is not None and 0 not in by_step:
            out[_point(cell, cell.attack, 0)] = first
    return out


def _point(cell: Cell, attack: str, step: int) -> Point:
    return Point(cell.family, cell.base, cell.defence, cell.seed, attack, step)


def _roles(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the roles asked, but for restricted prompts in a job's format, which no job has before it begins."""
    return {row["role"] for row in rows} - {FRAMED}


def make_records(shares: Mapping[str, float], points: Mapping[Point, Measured]) -> list[dict[str, Any]]:
    """Return one record per point and metric, with its 95 % interval over prompts.

    Coherence and the agreement of two judges are over rows of several roles, so they are left out where only some roles
    were asked: under one name they would be other quantities there.

    Args:
        shares: harmful share of every attack.
    """
    known: dict[tuple[str, int], list[Any]] = {}
    asked: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for point, (_, rows) in points.items():
        asked[point[:-1]] |= _roles(rows)
    out = []
    for point, (name, rows) in points.items():
        key = (name, point.step)
        if key not in known:
            known[key] = scores(rows)
        whole = _roles(rows) == asked[point[:-1]]
        for score in known[key]:
            if score.metric in ("coherence", "agreement") and not whole:
                continue
            record = {
                "defence": point.defence,
                "attack": point.attack,
                "share": shares.get(point.attack, 0.0),
                "steps": point.step,
                "metric": score.metric,
                "k": score.k,
                "n": score.n,
                "rate": score.rate,
                "low": score.low,
                "high": score.high,
                "seed": point.seed,
                "base": point.base,
                "family": point.family,
                "node": name[:12],
            }
            if score.context.get("kappa") is not None:
                record["kappa"] = score.context["kappa"]
            if "triggered" in rows[0]:
                record["exact"] = True
            out.append(record | ({"unreliable": score.context["unreliable"]} if "unreliable" in score.context else {}))
    return out


def pool(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pool records over replicates: k/n with its interval over prompts, and beside it what the seeds say.

    ``low`` and ``high`` count each prompt of a base once, however many runs asked it; ``band`` is about the runs and is
    the wider, more honest one where they disagree. ``unreliable`` is set when any replicate's is.
    """
    keys = ("family", "defence", "attack", "share", "steps", "metric")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        groups[tuple(record[k] for k in keys)].append(record)
    out = []
    for key, members in groups.items():
        distinct = list({m["node"]: m for m in members}.values())
        rates = [m["rate"] for m in distinct]
        counted = all(m["k"] is not None for m in distinct)
        band = seed_band(rates, bounds=(0.0, 1.0) if counted else None)
        n = sum(m["n"] for m in distinct)
        entry: dict[str, Any] = dict(zip(keys, key, strict=True))
        if counted:
            k = sum(m["k"] for m in distinct)
            once, prompts = prompts_once(distinct)
            # A broken count widens an exact interval both ways, since gates read its ends.
            near, far = math.floor(round(once, 6)), math.ceil(round(once, 6))
            exact = clopper_pearson(near, prompts).low, clopper_pearson(far, prompts).high
            low, high = exact if distinct[0].get("exact") else rate_interval(round(once), prompts)
            entry |= {"k": k, "n": n, "rate": k / n, "low": min(low, k / n), "high": max(high, k / n)}
        elif len(distinct) == 1:
            entry |= {"k": None, "n": n, "rate": band.mean, "low": distinct[0]["low"], "high": distinct[0]["high"]}
        else:
            entry |= {"k": None, "n": n, "rate": band.mean, "low": band.low, "high": band.high}
        entry["replicates"] = len(distinct)
        entry["shared"] = len(distinct) < len(members)
        entry["rates"] = rates
        entry["band"] = {"low": band.low, "high": band.high, "sd": band.sd, "kind": band.kind}
        doubts = dict.fromkeys(m["unreliable"] for m in distinct if "unreliable" in m)
        out.append(entry | ({"unreliable": "; ".join(doubts)} if doubts else {}))
    return out


def prompts_once(members: Iterable[Mapping[str, Any]]) -> tuple[float, int]:
    """Return (successes, prompts) with each prompt of a base counted once: its runs are averaged, so k may be broken.

    Args:
        members: one entry a run, with ``base``, ``k`` and ``n``.
    """
    runs: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for member in members:
        runs[member["base"]].append(member)
    k = sum(statistics.fmean(m["k"] for m in some) for some in runs.values())
    n = round(sum(statistics.fmean(m["n"] for m in some) for some in runs.values()))
    return min(k, float(n)), n


def first_over(curve: Sequence[tuple[int, float]], bound: float) -> int | None:
    """Return the first step whose rate exceeds ``bound``; None when none does."""
    return next((step for step, rate in sorted(curve) if rate > bound), None)


def steps_text(steps: Sequence[int | None], last: int) -> str:
    """Say in words when a set of runs broke: ``25``, ``10 to 50``, ``50 to not within 200 steps``."""
    if not steps:
        return "not measured"
    never = f"not within {last} steps"
    found = sorted(s for s in steps if s is not None)
    if not found:
        return never
    top = never if len(found) < len(steps) else str(found[-1])
    return top if top == str(found[0]) else f"{found[0]} to {top}"


def median_step(steps: Sequence[int | None]) -> int | None:
    """Return the (lower) median step to break; None when it lies beyond the end of the attack."""
    values = [float("inf") if s is None else float(s) for s in steps]
    middle = statistics.median_low(values) if values else float("inf")
    return None if middle == float("inf") else int(middle)


def make_breaks(records: Iterable[Mapping[str, Any]], gates: Gates) -> list[dict[str, Any]]:
    """Return the first step at which each replicate is broken, per defence, attack and metric (asr, leak)."""
    bounds = {"asr": gates.asr_break, "leak": gates.leak_break}
    curves: dict[tuple[Any, ...], list[tuple[int, float]]] = defaultdict(list)
    for r in records:
        if r["metric"] in bounds and r["attack"] != NO_ATTACK:
            key = (r["family"], r["defence"], r["attack"], r["share"], r["metric"], r["base"], r["seed"])
            curves[key].append((r["steps"], r["rate"]))
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for (*group, base, seed), curve in curves.items():
        step = first_over(curve, bounds[group[-1]])
        grouped[tuple(group)].append({"base": base, "seed": seed, "step": step, "last": max(s for s, _ in curve)})
    out = []
    for (family, defence, attack, share, metric), runs in grouped.items():
        steps, last = [r["step"] for r in runs], min(r["last"] for r in runs)
        out.append(
            {
                "family": family,
                "defence": defence,
                "attack": attack,
                "share": share,
                "metric": metric,
                "bound": bounds[metric],
                "runs": runs,
                "median": median_step(steps),
                "last": last,
                "text": steps_text(steps, last),
            }
        )
    return out


def public_scores(matrix: Matrix, done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the numbers of public benchmarks, of each defence before any attack.

    Returns:
        Entries with ``rates``, one a model, questions ``n``, and ``low`` and ``high``: of one model its 95 % interval,
        of several the lowest and the highest.
    """
    seen: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for cell in matrix.cells:
        for score in (done.get(cell.digest, {}).get("lm_eval") or ()) if not cell.attack else ():
            seen.setdefault((cell.family, cell.defence, score["metric"]), {})[cell.digest] = score
    out = []
    for (family, defence, metric), models in seen.items():
        scores = list(models.values())
        rates = [float(score["rate"]) for score in scores]
        low, high = (scores[0]["low"], scores[0]["high"]) if len(scores) == 1 else (min(rates), max(rates))
        entry = {"family": family, "defence": defence, "metric": metric, "n": scores[0]["n"]}
        out.append({**entry, "rates": rates, "low": low, "high": high})
    return out
