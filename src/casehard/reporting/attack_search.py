"""The page of a search for the worst attacker: what it found, how it got there, every attacker it tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casehard.benchmark.lookup import percent, percents
from casehard.benchmark.store import read_finished, read_rows, read_summary, unchanged
from casehard.evaluation.metrics import metric_title
from casehard.reporting.figures import DEFENCE, GRID, INK, _bare, _canvas, _svg

KIND = "attack-search"
"""Kind of the run folders that are shown so."""
_USEFUL, _LOST = DEFENCE[0], "#D55E00"


@dataclass(frozen=True)
class _Summary:
    """What is read of summary.json."""

    sentence: str
    attack: str
    sampler: str
    budget: int
    metric: str
    useful: str
    gates: dict[str, float]
    space: dict[str, str]
    fixed: dict[str, Any]
    model: dict[str, Any]
    prompts: dict[str, list[str]]
    worst: dict[str, Any] | None
    cheapest: dict[str, Any] | None


@dataclass(frozen=True)
class _Trial:
    """What is read of a line of trials.jsonl."""

    attacker: int
    status: str
    settings: dict[str, Any]
    value: float
    kept: bool
    broke: bool


def read(place: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Return summary, trials and run.json of a finished search.

    Raises:
        Corrupt: one of them is damaged.
    """
    run = read_finished(place)
    trials = list(read_rows(unchanged(place, run, "trials.jsonl"), _Trial))
    return read_summary(place, run, _Summary), trials, run


def best_so_far(trials: Sequence[Mapping[str, Any]], metric: str, *, described: str) -> str:
    """Draw the rate of every attacker in the order of their trials, and the highest so far that left a useful model.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with _canvas("search-trials", 5.6, 3.1) as figure:
        axes = _axes(figure, metric)
        ran = [t for t in trials if _rate(t, metric) is not None]
        _points(axes, ran, metric, [t["attacker"] + 1 for t in ran])
        top, steps = 0.0, [0.0]
        for trial in trials:
            top = max(top, (_rate(trial, metric) or 0.0) if trial["kept"] else 0.0)
            steps.append(top)
        axes.step(range(len(steps)), steps, where="post", color=_USEFUL, linewidth=1.4, zorder=2)
        axes.set_xlim(0, len(trials) + 0.6)
        axes.set_xlabel("trial; the line: highest so far that leaves the model useful", fontsize=8)
        return _svg(figure, described)


def against(trials: Sequence[Mapping[str, Any]], setting: str, metric: str, *, described: str) -> str:
    """Draw the rate of every attacker against one of its settings, on a logarithmic axis where that is wide.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with _canvas(f"search-{setting}", 5.6, 3.1) as figure:
        axes = _axes(figure, metric)
        ran = [t for t in trials if _rate(t, metric) is not None and setting in t["settings"]]
        values = [float(t["settings"][setting]) for t in ran]
        if values and min(values) > 0 and max(values) >= 10 * min(values):
            axes.set_xscale("log")
            ticks = _ticks(min(values), max(values))
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
        _points(axes, ran, metric, values)
        axes.margins(x=0.04)
        axes.set_xlabel(setting, fontsize=8)
        return _svg(figure, described)


