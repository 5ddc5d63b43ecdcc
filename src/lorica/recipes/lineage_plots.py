"""The graph of a lineage as a picture, and in the language of Graphviz.

In: an `Ancestry`. Out: PNG or SVG bytes, or DOT text; ancestors stand above, what was asked for below.
Refuses to know files and how the graph was found.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lorica.adapters.ancestry import Ancestry, Edge, Node
from lorica.recipes.graph_layout import place

FILL = {"here": "#eaf2fb", "moved": "#eaf2fb", "served": "#eaf2fb", "unsaved": "#f5f5f5"}
LINE = {"missing": "#c00000", "changed": "#d97706"}
MODEL = "#fdf3dc"
STYLE = {"stacked-on": "dashed", "base": "dotted"}
"""Edges that are no step of making: what acts beneath, and what it acts on."""
WIDTH, HEIGHT, FONT = 2.6, 1.5, 8
"""Inches that a node takes, with what is around it, and points of its words."""


def describe(node: Node) -> list[str]:
    """A node in at most four short lines."""
    if node.kind == "model":
        return [node.name, f"model, {node.method or 'origin unknown'}"]
    method = node.method if node.rank is None else f"{node.method}, rank {node.rank}"
    lines = [node.name, f"{method}  {node.short}".rstrip()]
    if node.lineage.how:
        lines.append(node.lineage.how)
    if node.lineage.data is not None:
        rows = node.lineage.data.rows
        lines.append(_cut(node.lineage.data.path) + ("" if rows is None else f" ({rows:,} rows)"))
    return [*lines, f"({node.status})"] if node.status not in ("here", "served") else lines


def label(edge: Edge) -> str:
    """What stands at an edge."""
    return edge.relation if edge.weight is None else f"{edge.relation} × {edge.weight:g}"


def dot(graph: Ancestry) -> str:
    """The graph for Graphviz: `dot -Tsvg`. Parents point to their children."""
    names = {key: f"n{index}" for index, key in enumerate(graph.nodes)}
    lines = ["digraph lineage {", '  node [shape=box, style=filled, fontname="sans-serif"];']
    for key, node in graph.nodes.items():
        colour = LINE.get(node.status, "#4a6fa5")
        lines.append(
            f"  {names[key]} [label={_quoted(chr(10).join(describe(node)))}, color={_quoted(colour)}, "
            f"fillcolor={_quoted(_fill(node))}];"
        )
    for edge in graph.edges:
        style = STYLE.get(edge.relation, "solid")
        lines.append(f"  {names[edge.parent]} -> {names[edge.child]} [label={_quoted(label(edge))}, style={style}];")
    return "\n".join([*lines, "}"])


def picture(graph: Ancestry, form: str = "png") -> bytes:
    """The graph drawn; `form` is `png` or `svg`."""
    from lorica.recipes.plots import new_figure

    pairs = list(dict.fromkeys((edge.parent, edge.child) for edge in graph.edges))
    rows = {key: graph.depths().get(key, 0) for key in graph.nodes}
    placed = place(rows, pairs)
    columns, levels = max(placed.columns.values(), default=0.0) + 1, max(rows.values(), default=0) + 1
    figure = new_figure(WIDTH * columns, HEIGHT * levels)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(-0.5, levels - 0.5)
    for pair, line in zip(pairs, placed.lines, strict=True):
        edges = [edge for edge in graph.edges if (edge.parent, edge.child) == pair]
        _draw_edges(axes, edges, line, [graph.nodes[key] for key in pair])
    for key, node in graph.nodes.items():
        _draw_node(axes, node, (placed.columns[key], rows[key]), root=key in graph.roots)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()


def _draw_node(axes: Any, node: Node, place: tuple[float, int], *, root: bool) -> None:
    box = {
        "boxstyle": "round,pad=0.5",
        "facecolor": _fill(node),
        "edgecolor": LINE.get(node.status, "#4a6fa5"),
        "linewidth": 2.0 if root else 1.0,
        "linestyle": "--" if node.status in ("missing", "unsaved") else "-",
    }
    axes.text(*place, "\n".join(describe(node)), ha="center", va="center", fontsize=FONT, bbox=box, zorder=3)


def _draw_edges(axes: Any, edges: Sequence[Edge], line: list[tuple[float, int]], ends: Sequence[Node]) -> None:
    """One line from parent to child, with all that it is labelled with, near the child."""
    from matplotlib.patches import FancyArrowPatch, PathPatch
    from matplotlib.path import Path

    points: list[tuple[float, float]] = [*line]
    points[0] = (line[0][0], line[0][1] - _half(ends[0]))
    points[-1] = (line[-1][0], line[-1][1] + _half(ends[1]) + 0.02)
    look = {"edgecolor": "#666666", "linestyle": STYLE.get(edges[0].relation, "solid"), "linewidth": 1.0, "zorder": 1}
    vertices, codes = [points[0]], [Path.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (y0 + y1) / 2
        vertices += [(x0, middle), (x1, middle), (x1, y1)]
        codes += [Path.CURVE4] * 3
    axes.add_patch(PathPatch(Path(vertices, codes), facecolor="none", **look))
    x, y = points[-1]
    head = FancyArrowPatch(
        (x, y + 0.04), (x, y), arrowstyle="-|>", mutation_scale=10, color="#666666", shrinkA=0, shrinkB=0, zorder=2
    )
    axes.add_patch(head)
    (x0, y0), (x1, y1) = points[-2:]
    halo = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    words = ",\n".join(label(edge) for edge in edges)
    axes.text((x0 + x1) / 2, (y0 + y1) / 2, words, fontsize=FONT - 1, ha="center", va="center", bbox=halo, zorder=2)


def _half(node: Node) -> float:
    """Half the height of a node's box, in rows."""
    return (0.5 * len(describe(node)) * FONT * 1.25 + 0.5 * FONT) / 72 / HEIGHT


def _fill(node: Node) -> str:
    return MODEL if node.kind == "model" else FILL.get(node.status, "#ffffff")


def _cut(text: str, most: int = 28) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
