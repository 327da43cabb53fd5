"""The picture of a trade-off: every setting measured, and the ones that nothing beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from casehard.reporting.figures import DEFENCE, GRID, INK, MUTED, _bare, _canvas, _svg, spread

_FRONT = DEFENCE[0]


class Setting(NamedTuple):
    """One measured setting."""

    label: str
    x: float
    """Rate that should be low."""
    y: float
    """Rate that should be high."""
    best: bool
    """Whether it lies on the front."""


def front(name: str, settings: Sequence[Setting], *, x_label: str, y_label: str, described: str) -> str:
    """Draw settings in the plane of two rates as SVG; those on the front are joined and labelled.

    Args:
        name: makes the ids inside the SVG its own.
        settings: at least one.
        x_label: of the rate that should be low; the good corner is top left.
        y_label: of the rate that should be high.
        described: text for readers who cannot see it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with _canvas(name, 5.6, 3.6) as figure:
        axes = figure.add_axes((0.125, 0.13, 0.59, 0.82))
        _bare(axes, grid="both")
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        others = [s for s in settings if not s.best]
        axes.plot([s.x for s in others], [s.y for s in others], "o", color=MUTED, markersize=4, alpha=0.6, zorder=2)
        best = sorted((s for s in settings if s.best), key=lambda s: (s.x, s.y))
        axes.plot(
            [s.x for s in best],
            [s.y for s in best],
            color=_FRONT,
            linewidth=1.4,
            marker="D",
            markersize=5.5,
            markeredgecolor="white",
            clip_on=False,
            zorder=3,
        )
        heights = spread([s.y for s in best], 0.07, 0.0, 1.0)
        for s, height in zip(best, heights, strict=True):
            axes.annotate(
                s.label,
                (s.x, s.y),
                xytext=(1.05, (height + 0.03) / 1.06),
                textcoords="axes fraction",
                color=INK,
                fontsize=7.5,
                va="center",
                arrowprops={"arrowstyle": "-", "color": GRID, "linewidth": 0.8, "shrinkB": 4, "relpos": (0, 0.5)},
            )
        marks = [0, 0.25, 0.5, 0.75, 1]
        text = [f"{100 * m:.0f} %" for m in marks]
        axes.set_xticks(marks, text)
        axes.set_yticks(marks, text)
        axes.set_xlabel(x_label, fontsize=8)
        axes.set_ylabel(y_label, fontsize=8)
        return _svg(figure, described)
