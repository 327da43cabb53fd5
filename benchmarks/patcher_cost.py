"""Draw Patcher's cost model: time of an outer step and age of the vector against k1 / k2, and memory, by schedule.

    python benchmarks/patcher_cost.py docs/img/patcher_cost.svg

Arithmetic of ``casehard.defences.patcher.cost``, nothing measured; ``patcher_parallel.py`` measures what it predicts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from casehard.defences.patcher.cost import Cost, costs
from casehard.reporting.figures import ABLATION, BASELINE, DEFENCE, MUTED, _bare, _canvas, _svg

K2 = 1000
COLOURS = {
    "sequential": MUTED,
    "lockstep": ABLATION[1],
    "async": DEFENCE[0],
    "reference_parallel": BASELINE[0],
}
LABELS = {"reference_parallel": "published timing"}


def label(name: str) -> str:
    return LABELS.get(name, name)


def curves(axes: Any, value: Any, names: list[str], title: str) -> None:
    ratios = [i / 20 for i in range(1, 61)]
    table = [{c.schedule: c for c in costs(round(r * K2), K2)} for r in ratios]
    for name in names:
        line = [value(row[name]) for row in table]
        axes.plot(
            ratios, line, color=COLOURS[name], linewidth=2, linestyle=(0, (4, 2)) if name == "sequential" else "-"
        )
        axes.annotate(
            label(name), (ratios[-1], line[-1]), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xlim(0, ratios[-1])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("k1 / k2")
    axes.set_title(title, loc="left", fontsize=9)
    _bare(axes)


def memory(axes: Any) -> None:
    rows: list[tuple[str, float, str]] = []
    found: dict[str, Cost] = {c.schedule: c for c in costs(300, K2)}
    rows.append(("plain fine-tuning", 16.0, MUTED))
    rows.append(("sequential: while attacked", found["sequential"].defender, COLOURS["sequential"]))
    rows.append(("async: defender", found["async"].defender, COLOURS["async"]))
    rows.append(("async: each attacker", found["async"].attacker, COLOURS["async"]))
    rows.append(("async: host of the defender", found["async"].host, COLOURS["async"]))
    for i, (_, size, colour) in enumerate(reversed(rows)):
        axes.barh(i, size, color=colour, height=0.6)
        axes.annotate(f"{size:.0f}", (size, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)], fontsize=8)
    axes.set_xlim(0, 34)
    axes.set_title("bytes a parameter (bf16 autocast)", loc="left", fontsize=9)
    _bare(axes, grid="x")


def main(path: str) -> None:
    with _canvas("patcher-cost", 12.5, 3.2) as figure:
        left, middle, right = (
            figure.add_axes((x, 0.16, w, 0.72)) for x, w in ((0.03, 0.23), (0.38, 0.23), (0.8, 0.19))
        )
        names = ["sequential", "async"]
        curves(left, lambda c: c.round_passes / K2, names, "time of an outer step, in passes")
        curves(middle, lambda c: c.age / K2, ["sequential", "async", "reference_parallel"], "mean age, in rounds")
        memory(right)
        Path(path).write_text(_svg(figure, "Cost of Patcher's schedules against k1 / k2: time, age, memory"))


if __name__ == "__main__":
    main(sys.argv[1])