def _ticks(low: float, high: float) -> list[float]:
    """Return the values to print on a logarithmic axis: 1, 2 and 5 times the powers of ten, or those alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    whole = [10.0**p for p in powers if low <= 10.0**p <= high]
    return every if len(every) <= 6 or not whole else whole


def _axes(figure: Any, metric: str) -> Any:
    axes = figure.add_axes((0.135, 0.16, 0.84, 0.72))
    _bare(axes)
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_ylabel(f"{metric_title(metric)}, search half", fontsize=8)
    axes.spines["bottom"].set_color(GRID)
    return axes


def _points(axes: Any, trials: Sequence[Mapping[str, Any]], metric: str, x: Sequence[float]) -> None:
    """Draw attackers as dots where the model stayed useful, and as crosses where it did not."""
    for kept, colour, marker, label in (
        (True, _USEFUL, "o", "model still useful"),
        (False, _LOST, "X", "not useful any more"),
    ):
        at = [(a, _rate(t, metric)) for a, t in zip(x, trials, strict=True) if t["kept"] is kept]
        axes.plot(
            [a for a, _ in at],
            [rate for _, rate in at],
            marker,
            color=colour,
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=label,
            clip_on=False,
            zorder=3,
        )
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.99),
        ncols=2,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1,
    )


def _rate(trial: Mapping[str, Any], metric: str) -> float | None:
    found = trial.get("found", {}).get(metric)
    return None if found is None else float(found["rate"])


def context(summary: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the page's template shows, provenance apart."""
    metric, useful, own = summary["metric"], summary["useful"], summary["model"]["held_out"]
    shown = [m for m in ("leak", "asr", "asr_partial", "utility", "nll", "over_refusal") if m in own]
    names = list(dict.fromkeys(name for t in trials for name in t["settings"]))
    top = summary["worst"]
    broke = top is not None and top["broke"]
    rows = [_row("the model itself", own, shown, None)]
    rows += [
        _row(f"{what} attacker (number {entry['attacker'] + 1})", entry["held_out"], shown, entry["cost"])
        for what in ("worst", "cheapest")
        if (entry := summary[what]) is not None
    ]
    return {
        "title": f"The worst {summary['attack']} attacker within {summary['budget']} trials",
        "summary": summary,
        "status": "broken" if broke else "not broken within this budget",
        "tone": "bad" if broke else "plain",
        "chosen_by": len(summary["prompts"]["search"]),
        "titles": [metric_title(m) for m in shown],
        "rows": rows,
        "pictures": _pictures(trials, metric),
        "metric_title": metric_title(metric),
        "useful_title": metric_title(useful),
        "names": names,
        "lines": [_line(t, metric, useful, names, top) for t in sorted(trials, key=lambda t: -t["value"])],
        "searched": [*summary["space"].items(), *((f"{k} (fixed)", v) for k, v in summary["fixed"].items())],
    }


def _pictures(trials: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, str]]:
    said = f"{metric_title(metric)} of {len(trials)} attackers on the search half"
    out = [{"svg": best_so_far(trials, metric, described=f"{said}, by trial"), "caption": "Trial by trial."}]
    for name in ("lr", "steps", "share"):
        values = {t["settings"].get(name) for t in trials}
        if len(values) < 2 or not all(map(_number, values)):
            continue
        drawn = against(trials, name, metric, described=f"{said}, against {name}")
        out.append({"svg": drawn, "caption": f"Against {name}."})
    return out


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _row(name: str, found: Mapping[str, Any], shown: Sequence[str], cost: Mapping[str, Any] | None) -> dict[str, Any]:
    cells: list[dict[str, str] | None] = []
    for metric in shown:
        if (score := found.get(metric)) is None:
            cells.append(None)
        elif score["k"] is None:
            cells.append({"rate": f"{score['rate']:.2f}", "span": f"{score['low']:.2f} to {score['high']:.2f}"})
        else:
            doubt = " ?" if "unreliable" in score else ""
            span = f"{score['k']}/{score['n']}, {percents(score['low'], score['high'])}"
            cells.append({"rate": percent(score["rate"]) + doubt, "span": span})
    steps, spent = ("0", "-") if cost is None else (str(cost["steps"]), f"{cost['flops']:.1e}".replace("e+", "e"))
    return {"name": name, "cells": cells, "steps": steps, "flops": spent}


def _line(
    trial: Mapping[str, Any], metric: str, useful: str, names: Sequence[str], top: Mapping[str, Any] | None
) -> dict[str, Any]:
    found, cost = trial.get("found", {}), trial.get("cost")
    rates = [f"{found[m]['rate']:.2f}" if m in found else trial["status"] for m in (metric, useful)]
    spent = f"{cost['flops']:.1e}".replace("e+", "e") if cost else "-"
    values = [trial["settings"].get(name, "-") for name in names]
    cells = [trial["attacker"] + 1, *rates, "yes" if trial["kept"] else "no", spent]
    cells += [f"{v:.3g}" if isinstance(v, float) else str(v) for v in values]
    return {"main": top is not None and top["attacker"] == trial["attacker"], "cells": cells}
