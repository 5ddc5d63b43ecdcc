"""Pictures of an inspected adapter: spectra, norms, likeness to others, intruders.

In: an `Inspection`. Out: PNG bytes by name, those for which there is something to show. Refuses to know files, how
things were measured, and terminals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lorica.adapters.analysis.intruders import Intruders, SiteIntruders
from lorica.adapters.analysis.report import Inspection
from lorica.adapters.analysis.similarity import Similarity
from lorica.adapters.analysis.sites import SiteMeasures
from lorica.recipes.plots import new_figure, png, readable

OTHER = "-"
"""The row of sites outside blocks."""
WRITTEN = 400
"""A heat map of at most so many cells has its numbers written in."""
THRESHOLDS = tuple(step / 50 for step in range(1, 51))


def pictures(found: Inspection) -> dict[str, bytes]:
    """`spectrum`, `norms`, `similarity` and `intruders` as PNG bytes; those without content are absent."""
    drawn: dict[str, bytes] = {}
    ranked = [site for site in found.sites if any(value > 0 for value in site.singular_values)]
    if ranked:
        drawn["spectrum"] = _spectra(ranked)
    if found.sites:
        drawn["norms"] = _norms(found.sites)
    if found.similarity:
        drawn["similarity"] = _similarity(found.similarity)
    if found.intruders is not None and found.intruders.sites:
        drawn["intruders"] = _intruders(found.intruders)
    return drawn


def _layer(layer: int | None) -> str:
    return OTHER if layer is None else str(layer)


def _layers(sites: Sequence[SiteMeasures] | Sequence[SiteIntruders]) -> list[str]:
    numbers = sorted({site.layer for site in sites if site.layer is not None})
    return [*map(str, numbers), *([OTHER] if any(site.layer is None for site in sites) else [])]


def _spectra(sites: Sequence[SiteMeasures]) -> bytes:
    """A panel for each role, a line for each layer, dark to light with depth; the dotted line is 10 % of the energy."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    roles = list(dict.fromkeys(site.role for site in sites))
    columns = min(4, len(roles))
    rows = math.ceil(len(roles) / columns)
    figure = new_figure(max(5.0, 3.2 * columns), 2.6 * rows + 0.4)
    layers = [site.layer for site in sites if site.layer is not None]
    colours: Any = ScalarMappable(Normalize(min(layers, default=0), max(layers, default=1) or 1), colormaps["viridis"])
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, role in zip(panels.flat, roles, strict=False):
        for site in (one for one in sites if one.role == role):
            values = [value for value in site.singular_values if value > 1e-6 * site.singular_values[0]]
            marker = "o" if len(values) <= 16 else ""
            colour = "#525252" if site.layer is None else colours.to_rgba(site.layer)
            axes.plot(range(1, len(values) + 1), values, marker=marker, markersize=3, linewidth=1.2, color=colour)
        axes.set_title(role, fontsize="medium")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels.flat[len(roles) :]:
        axes.axis("off")
    readable(panels[0, 0].yaxis)
    for axes in panels.flat[max(0, len(roles) - columns) : len(roles)]:
        axes.set_xlabel("direction")
    for axes in panels[:, 0]:
        axes.set_ylabel("singular value of ΔW")
    if len(set(layers)) > 1:
        bar = figure.colorbar(colours, ax=panels, shrink=0.8, label="layer")
        bar.locator = _whole()
        bar.update_ticks()
    return png(figure)


def _whole() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _norms(sites: Sequence[SiteMeasures]) -> bytes:
    """Layer by role: ‖ΔW‖ / ‖W₀‖ where the base was there, else the rms of ΔW."""
    relative = all(site.relative is not None for site in sites)

    def value(members: Sequence[SiteMeasures]) -> float:
        sizes = [(site.relative if relative else site.rms) or 0.0 for site in members]
        return math.sqrt(math.fsum(size**2 for size in sizes) / len(sizes))

    title = "‖ΔW‖ / ‖W₀‖" if relative else "rms of ΔW (no base)"
    roles = list(dict.fromkeys(site.role for site in sites))
    layers = _layers(sites)
    figure = new_figure(2.2 + 0.85 * len(roles), 1.6 + 0.34 * len(layers))
    axes = figure.subplots()
    cells = _cells(sites, layers, roles, value)
    write = "{:.1%}".format if relative else "{:.1e}".format
    _heat(figure, axes, cells, roles, layers, label=title, write=write, percent=relative)
    axes.set_ylabel("layer")
    axes.set_title(f"size of the change: {title}", fontsize="medium")
    return png(figure)


