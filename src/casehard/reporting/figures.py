"""Figures as SVG text: same input, same bytes. Text stays text, so it can be selected, searched and read aloud.

Colours are those of Okabe and Ito (distinguishable with any colour vision); every series also has its own marker and a
label at its end, so that nothing is said by colour alone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from xml.sax.saxutils import quoteattr

from casehard.benchmark.lookup import percent
from casehard.errors import MissingExtra

INK, MUTED, GRID = "#1d2430", "#667080", "#e3e7ec"
DEFENCE = ("#0072B2", "#009E73", "#56B4E9", "#8C6BB1")
ABLATION = ("#CC79A7", "#E69F00", "#A6761D")
BASELINE = ("#B2182B", "#762A83", "#1B7837", "#E08214", "#542788", "#35978F")
CONTROL = {"undefended": "#7a828c", "unattacked": "#4d4d4d", "same_passes": "#D55E00"}
MARKERS = {"undefended": "X", "unattacked": "P", "same_passes": "s", "ablation": "D", "baseline": "^", "defence": "o"}
DASHES: dict[str, Any] = {
    "undefended": (0, (1, 1.6)),
    "unattacked": (0, (1, 3)),
    "same_passes": (0, (5, 1.6)),
    "ablation": (0, (3, 1, 1, 1)),
}


@dataclass(frozen=True)
class Look:
    """How one defence is drawn, everywhere."""

    title: str
    colour: str
    marker: str
    dash: Any = "solid"


@dataclass(frozen=True)
class Bar:
    """A value with its interval and the replicates behind it."""

    look: Look
    value: float
    low: float
    high: float
    dots: Sequence[float] = field(default_factory=tuple)


@dataclass(frozen=True)
class Line:
    """A curve over attack steps; ``low`` and ``high`` span the replicates."""

    look: Look
    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def looks(defences: Sequence[dict[str, Any]]) -> dict[str, Look]:
    """Give every defence of a plan its look: by role first, then by order."""
    wheels = {"defence": DEFENCE, "ablation": ABLATION, "baseline": BASELINE}
    used = dict.fromkeys(wheels, 0)
    out = {}
    for row in defences:
        role = row["role"]
        if role in CONTROL:
            colour = CONTROL[role]
        else:
            colour = wheels[role][used[role] % len(wheels[role])]
            used[role] += 1
        out[row["name"]] = Look(row["title"], colour, MARKERS[role], DASHES.get(role, "solid"))
    return out


@contextmanager
def _canvas(name: str, width: float, height: float) -> Iterator[Any]:
    """Yield a bare figure drawn without any global state of pyplot."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "report", purpose="figures of the report") from None
    settings: Any = {
        "svg.hashsalt": f"casehard-{name}",
        "svg.fonttype": "none",
        # Titles come from plans; a dollar sign in one is not a formula.
        "text.parse_math": False,
        "axes.unicode_minus": False,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "text.color": INK,
    }
    with rc_context(settings):
        yield Figure(figsize=(width, height), layout=None)


