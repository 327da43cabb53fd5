"""Stage backdoor on the page: an overview shaded so that it reads as a picture, then one table for each backdoor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from casehard.benchmark.backdoor_verdict import interval_text
from casehard.benchmark.lookup import percent
from casehard.reporting.page_data import points

STATUS = {
    "meets": ("meets every goal", "good"),
    "lowers": ("lowers it, not every goal met", "good"),
    "no_difference": ("made no difference", "plain"),
    "disagree": ("the runs disagree", "plain"),
    "worse": ("makes it worse", "bad"),
    "collapsed": ("no claim", "bad"),
    "shallow": ("backdoors too shallow: no claim", "plain"),
    "too_weak": ("attack too weak: no claim", "plain"),
    "not_measured": ("no claim", "plain"),
}
COLUMNS = {
    "asr": "ASR",
    "cacc": "clean accuracy",
    "aacc": "accuracy under the trigger",
    "false_trigger": "payload without trigger",
    "degenerate": "degenerate under the trigger",
}
BAD = {"asr", "false_trigger", "degenerate"}
"""Metrics of which less is better."""
EMPTY: dict[str, Any] = {"tiles": [], "jobs": None, "attacks": [], "plane": None, "before": [], "costs": []}
EMPTY |= {"strips": [], "broken_when": "", "break_rows": [], "tuning": False, "tables": [], "differences": []}


def backdoor_parts(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the page shows of each family of bases."""
    plan = summary["plan"]
    return [
        {
            **EMPTY,
            "name": verdict["family"],
            "verdict": verdict,
            "status": STATUS[verdict["status"]],
            "backdoors": _family(plan, verdict, table),
        }
        for verdict, table in zip(summary["verdicts"], summary["backdoors"], strict=True)
    ]


def arm_rows(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table that says how every model was made."""
    return [
        {
            "colour": "transparent",
            "title": arm["title"],
            "role": arm["role"].replace("_", " "),
            "method": arm["method"] or arm["kind"].replace("_", " "),
            "settings": _flow(arm["settings"]),
            "train": _flow(arm["train"]),
        }
        for arm in plan["defences"]
    ]


def _flow(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {_flow(v) if isinstance(v, Mapping) else v}" for key, v in values.items())


def _family(plan: Mapping[str, Any], verdict: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    found = {(p["attack"], p["defence"], p["metric"]): p for p in table["pooled"]}
    heats = [
        {
            "title": COLUMNS[metric],
            "heads": [column["title"] for column in plan["attacks"]],
            "rows": [
                {
                    "title": arm["title"],
                    "cells": [_cell(metric, found.get((c["name"], arm["name"], metric))) for c in plan["attacks"]],
                }
                for arm in plan["defences"]
            ],
        }
        for metric in ("asr", "cacc", "aacc")
    ]
    judged = {b["attack"]: b["text"] for b in verdict["backdoors"]}
    against = next(arm["title"] for arm in plan["defences"] if arm["name"] == plan["headline"]["against"])
    return {
        "heats": heats,
        "heads": [*COLUMNS.values(), f"ASR against {against}", f"clean accuracy against {against}"],
        "columns": [_column(plan, table, found, column, judged[column["name"]]) for column in plan["attacks"]],
        "costs": _costs(plan, table),
        "own_heads": OWN,
        "correlation": _correlation(table["canary_rank_correlation"]),
    }


def _column(
    plan: Mapping[str, Any],
    table: Mapping[str, Any],
    found: Mapping[tuple[str, str, str], Mapping[str, Any]],
    column: Mapping[str, Any],
    judged: str,
) -> dict[str, Any]:
    name = column["name"]
    gaps = {
        (d["defence"], d["metric"]): d
        for d in table["differences"]
        if d["attack"] == name and d["against"] == plan["headline"]["against"]
    }
    own = {c["defence"]: c for c in table["canaries"] if c["attack"] == name}
    facts = f"Trigger {column['trigger']}, behaviour {column['behaviour']}, {percent(column['rate'])} of the rows"
    if column["hard_negatives"]:
        facts += f", and {percent(column['hard_negatives'])} near misses with their proper answers"
    rows = [
        {
            "title": arm["title"],
            "main": arm["name"] == plan["headline"]["defence"],
            "cells": [_cell(metric, found.get((name, arm["name"], metric)), whole=True) for metric in COLUMNS],
            "gaps": [_gap(gaps.get((arm["name"], metric))) for metric in ("asr", "cacc")],
        }
        for arm in plan["defences"]
    ]
    planted = [
        {"title": arm["title"], "cells": _own(own[arm["name"]])} for arm in plan["defences"] if arm["name"] in own
    ]
    return {"title": column["title"], "facts": facts, "judged": judged, "rows": rows, "own": planted}


def _cell(metric: str, entry: Mapping[str, Any] | None, *, whole: bool = False) -> dict[str, Any]:
    if entry is None:
        return {"text": "-", "spans": [], "count": "", "shade": "transparent"}
    bad = entry["rate"] if metric in BAD else 1 - entry["rate"]
    return {
        "text": percent(entry["rate"]),
        "spans": interval_text(entry).split("; ") if whole else [],
        "count": f"{entry['k']}/{entry['n']}" if whole else "",
        "shade": f"rgba(190, 60, 40, {0.75 * bad:.2f})",
    }


def _gap(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    text = f"{points(entry['difference'])} ({points(entry['low'])} to {points(entry['high'])})"
    return text + ("; made no difference" if entry["no_difference"] else "")


OWN = ("after stage 1", "after stage 2", "at the end", "steps of stage 2", "verdicts")


def _own(entry: Mapping[str, Any]) -> list[str]:
    """Return what became of the defender's own triggers, stage by stage: the columns of ``OWN``."""
    out = []
    for stage in ("stage1", "stage2", "final"):
        looks = entry["looks"].get(stage, {})
        out.append(", ".join(f"{role} {k}/{n}" for role, (k, n) in looks.items() if n) or "-")
    steps = ", ".join(str(n) for n in entry["steps"])
    return [*out, steps or "-", ", ".join(entry["verdicts"])]


def _costs(plan: Mapping[str, Any], table: Mapping[str, Any]) -> list[dict[str, Any]]:
    titles = {arm["name"]: arm["title"] for arm in plan["defences"]}
    keys = ("tokens_ratio", "passes_ratio", "seconds_ratio")
    return [
        {"title": titles[c["defence"]], "cells": ["-" if c[key] is None else f"{c[key]:.2f}" for key in keys]}
        for c in table["costs"]
    ]


def _correlation(value: float | None) -> str:
    if value is None:
        return "Canaries and attacker's trigger: too few cells, or no spread, to correlate."
    return f"Rank correlation, over all cells, of canary rate when stage 2 stopped and attacker's ASR: {value:.2f}."
