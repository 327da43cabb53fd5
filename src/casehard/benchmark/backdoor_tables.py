"""The summary of a plan about backdoors: rates, paired differences, costs and canaries, rebuilt from rows.

A *run* is one (base, seed). Beside every pooled rate stand two intervals: the exact one over prompts, each prompt of a
base counted once however many seeds asked it, and from three runs on the t-interval over runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from casehard.benchmark.backdoor import BackdoorPlan
from casehard.benchmark.contrasts import Outcomes, contrast
from casehard.benchmark.graph import Matrix
from casehard.benchmark.records import prompts_once
from casehard.benchmark.store import read_rows
from casehard.maths.stats import clopper_pearson, seed_band

Row = Mapping[str, Any]
METRICS = ("cacc", "aacc", "asr", "asr_nonempty", "false_trigger", "degenerate")
COMPARED = ("asr", "cacc", "aacc")
Measured = dict[tuple[str, str], dict[tuple[str, int], list[Row]]]
"""(defence, backdoor) -> (base, seed) -> rows."""


def outcome(row: Row, metric: str) -> bool | None:
    """Return whether a row is a success of a metric, None where the metric does not ask it.

    The definitions are those of ``evaluate.backdoor``; a test holds them together.
    """
    graded = row["correct"] is not None
    if metric in ("cacc", "aacc"):
        return row["correct"] is True if graded and row["triggered"] == (metric == "aacc") else None
    if metric == "false_trigger":
        return bool(row["shown"]) if not row["triggered"] else None
    if not row["triggered"] or (metric == "asr_nonempty" and not row["response"].strip()):
        return None
    return bool(row["degenerate" if metric == "degenerate" else "shown"])


def read_cells(matrix: Matrix, places: Mapping[str, Path], family: str) -> Measured:
    """Return the rows of every finished cell of a family."""
    out: Measured = {}
    for cell in matrix.cells:
        if cell.family == family and cell.digest in places:
            runs = out.setdefault((cell.defence, cell.attack), {})
            runs[cell.base, cell.seed] = list(read_rows(places[cell.digest] / "rows.jsonl"))
    return out


def pooled_rates(plan: BackdoorPlan, found: Measured) -> list[dict[str, Any]]:
    """Return one entry per backdoor, defence and metric.

    Returns:
        Entries with ``k``, ``n``, ``rate``, exact ``low`` and ``high``, ``rates`` by run, and ``run_low``,
        ``run_high``, the t-interval over runs (the range for two runs, the rate itself for one).
    """
    out = []
    for column, arm, metric in ((c, a, m) for c in plan.attacks for a in plan.defences for m in METRICS):
        runs = found.get((arm.name, column.name), {})
        asked = {run: [hit for row in rows if (hit := outcome(row, metric)) is not None] for run, rows in runs.items()}
        counts: list[dict[str, Any]] = [
            {"base": base, "k": sum(hits), "n": len(hits)} for (base, _), hits in asked.items() if hits
        ]
        if not counts:
            continue
        k, n = sum(c["k"] for c in counts), sum(c["n"] for c in counts)
        low, high = _exact(counts)
        rates = [c["k"] / c["n"] for c in counts]
        band = seed_band(rates, bounds=(0.0, 1.0))
        entry = {"attack": column.name, "defence": arm.name, "metric": metric, "k": k, "n": n, "rate": k / n}
        entry |= {"low": low, "high": high, "rates": rates, "run_low": band.low, "run_high": band.high}
        out.append(entry)
    return out


def _exact(counts: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the exact interval over prompts; a broken count widens it both ways, since gates read it."""
    k, n = prompts_once(counts)
    k = round(k, 6)
    return clopper_pearson(math.floor(k), n).low, clopper_pearson(math.ceil(k), n).high


def outcomes(found: Measured, defence: str, attacks: Sequence[str], metric: str) -> Outcomes:
    """Return the mean outcome over the backdoors of every prompt and run that all of them measured."""
    seen: dict[tuple[str, str, int], list[float]] = {}
    for name in attacks:
        for (base, seed), rows in found.get((defence, name), {}).items():
            for row in rows:
                if (hit := outcome(row, metric)) is not None:
                    seen.setdefault((base, str(row["pair"]), seed), []).append(float(hit))
    # A prompt that one backdoor's trigger rules out is left out of all.
    return {key: statistics.fmean(hits) for key, hits in seen.items() if len(hits) == len(attacks)}