def _svg(figure: Any, described: str) -> str:
    """Return the figure as an inline SVG element with a description and without dates or metadata."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # The page decides the width; the view box keeps the proportions.
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f"<svg role={quoteattr('img')} aria-label={quoteattr(described)}", 1)


def _bare(axes: Any, *, grid: str = "y") -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, pad=4)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart until neighbours are ``gap`` apart, staying as near to their places as it goes."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    out = [min(max(p, low), high) for p in places]
    for _ in range(200):
        moved = False
        for a, b in pairwise(order):
            lack = gap - (out[b] - out[a])
            if lack > 1e-9:
                out[a], out[b], moved = out[a] - lack / 2, out[b] + lack / 2, True
        for i in order:
            out[i] = min(max(out[i], low), high)
        if not moved:
            break
    return out


def wrap(text: str, width: int) -> str:
    """Break a label into lines of at most ``width`` characters where it can be broken."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def _label_ends(axes: Any, lines: Sequence[Line]) -> None:
    """Write each line's title beside its end, moved apart where ends lie close together."""
    labels = [wrap(line.look.title, 18) for line in lines]
    tall = max(label.count("\n") + 1 for label in labels)
    heights = spread([line.values[-1] for line in lines], 0.062 * tall + 0.02, 0.0, 1.0)
    for line, label, height in zip(lines, labels, heights, strict=True):
        axes.annotate(
            label,
            (line.steps[-1], line.values[-1]),
            xytext=(1.045, (height + 0.03) / 1.06),
            textcoords="axes fraction",
            color=line.look.colour,
            fontsize=8,
            fontweight="bold",
            va="center",
            linespacing=1.05,
            arrowprops={
                "arrowstyle": "-",
                "color": line.look.colour,
                "linewidth": 0.6,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def curves(
    name: str, lines: Sequence[Line], *, bound: float, bound_text: str, described: str, mark: int | None = None
) -> str:
    """Draw rates against attack steps, labelled at the end of each line.

    Args:
        bound: dashed line above which a model counts as broken.
        mark: attack step of the headline, drawn as a thin vertical line.
    """
    with _canvas(name, 5.6, 3.1) as figure:
        axes = figure.add_axes((0.085, 0.15, 0.665, 0.79))
        _bare(axes)
        axes.set_xscale("function", functions=(_root, _square))
        last = max(line.steps[-1] for line in lines)
        axes.set_xlim(0, last * 1.01)
        axes.set_ylim(-0.03, 1.03)
        axes.axhline(bound, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
        axes.text(
            last, bound - 0.025, bound_text, color=MUTED, fontsize=7.5, va="top", ha="right", bbox=paper, zorder=0.9
        )
        if mark is not None:
            axes.axvline(mark, color=GRID, linewidth=5, zorder=0.4)
        for line in lines:
            look = line.look
            axes.fill_between(line.steps, line.low, line.high, color=look.colour, alpha=0.14, linewidth=0)
            axes.plot(
                line.steps,
                line.values,
                color=look.colour,
                linestyle=look.dash,
                linewidth=2,
                marker=look.marker,
                markersize=4.6,
                markeredgecolor="white",
                markeredgewidth=0.7,
                clip_on=False,
                zorder=3,
            )
        _label_ends(axes, lines)
        ticks = _ticks(sorted({s for line in lines for s in line.steps}), last)
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("attack steps (square-root scale)", fontsize=8)
        return _svg(figure, described)


def _root(x: Any) -> Any:
    import numpy

    return numpy.sqrt(numpy.maximum(x, 0))


def _square(x: Any) -> Any:
    import numpy

    return numpy.square(x)


def _ticks(steps: Sequence[int], last: int) -> list[int]:
    """Return the steps to print: all that have room, the ends always."""
    kept = [last]
    for step in sorted(steps, reverse=True):
        if math.sqrt(kept[-1]) - math.sqrt(step) >= 0.075 * math.sqrt(last):
            kept.append(step)
    return sorted(kept)


def plane(name: str, points: Sequence[tuple[Bar, Bar]], *, x_label: str, y_label: str, described: str) -> str:
    """Draw safety against utility: each defence once, with intervals both ways; the good corner is named.

    Args:
        points: (x, y) per defence.
    """
    with _canvas(name, 5.6, 3.5) as figure:
        axes = figure.add_axes((0.1, 0.14, 0.86, 0.8))
        _bare(axes, grid="both")
        axes.set_xlim(-0.03, 1.05)
        axes.set_ylim(1.05, -0.05)
        axes.text(1.03, 0.0, "useful and safe", ha="right", va="center", color=MUTED, fontsize=8, style="italic")
        axes.text(0.0, 1.0, "neither", ha="left", va="center", color=MUTED, fontsize=8, style="italic")
        heights = spread([y.value for _, y in points], 0.075, 0.07, 0.97)
        for (x, y), height in zip(points, heights, strict=True):
            colour = x.look.colour
            axes.plot([x.low, x.high], [y.value, y.value], color=colour, linewidth=1.4, alpha=0.6)
            axes.plot([x.value, x.value], [y.low, y.high], color=colour, linewidth=1.4, alpha=0.6)
            axes.plot(
                [x.value],
                [y.value],
                color=colour,
                marker=x.look.marker,
                markersize=8,
                markeredgecolor="white",
                linestyle="none",
                zorder=3,
            )
            right = x.value < 0.5
            axes.annotate(
                x.look.title,
                (x.value, y.value),
                xytext=(max(x.value, x.high) + 0.04 if right else min(x.value, x.low) - 0.04, height),
                ha="left" if right else "right",
                va="center",
                color=colour,
                fontsize=8.5,
                fontweight="bold",
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 5},
            )
        marks = [0, 0.25, 0.5, 0.75, 1]
        axes.set_xticks(marks, [f"{m:.0%}".replace("%", " %") for m in marks])
        axes.set_yticks(marks, [f"{m:.0%}".replace("%", " %") for m in marks])
        axes.set_xlabel(x_label, fontsize=8)
        axes.set_ylabel(y_label, fontsize=8)
        return _svg(figure, described)


def dots(name: str, bars: Sequence[Bar], *, described: str, bound: float | None = None) -> str:
    """Draw one rate per defence as a dot with its interval, replicates as small dots below."""
    whole = 0.36 + 0.36 * len(bars)
    with _canvas(name, 5.6, whole) as figure:
        axes = figure.add_axes((0.29, 0.28 / whole, 0.6, 1 - 0.34 / whole))
        _bare(axes, grid="x")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        if bound is not None:
            axes.axvline(bound, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        for i, bar in enumerate(bars):
            colour = bar.look.colour
            axes.plot([bar.low, bar.high], [i, i], color=colour, linewidth=6, alpha=0.25, solid_capstyle="butt")
            axes.plot(bar.dots, [i] * len(bar.dots), "|", color=colour, markersize=10, markeredgewidth=1, clip_on=False)
            axes.plot(
                [bar.value], [i], bar.look.marker, color=colour, markersize=6.5, markeredgecolor="white", clip_on=False
            )
            axes.text(1.06, i, percent(bar.value), ha="left", va="center", color=colour, fontsize=9, fontweight="bold")
        axes.set_yticks(range(len(bars)), [wrap(b.look.title, 24) for b in bars], color=INK)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        return _svg(figure, described)


def bars(name: str, rows: Sequence[Bar], *, unit: str, described: str) -> str:
    """Draw costs as bars from zero, the reference at 1, replicates as dots."""
    with _canvas(name, 5.6, 0.5 + 0.42 * len(rows)) as figure:
        whole = 0.5 + 0.42 * len(rows)
        axes = figure.add_axes((0.29, 0.42 / whole, 0.62, 1 - 0.5 / whole))
        _bare(axes, grid="x")
        axes.set_xlim(0, max(1.0, *(max(b.value, *b.dots, 0) for b in rows)) * 1.12)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.axvline(1, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        for i, row in enumerate(rows):
            axes.barh(i, row.value, height=0.52, color=row.look.colour, alpha=0.85)
            axes.plot(row.dots, [i] * len(row.dots), ".", color=INK, markersize=4)
            top = max(row.value, *row.dots, 0)
            axes.annotate(
                f"{row.value:.2f} x",
                (top, i),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=INK,
                fontweight="bold",
            )
        axes.set_yticks(range(len(rows)), [wrap(r.look.title, 24) for r in rows], color=INK)
        axes.set_xlabel(unit, fontsize=8)
        return _svg(figure, described)


def strip(name: str, rows: Sequence[tuple[Look, Sequence[int | None]]], *, last: int, described: str) -> str:
    """Draw the step at which each replicate broke; one that did not break sits beyond the end, hollow.

    Args:
        rows: look and steps (None = not broken) per defence.
        last: last step of the attack.
    """
    with _canvas(name, 5.6, 0.5 + 0.36 * len(rows)) as figure:
        whole = 0.5 + 0.36 * len(rows)
        axes = figure.add_axes((0.29, 0.42 / whole, 0.66, 1 - 0.5 / whole))
        _bare(axes, grid="x")
        beyond = last * 1.35
        axes.set_xscale("function", functions=(_root, _square))
        axes.set_xlim(0, beyond * 1.05)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        for i, (look, steps) in enumerate(rows):
            shifts = [(j - (len(steps) - 1) / 2) * 0.16 for j in range(len(steps))]
            for step, shift in zip(steps, shifts, strict=True):
                axes.plot(
                    [beyond if step is None else step],
                    [i + shift],
                    marker=look.marker,
                    markersize=6,
                    color=look.colour,
                    markerfacecolor="white" if step is None else look.colour,
                    linestyle="none",
                    zorder=3,
                    clip_on=False,
                )
        axes.axvspan(last * 1.14, beyond * 1.05, color=GRID, alpha=0.5, linewidth=0)
        ticks = _ticks(sorted({0, last, *(s for _, steps in rows for s in steps if s is not None)}), last)
        axes.set_xticks([*ticks, beyond], [*(str(t) for t in ticks), "never"])
        axes.set_yticks(range(len(rows)), [wrap(look.title, 24) for look, _ in rows], color=INK)
        axes.set_xlabel("attack step at which it broke (square-root scale)", fontsize=8)
        return _svg(figure, described)
