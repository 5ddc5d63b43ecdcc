"""Figures as PNG bytes, without a screen; and the loss curve of a run.

In: metric records. Out: a picture. Refuses to know runs.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any


def loss_curve(records: Sequence[dict[str, Any]], title: str) -> bytes:
    """Training loss over steps, smoothed over it, and evaluation loss where there is one. Returns PNG bytes."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7, 4)
    axes = figure.subplots()
    trained = [(r["step"], r["loss"]) for r in records if "loss" in r]
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="loss of each step")
        axes.plot(steps, _smooth(losses), color="#08519c", linewidth=1.8, label="running mean")
    measured = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if measured:
        axes.plot(*zip(*measured, strict=True), "o-", color="#d94801", markersize=4, label="evaluation")
    axes.set(xlabel="optimiser step", ylabel="loss, nats per trained token", title=title)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return png(figure)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure in inches, drawn without a screen; matplotlib is imported now."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def readable(axis: Any) -> None:
    """Give a logarithmic axis plain numbers at 1, 2 and 5 of each decade where few decades are shown, else powers of
    ten alone.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high < 200 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(
            FuncFormatter(lambda value, place: f"{value:g}" if value < 1e5 else f"{value:.0e}".replace("e+0", "e"))
        )


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential running mean over about a twentieth of the run."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    mean, out = values[0], []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        out.append(mean)
    return out
