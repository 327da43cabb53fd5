"""Stage tuning on the page: one row a defence, one column a job, coloured so that the table reads as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from casehard.benchmark.lookup import percent, percents
from casehard.reporting import figures
from casehard.reporting.page_data import SHORT, View, points

BAD = {"asr", "leak", "over_refusal"}
"""Metrics of which less is better."""
HEAT = ("asr", "leak")
"""Metrics shown job by job; the others as means over the jobs."""
MEANS = ("fine_tunability", "utility", "over_refusal", "twin_knowledge")


def _shade(metric: str, value: float) -> str:
    """Return a background whose strength is how bad the value is."""
    bad = value if metric in BAD else 1 - value
    return f"rgba(190, 60, 40, {0.75 * max(0.0, min(1.0, bad)):.2f})"


def _one(metric: str, value: float | None) -> dict[str, str]:
    if value is None:
        return {"text": "-", "span": "", "shade": "transparent"}
    return {"text": percent(value), "span": "", "shade": _shade(metric, value)}


def _mean(entry: Mapping[str, Any] | None) -> dict[str, str]:
    if entry is None:
        return {"text": "-", "span": "", "shade": "transparent"}
    span = percents(entry["low"], entry["high"]) + ("" if len(entry["runs"]) > 1 else ", single run")
    return {"text": percent(entry["mean"]), "span": span, "shade": _shade(entry["metric"], entry["mean"])}


def job_part(view: View) -> dict[str, Any] | None:
    """Return what the page shows of all jobs together; None for a plan of another stage."""
    rows = [r for r in view.summary.get("jobs", []) if r["family"] == view.family]
    if not rows:
        return None
    found = {(r["defence"], r["metric"]): r for r in rows}
    heats = [h for metric in HEAT if (h := _heat(view, found, metric)) is not None]
    means = [m for m in MEANS if any((d["name"], m) in found for d in view.defences)]
    table = [
        {
            "title": d["title"],
            "cells": [_mean(found.get((d["name"], m))) for m in (*HEAT, *means)],
            "difference": _difference(found.get((d["name"], "asr"))),
        }
        for d in view.defences
    ]
    return {
        "heats": heats,
        "heads": [SHORT[m] for m in (*HEAT, *means)],
        "table": table,
        "against": next((d["title"] for d in view.defences if d["name"] == view.headline.get("against")), ""),
        "plane": _plane(view, found),
    }


def _heat(view: View, found: Mapping[tuple[str, str], Mapping[str, Any]], metric: str) -> dict[str, Any] | None:
    if not any(key[1] == metric for key in found):
        return None
    rows = []
    for d in view.defences:
        entry = found.get((d["name"], metric))
        jobs = entry["jobs"] if entry else {}
        rows.append({"title": d["title"], "cells": [_one(metric, jobs.get(a["name"])) for a in view.attacks]})
    return {"title": SHORT[metric], "heads": [a["title"] for a in view.attacks], "rows": rows}


def _difference(entry: Mapping[str, Any] | None) -> str:
    if entry is None or "difference" not in entry:
        return "-"
    low, high = entry["difference_low"], entry["difference_high"]
    text = f"{points(entry['difference'])} ({points(low)} to {points(high)})"
    runs, compared = len(entry["runs"]), entry.get("compared", len(entry["runs"]))
    lost = f", {compared} of {runs} runs compared" if compared < runs else ""
    if compared < 2:
        return f"{points(entry['difference'])} (single run{lost})"
    return text + lost + ("; made no difference" if low <= 0 <= high else "")


def _plane(view: View, found: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, str] | None:
    """Return mean ASR against what the customer's task reached."""
    marks = []
    for d in view.defences:
        x, y = found.get((d["name"], "fine_tunability")), found.get((d["name"], "asr"))
        if x and y:
            bars = [
                figures.Bar(view.looks[d["name"]], e["mean"], e["low"], e["high"], tuple(e["runs"])) for e in (x, y)
            ]
            marks.append((bars[0], bars[1]))
    if len(marks) < 2:
        return None
    said = "; ".join(f"{x.look.title}: task {percent(x.value)}, ASR {percent(y.value)}" for x, y in marks)
    svg = figures.plane(
        f"{view.family}-jobs-plane",
        marks,
        x_label="accuracy on the customer's task (better is right)",
        y_label="mean ASR over the jobs (better is up)",
        described=said,
    )
    return {"svg": svg, "caption": "Mean over the poisoned jobs; bars are 95 % intervals over runs, ticks are runs"}


def telemetry_part(view: View) -> dict[str, Any] | None:
    """Return the table of what the methods logged about their own steps; None when none did."""
    means = {t["defence"]: t["means"] for t in view.summary.get("telemetry", [])}
    keys = list(dict.fromkeys(key for found in means.values() for key in found))
    if not keys:
        return None
    titles = {d["name"]: d["title"] for d in view.defences if d["name"] in means}
    titles |= {name: name for name in means if name not in titles}  # trained, and never measured
    rows = [
        {"title": title, "cells": [_number(means[name].get(key)) for key in keys]} for name, title in titles.items()
    ]
    return {"heads": [key.replace("_", " ") for key in keys], "rows": rows}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
