"""Pictures about a buffer: what a job's rows would teach, layer by layer, and how well it tells rows apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from casehard.reporting.figures import DEFENCE, GRID, INK, MUTED, _bare, _canvas, _svg

_OPEN, _BESIDE = "#D55E00", DEFENCE[0]


class Series(NamedTuple):
    """One quantity of every layer without and with the buffer."""

    layers: Sequence[str]
    without: Sequence[float]
    beside: Sequence[float]


def layers(name: str, series: Series, *, described: str) -> str:
    """Draw the safety gradient score of every layer without and with the buffer, in the order of the layers, as SVG.

    Args:
        name: makes the ids inside the SVG its own.
        series: at least one layer.
        described: text for readers who cannot see it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with _canvas(name, 7.2, 3.2) as figure:
        axes = figure.add_axes((0.11, 0.16, 0.85, 0.72))
        _bare(axes)
        at = range(1, len(series.layers) + 1)
        axes.axhline(0, color=MUTED, linewidth=0.9)
        for values, colour, marker, title in (
            (series.without, _OPEN, "X", "without the buffer"),
            (series.beside, _BESIDE, "o", "beside the buffer"),
        ):
            axes.plot(at, values, color=colour, linewidth=1.2, marker=marker, markersize=4.5, label=title, zorder=3)
        axes.margins(x=0.02, y=0.08)
        axes.set_xlabel(f"layer, {series.layers[0]} to {series.layers[-1]}", fontsize=8)
        axes.set_ylabel("safety gradient score", fontsize=8)
        note = "below 0: a step works against refusals"
        axes.text(1, 1.04, note, transform=axes.transAxes, ha="right", color=MUTED, fontsize=7.5, style="italic")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=2, frameon=False, fontsize=8, labelcolor=INK)
        return _svg(figure, described)


class Curve(NamedTuple):
    """One ROC."""

    title: str
    auc: float
    points: Sequence[tuple[float, float]]
    """(false positive rate, true positive rate), ascending."""


def curves(name: str, rocs: Sequence[Curve], *, described: str) -> str:
    """Draw ROC curves as SVG.

    Args:
        name: makes the ids inside the SVG its own.
        rocs: one or two.
        described: text for readers who cannot see it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with _canvas(name, 4.2, 3.8) as figure:
        axes = figure.add_axes((0.2, 0.13, 0.73, 0.83))
        _bare(axes, grid="both")
        axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.2, linestyle=(0, (4, 3)))
        for roc, colour, dash in zip(rocs, (_BESIDE, _OPEN), ("solid", (0, (5, 1.6))), strict=False):
            x, y = zip(*roc.points, strict=True)
            axes.plot(
                x,
                y,
                color=colour,
                linewidth=1.8,
                linestyle=dash,
                label=f"{roc.title}, area {roc.auc:.3f}",
                clip_on=False,
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        marks = [0, 0.25, 0.5, 0.75, 1]
        axes.set_xticks(marks, [f"{100 * m:.0f} %" for m in marks])
        axes.set_yticks(marks, [f"{100 * m:.0f} %" for m in marks])
        axes.set_xlabel("of the other rows above the threshold", fontsize=8)
        axes.set_ylabel("of the labelled rows above the threshold", fontsize=8)
        axes.legend(loc="lower right", frameon=False, fontsize=8, labelcolor=INK)
        return _svg(figure, described)
