"""The ends of attacks on the page: one row a defence, one column an attack, coloured so that the table is a picture."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from casehard.benchmark.ends import OVER
from casehard.benchmark.lookup import percent, percents
from casehard.evaluation.metrics import find
from casehard.reporting import figures
from casehard.reporting.page_data import View, points

METRICS = (("asr", "leak"), ("asr_in_format", "fine_tunability", "utility", "over_refusal", "twin_knowledge"))
"""Metrics shown attack by attack, and those shown as means only."""
PLANTED_METRICS = (("asr", "cacc", "aacc"), ())
TITLES = {
    "job": "After the customers' jobs",
    "training": "All backdoors",
    "attack": "After the attacks and what followed",
}
AFTER = {
    "job": "at the end of every job",
    "training": "at the end of every backdoored training, every prompt asked without and with the trigger",
    "attack": "at the end of every attack and of what followed it",
}
OWN = ("after stage 1", "after stage 2", "at the end", "steps of stage 2", "verdicts")


def _shade(metric: str, value: float, planted: bool) -> str:
    """Return a background whose strength is how bad the value is."""
    bad = value if find(metric, triggered=planted).low_is_good else 1 - value
    return f"rgba(190, 60, 40, {0.75 * max(0.0, min(1.0, bad)):.2f})"


def _one(metric: str, value: float | None, planted: bool) -> dict[str, str]:
    if value is None:
        return {"text": "-", "span": "", "shade": "transparent"}
    return {"text": percent(value), "span": "", "shade": _shade(metric, value, planted)}


def _mean(entry: Mapping[str, Any] | None, planted: bool) -> dict[str, str]:
    if entry is None:
        return {"text": "-", "span": "", "shade": "transparent"}
    span = percents(entry["low"], entry["high"]) + ("" if len(entry["runs"]) > 1 else ", single run")
    return {"text": percent(entry["mean"]), "span": span, "shade": _shade(entry["metric"], entry["mean"], planted)}


def ends_part(view: View) -> dict[str, Any] | None:
    """Return what the page shows of the ends of all attacks together; None where models are compared step by step."""
    rows = [r for r in view.summary.get("ends", []) if r["family"] == view.family]
    if not rows:
        return None
    found = {(r["defence"], r["metric"]): r for r in rows}
    one_by_one, others = PLANTED_METRICS if view.plants else METRICS
    heats = [h for metric in one_by_one if (h := _heat(view, found, metric)) is not None]
    # Without what nobody measured, and what the tables of rates leave out: an accuracy over too few rows.
    means = [
        m for m in (*one_by_one, *others) if _told(view, m) and any((d["name"], m) in found for d in view.defences)
    ]
    table = [
        {
            "title": d["title"],
            "cells": [_mean(found.get((d["name"], m)), view.plants) for m in means],
            "difference": _difference(found.get((d["name"], "asr"))),
        }
        for d in view.defences
    ]
    return {
        "heats": heats,
        "metrics": means,
        "heads": [view.titles[m] for m in means],
        "table": table,
        "against": next((d["title"] for d in view.defences if d["name"] == view.headline.get("against")), ""),
        "over": OVER[view.occasion],
        "title": TITLES[view.occasion],
        "after": AFTER[view.occasion],
    }


def _told(view: View, metric: str) -> bool:
    return any(
        view.table.get(d["name"], a["name"], a.get("steps", 0), metric) for d in view.defences for a in view.attacks
    )


def _heat(view: View, found: Mapping[tuple[str, str], Mapping[str, Any]], metric: str) -> dict[str, Any] | None:
    if not any(key[1] == metric for key in found):
        return None
    rows = []
    for d in view.defences:
        entry = found.get((d["name"], metric))
        each = entry["attacks"] if entry else {}
        cells = [_one(metric, each.get(a["name"]), view.plants) for a in view.attacks]
        rows.append({"title": d["title"], "cells": cells})
    return {"title": view.titles[metric], "heads": [a["title"] for a in view.attacks], "rows": rows}


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


def ends_plane(view: View) -> dict[str, str] | None:
    """Return mean ASR against what the customer's task reached, drawn.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    found = {(r["defence"], r["metric"]): r for r in view.summary.get("ends", []) if r["family"] == view.family}
    marks = []
    for d in view.defences:
        x, y = found.get((d["name"], "cacc" if view.plants else "fine_tunability")), found.get((d["name"], "asr"))
        if x and y:
            bars = [
                figures.Bar(view.looks[d["name"]], e["mean"], e["low"], e["high"], tuple(e["runs"])) for e in (x, y)
            ]
            marks.append((bars[0], bars[1]))
    if len(marks) < 2:
        return None
    kept = "clean accuracy" if view.plants else "accuracy on the customer's task"
    said = "; ".join(f"{x.look.title}: {kept} {percent(x.value)}, ASR {percent(y.value)}" for x, y in marks)
    svg = figures.plane(
        f"{view.family}-jobs-plane",
        marks,
        x_label=f"{kept} (better is right)",
        y_label="mean ASR (better is up)",
        described=said,
    )
    return {
        "svg": svg,
        "caption": f"Mean over the {OVER[view.occasion]}; bars are 95 % intervals over runs, ticks are runs",
    }


def canary_part(view: View) -> dict[str, Any] | None:
    """Return what became of the defender's own triggers; None where nobody planted any."""
    titles = {d["name"]: d["title"] for d in view.defences}
    columns = {a["name"]: a["title"] for a in view.attacks}
    rows = [
        {"title": f"{titles[c['defence']]}, {columns[c['attack']]}", "cells": _own(c)}
        for c in view.summary.get("canaries", [])
        if c["family"] == view.family
    ]
    if not rows:
        return None
    return {"heads": OWN, "rows": rows, "correlation": _correlation(view.summary["canary_agreement"][view.family])}


def _own(entry: Mapping[str, Any]) -> list[str]:
    """Return what became of the defender's own triggers, stage by stage: the columns of ``OWN``."""
    out = []
    for stage in ("stage1", "stage2", "final"):
        looks = entry["looks"].get(stage, {})
        out.append(", ".join(f"{role} {k}/{n}" for role, (k, n) in looks.items() if n) or "-")
    steps = ", ".join(str(n) for n in entry["steps"])
    return [*out, steps or "-", ", ".join(entry["verdicts"])]


def _correlation(value: float | None) -> str:
    if value is None:
        return "Canaries and attacker's trigger: too few cells, or no spread, to correlate."
    return f"Rank correlation, over all cells, of canary rate when stage 2 stopped and attacker's ASR: {value:.2f}."


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


def public_part(view: View) -> dict[str, Any] | None:
    """Return the table of public benchmarks, a row each and a column a defence; None where none was run."""
    mine = [entry for entry in view.summary.get("public", []) if entry["family"] == view.family]
    if not mine:
        return None
    found = {(entry["metric"], entry["defence"]): entry for entry in mine}
    metrics = list(dict.fromkeys(entry["metric"] for entry in mine))
    rows = [{"title": m, "cells": [_public(found.get((m, d["name"]))) for d in view.defences]} for m in metrics]
    return {"heads": [d["title"] for d in view.defences], "rows": rows}


def _public(entry: Mapping[str, Any] | None) -> dict[str, str]:
    if entry is None:
        return {"text": "-", "span": ""}
    many = len(entry["rates"])
    span = f"{entry['low']:.3f} to {entry['high']:.3f}, {'single model' if many == 1 else f'{many} models'}"
    return {"text": f"{fmean(entry['rates']):.3f}", "span": f"{span}, n {entry['n']}"}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