def _cells(
    sites: Sequence[Any], layers: Sequence[str], roles: Sequence[str], value: Callable[[Sequence[Any]], float]
) -> list[list[float]]:
    """Rows of layers, columns of roles; NaN where there is no such site."""
    held: dict[tuple[str, str], list[Any]] = {}
    for site in sites:
        held.setdefault((_layer(site.layer), site.role), []).append(site)
    return [[value(held[row, col]) if (row, col) in held else math.nan for col in roles] for row in layers]


def _heat(
    figure: Any,
    axes: Any,
    cells: Sequence[Sequence[float]],
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    label: str,
    write: Callable[[float], str],
    percent: bool = False,
    span: tuple[float, float] | None = None,
    colours: str = "viridis",
) -> None:
    """A heat map with names on both sides, and numbers in its cells where they are few."""
    import numpy as np
    from matplotlib.ticker import PercentFormatter

    values = np.array(cells, float)
    finite = values[np.isfinite(values)]
    low, high = span or (0.0, float(finite.max()) if len(finite) and finite.max() > 0 else 1.0)
    shown = axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high)
    axes.set_xticks(range(len(columns)), columns, rotation=0 if max(map(len, columns)) < 8 else 30, ha="center")
    if max(map(len, columns)) >= 8:
        axes.set_xticklabels(columns, rotation=30, ha="right")
    every = max(1, len(rows) // 24)
    axes.set_yticks(range(0, len(rows), every), rows[::every])
    if values.size <= WRITTEN:
        for (row, col), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = shown.cmap(shown.norm(value))
                ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
                axes.text(col, row, write(value), ha="center", va="center", color=ink, fontsize="small")
    figure.colorbar(shown, ax=axes, label=label, shrink=0.9, format=PercentFormatter(1.0) if percent else None)


def _similarity(pairs: Sequence[Similarity]) -> bytes:
    """Three matrices over all adapters: cosine, and the overlap of what they write and of what they read."""
    names = list(dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second)))
    short = _short(names)
    panels: tuple[tuple[str, tuple[float, float], str, Callable[[Similarity], float | None]], ...] = (
        ("cosine of ΔW", (-1.0, 1.0), "RdBu_r", lambda pair: pair.cosine),
        ("overlap φ, output side", (0.0, 1.0), "viridis", lambda pair: pair.out),
        ("overlap φ, input side", (0.0, 1.0), "viridis", lambda pair: pair.into),
    )
    side = 1.9 + 0.75 * len(names)
    figure = new_figure(len(panels) * (side + 1.0), side + 0.3)
    for axes, (title, span, colours, value) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        found = {(p.first, p.second): math.nan if value(p) is None else float(value(p) or 0.0) for p in pairs}
        cells = [[1.0 if a == b else found.get((a, b), found.get((b, a), math.nan)) for b in names] for a in names]
        _heat(figure, axes, cells, short, short, label="", write="{:.2f}".format, span=span, colours=colours)
        axes.set_title(title, fontsize="medium")
    return png(figure)


def _short(names: Sequence[str]) -> list[str]:
    """The last parts of paths that tell them apart."""
    parts = [name.replace("\\", "/").strip("/").split("/") for name in names]
    while len(parts) > 1 and len({own[-1] for own in parts}) == 1 and all(len(own) > 1 for own in parts):
        parts = [own[:-1] for own in parts]
    last = [own[-1] for own in parts]
    return last if len(set(last)) == len(last) else [str(number + 1) for number in range(len(names))]


def _intruders(found: Intruders) -> bytes:
    """Counts by layer and role, and how the count moves with the threshold."""
    sites = found.sites
    roles = list(dict.fromkeys(site.role for site in sites))
    layers = _layers(sites)
    figure = new_figure(6.4 + 0.85 * len(roles), max(3.4, 1.6 + 0.34 * len(layers)))
    left, right = figure.subplots(1, 2, width_ratios=(1 + 0.22 * len(roles), 1.1))
    cells = _cells(sites, layers, roles, lambda members: float(sum(len(site.which) for site in members)))
    per = max(len(site.values) for site in sites)
    _heat(figure, left, cells, roles, layers, label="intruders", write="{:.0f}".format, colours="Blues")
    left.set_ylabel("layer")
    word = "intruder" if found.count == 1 else "intruders"
    left.set_title(f"{found.count} {word} among the {per} leading vectors of each weight", fontsize="medium")
    right.plot(THRESHOLDS, [found.at(threshold) for threshold in THRESHOLDS], color="#08519c")
    right.axvline(found.threshold, color="#d94801", linestyle="--", linewidth=1, label=f"ε = {found.threshold:g}")
    right.set(xlabel="threshold ε", ylabel="vectors with |cos| below it", title="")
    right.set_title("how the count moves with ε", fontsize="medium")
    right.set_xlim(0, 1)
    right.set_ylim(bottom=0)
    right.grid(alpha=0.3)
    right.legend(frameon=False, loc="upper left")
    return png(figure)
