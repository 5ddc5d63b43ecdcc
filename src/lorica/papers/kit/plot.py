"""Plots as plain data, and the one place that turns them into ink.

In: panels of series with spreads. Out: PNG bytes. Refuses to know experiments and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lorica.recipes.plots import new_figure, png, readable

COLOURS = ("#08519c", "#d94801", "#238b45", "#6a51a3", "#b30000", "#525252", "#0097a7", "#a6761d")
WIDTH, HEIGHT = 5.2, 4.0


@dataclass(frozen=True, slots=True)
class Series:
    """One curve, or one group of bars where x holds names. `spread` is drawn as a band or as whiskers."""

    label: str
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    spread: tuple[float, ...] = ()
    style: Literal["line", "dashed", "points"] = "line"


@dataclass(frozen=True, slots=True)
class Plot:
    """One panel: labelled axes and series. Points that are not finite are left out and said so below the panel."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...] = field(default=())
    log_x: bool = False
    log_y: bool = False


def draw(plots: Sequence[Plot]) -> bytes:
    """The panels side by side, as PNG bytes."""
    figure = new_figure(WIDTH * len(plots), HEIGHT)
    for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        _panel(axes, plot)
    return png(figure)


def _panel(axes: Any, plot: Plot) -> None:
    bars = any(isinstance(x, str) for series in plot.series for x in series.x)
    if plot.log_x and not bars:
        axes.set_xscale("log")
    if plot.log_y:
        axes.set_yscale("log")
    lost = (_bars if bars else _curves)(axes, plot)
    for axis, logarithmic in ((axes.xaxis, plot.log_x and not bars), (axes.yaxis, plot.log_y)):
        if logarithmic:
            readable(axis)
    axes.set(ylabel=plot.y, title=plot.title)
    axes.set_xlabel(plot.x + (f"\n({lost} not finite: not shown)" if lost else ""))
    axes.grid(alpha=0.3, which="both" if plot.log_x or plot.log_y else "major", axis="y" if bars else "both")
    if bars and len(plot.series) > 2:  # bars fill the panel, so their legend has room of its own
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.22 * (high - low))
        axes.legend(frameon=False, fontsize="small", loc="upper center", ncols=2)
    elif len(plot.series) > 1 or (plot.series and plot.series[0].label):
        axes.legend(frameon=False, fontsize="small")


def _curves(axes: Any, plot: Plot) -> int:
    """Lines with bands of one spread. Returns how many points are not finite."""
    import numpy as np

    lost = 0
    for series, colour in zip(plot.series, _colours(len(plot.series)), strict=True):
        x, y = np.array(series.x, float), np.array(series.y, float)
        spread = np.array(series.spread or np.zeros_like(y), float)
        keep = np.isfinite(y) & np.isfinite(x)
        lost += int((~keep).sum())
        x, y, spread = x[keep], y[keep], np.nan_to_num(spread[keep])
        few = len(x) <= 24
        marker = "o" if few or series.style == "points" else ""
        line = {"line": "-", "dashed": "--", "points": ""}[series.style]
        axes.plot(x, y, line, marker=marker, color=colour, markersize=4, linewidth=1.6, label=series.label)
        if spread.any() and series.style == "points":
            axes.errorbar(x, y, spread, fmt="none", ecolor=colour, capsize=3)
        elif spread.any():
            low = np.maximum(y - spread, y * 0.1) if plot.log_y else y - spread  # a band reaches no zero on a log axis
            alpha = 0.18 if len(plot.series) <= 4 else 0.07
            axes.fill_between(x, low, y + spread, color=colour, alpha=alpha, linewidth=0)
    return lost


def _bars(axes: Any, plot: Plot) -> int:
    """Groups of bars with whiskers of one spread. Returns how many are not finite."""
    import numpy as np

    names = list(dict.fromkeys(str(x) for series in plot.series for x in series.x))
    width, lost = 0.8 / len(plot.series), 0
    for number, (series, colour) in enumerate(zip(plot.series, _colours(len(plot.series)), strict=True)):
        y = np.array(series.y, float)
        keep = np.isfinite(y)
        lost += int((~keep).sum())
        at = np.array([names.index(str(x)) for x in series.x]) + (number - (len(plot.series) - 1) / 2) * width
        spread = np.nan_to_num(np.array(series.spread or np.zeros_like(y), float))[keep]
        whiskers = spread if spread.any() else None
        axes.bar(at[keep], y[keep], width, yerr=whiskers, capsize=3, color=colour, alpha=0.85, label=series.label)
    axes.set_xticks(
        range(len(names)), names, rotation=0 if len(names) <= 5 else 35, ha="center" if len(names) <= 5 else "right"
    )
    return lost


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