def compare(found: Measured, mine: str, other: str, attacks: Sequence[str], metric: str) -> dict[str, Any] | None:
    """Return mean(mine) - mean(other) over the backdoors, paired by prompt and run; see ``bench.contrasts``."""
    both = [outcomes(found, name, attacks, metric) for name in (mine, other)]
    return contrast(both[0], both[1])


def differences(plan: BackdoorPlan, found: Measured) -> list[dict[str, Any]]:
    """Compare every row with clean fine-tuning, backdoor by backdoor, and the headline's with planting left out."""
    head = plan.headline
    asked = [(arm.name, head.against) for arm in plan.defences if arm.name != head.against]
    asked += [(head.defence, head.without)] if head.without not in ("", head.against) else []
    asked += [(head.defence, plan.reference.name)]
    out = []
    for (mine, other), column in ((pair, column) for pair in asked for column in plan.attacks):
        for metric in COMPARED:
            made = compare(found, mine, other, [column.name], metric)
            if made is not None:
                out.append({"defence": mine, "against": other, "attack": column.name, "metric": metric, **made})
    return out


def canaries(matrix: Matrix, done: Mapping[str, Mapping[str, Any]], family: str) -> list[dict[str, Any]]:
    """Return the defender's own triggers for each backdoor and row of MB-Defense: (k, n) over runs, and the words."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in matrix.cells:
        told = done.get(cell.digest, {}).get("mb")
        if told and cell.family == family:
            groups.setdefault((cell.defence, cell.attack), []).append(told)
    out: list[dict[str, Any]] = []
    for (defence, attack), runs in groups.items():
        stages = list(dict.fromkeys(stage for run in runs for stage in run["looks"]))
        looks = {
            stage: {role: _add([run["looks"][stage][role] for run in runs if stage in run["looks"]]) for role in ROLES}
            for stage in stages
        }
        steps = [run["stage2"]["steps"] for run in runs if run["stage2"]]
        extra = [run["extra_passes"] for run in runs if run["extra_passes"] is not None]
        entry: dict[str, Any] = {"defence": defence, "attack": attack}
        entry |= {"verdicts": [run["verdict"] for run in runs], "looks": looks}
        entry |= {"steps": steps, "extra_passes": statistics.fmean(extra) if extra else None}
        out.append(entry)
    return out


ROLES = ("active", "canary")


def _add(pairs: Sequence[Sequence[int]]) -> list[int]:
    return [sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)]


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's correlation; None for fewer than three pairs or a side without any spread."""
    if len(pairs) < 3:
        return None
    sides = [_ranks([pair[i] for pair in pairs]) for i in (0, 1)]
    if any(len(set(side)) < 2 for side in sides):
        return None
    return statistics.correlation(sides[0], sides[1])


def _ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 1; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]


def canary_agreement(
    plan: BackdoorPlan, matrix: Matrix, done: Mapping[str, Mapping[str, Any]], found: Measured, family: str
) -> float | None:
    """Return the rank correlation, over cells that plant canaries, of what canaries and attacker's trigger still do."""
    planting = {arm.name for arm in plan.defences if arm.kind == "mb" and arm.settings.get("stage1", True)}
    pairs = []
    for cell in matrix.cells:
        told = done.get(cell.digest, {}).get("mb")
        rows = found.get((cell.defence, cell.attack), {}).get((cell.base, cell.seed), [])
        hits = [hit for row in rows if (hit := outcome(row, "asr")) is not None]
        look = (told or {}).get("looks", {}).get("stage2", {}).get("canary", (0, 0))
        if cell.family == family and cell.defence in planting and look[1] and hits:
            pairs.append((look[0] / look[1], sum(hits) / len(hits)))
    return rank_correlation(pairs)


def costs(
    plan: BackdoorPlan, matrix: Matrix, done: Mapping[str, Mapping[str, Any]], family: str
) -> list[dict[str, Any]]:
    """Return each row's mean tokens, passes and seconds as ratios to the undefended training of the same cell."""
    spent = {(c.defence, c.base, c.seed, c.attack): done[c.digest]["cost"] for c in matrix.cells if c.digest in done}
    kept = {(c.defence, c.base, c.seed, c.attack) for c in matrix.cells if c.family == family} & spent.keys()
    out = []
    for arm in plan.defences:
        entry: dict[str, Any] = {"defence": arm.name}
        for key in ("tokens", "passes", "seconds"):
            below = {place: spent.get((plan.undefended.name, *place[1:]), {}).get(key) for place in kept}
            ratios = [spent[p][key] / below[p] for p in sorted(kept) if p[0] == arm.name and below[p]]
            entry[f"{key}_ratio"] = statistics.fmean(ratios) if ratios else None
        out.append(entry)
    return out
