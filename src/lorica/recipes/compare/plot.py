"""The picture of a comparison: quality against trained parameters, and how each method bears other learning rates.

In: a `Comparison`. Out: PNG bytes. A loss far above the untrained base's is drawn as a triangle at the upper edge, and
the picture says so. Refuses to know how anything was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorica.recipes.compare.report import Comparison, Row
from lorica.recipes.plots import new_figure, png

MARKERS = "osD^vPX*<>hp"
COLOURS = 10
WORSE = 1.5
"""How far the axes go above the loss of the untrained base."""
NAMED = 14
"""Most methods whose names stand beside their points; the legend names all."""


def comparison_plot(found: Comparison) -> bytes:
    """Left: test loss over trained parameters, a point for each method with the spread over the rates that ran to the
    end. Right: validation loss over the learning rate at the first measurement, where every rate was still there.
    """
    wide = 1 + (len(found.rows) - 1) // 28
    figure = new_figure(11.5 + 1.8 * wide, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    styles = [
        {"color": f"C{i % COLOURS}", "marker": MARKERS[(i // COLOURS + i) % len(MARKERS)]}
        for i in range(len(found.rows))
    ]
    top = max([WORSE * found.base.loss, *(1.1 * row.loss for row in found.rows)])
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both", linewidth=0.6)
    above = _quality(left, found, styles, top) + _rates(right, found.rows, styles, top)
    for axes in (left, right):
        axes.set_ylim(top=top)
        axes.yaxis.set_major_formatter("{x:g}")
        few = top < 100 * axes.get_ylim()[0]
        axes.yaxis.set_minor_formatter(lambda y, _, few=few: f"{y:g}" if few and f"{y:.0e}"[0] in "25" else "")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, ncols=wide)
    if above:
        figure.supxlabel("triangles at the upper edge: the loss is higher than the axis goes", fontsize=8)
    return png(figure)


def _quality(axes: Any, found: Comparison, styles: Sequence[dict[str, str]], top: float) -> int:
    """Draws the left half; returns how many points are above it."""
    above = 0
    for number, (row, style) in enumerate(zip(found.rows, styles, strict=True)):
        tests = [rate.test for rate in row.rates if rate.test is not None] + [row.loss]
        low, high, count = min(tests), max(tests), row.costs.parameters
        axes.plot([count, count], [low, min(high, top)], color=style["color"], linewidth=1, alpha=0.6, zorder=1)
        if high > top:
            above += _triangles(axes, [count], top, style)
        axes.errorbar([count], [row.loss], row.spread, label=row.label, markersize=7, ls="none", capsize=3, **style)
        if len(found.rows) <= NAMED:
            place = (5, -11 if number % 2 else 5)
            name = axes.annotate(row.label, (count, row.loss), place, textcoords="offset points", fontsize=8)
            name.set_in_layout(False)
    axes.axhline(found.base.loss, color="0.6", linestyle="--", linewidth=1, label="(base, untrained)")
    axes.set(xlabel="trained parameters", ylabel="test loss, nats per trained token", xmargin=0.15)
    axes.set_title("quality against parameters; bars: rates that ran to the end", fontsize=10)
    return above


def _rates(axes: Any, rows: Sequence[Row], styles: Sequence[dict[str, str]], top: float) -> int:
    """Draws the right half; returns how many points are above it."""
    first = min((step for row in rows for rate in row.rates for step in rate.validation), default=0)
    series = [[(r.lr, r.validation[first]) for r in row.rates if first in r.validation] for row in rows]
    above = 0
    for points, style in zip(series, styles, strict=True):
        if not points:
            continue
        rates, losses = zip(*points, strict=True)
        axes.plot(rates, [min(loss, top) for loss in losses], markersize=4, linewidth=1, **style)
        above += _triangles(axes, [rate for rate, loss in points if loss > top], top, style)
    axes.set(xlabel="learning rate", ylabel=f"validation loss after {first} steps")
    axes.set_title("how each method bears other rates", fontsize=10)
    return above


def _triangles(axes: Any, places: Sequence[float], top: float, style: dict[str, str]) -> int:
    """Marks at the upper edge; returns how many."""
    for place in places:
        axes.plot([place], [top], "^", color=style["color"], markersize=5, clip_on=False)[0].set_in_layout(False)
    return len(places)
