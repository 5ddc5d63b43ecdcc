"""Where the nodes of a graph without cycles stand in a picture: in rows, with few crossings, lines around the boxes.

In: nodes with their rows, edges from an upper row to a lower one. Out: columns, and the points that each edge goes
through. Refuses to know what nodes are and how they are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

SWEEPS = 8
BEND = 0.55
"""Columns that a line takes where it passes a row of boxes; a box takes one."""
Key = str | tuple[int, int]
"""A node; or (edge, row), the place where a long edge passes a row."""


@dataclass(frozen=True, slots=True)
class Placed:
    """`columns` of the nodes; for each edge its points (column, row) from the upper node to the lower one."""

    columns: dict[str, float]
    lines: list[list[tuple[float, int]]]


def place(rows: Mapping[str, int], edges: Sequence[tuple[str, str]]) -> Placed:
    """A layered drawing: row 0 is the lowest, edges are (upper, lower). Edges across rows get a bend in each row that
    they pass; rows are sorted and pulled towards their neighbours in a few sweeps.
    """
    chains: list[list[Key]] = []
    layers: dict[int, list[Key]] = {}
    for key, row in rows.items():
        layers.setdefault(row, []).append(key)
    for number, (upper, lower) in enumerate(edges):
        bends = [(number, row) for row in range(rows[upper] - 1, rows[lower], -1)]
        chains.append([upper, *bends, lower])
        for bend in bends:
            layers[bend[1]].append(bend)
    near = _neighbours(chains)
    columns: dict[Key, float] = {key: float(i) for layer in layers.values() for i, key in enumerate(layer)}
    for sweep in range(SWEEPS):
        for row in sorted(layers, reverse=bool(sweep % 2)):
            wanted = {key: _mean([columns[n] for n in near.get(key, ())], columns[key]) for key in layers[row]}
            layers[row].sort(key=wanted.__getitem__)
            columns |= _spread(layers[row], wanted)
    left = min(columns.values(), default=0.0)
    return Placed(
        {key: columns[key] - left for key in rows},
        [[(columns[key] - left, _row(key, rows)) for key in chain] for chain in chains],
    )


def _neighbours(chains: Sequence[Sequence[Key]]) -> dict[Key, list[Key]]:
    near: dict[Key, list[Key]] = {}
    for chain in chains:
        for one, other in pairwise(chain):
            near.setdefault(one, []).append(other)
            near.setdefault(other, []).append(one)
    return near


def _spread(layer: Sequence[Key], wanted: Mapping[Key, float]) -> dict[Key, float]:
    """Columns near the wanted ones, in the layer's order, with room for each: the middle of the leftmost and the
    rightmost such columns.
    """
    room = [0.0] + [(_width(a) + _width(b)) / 2 for a, b in pairwise(layer)]
    right = [wanted[key] for key in layer]
    left = list(right)
    for i in range(1, len(layer)):
        right[i] = max(right[i], right[i - 1] + room[i])
    for i in range(len(layer) - 1, 0, -1):
        left[i - 1] = min(left[i - 1], left[i] - room[i])
    return {key: (a + b) / 2 for key, a, b in zip(layer, left, right, strict=True)}


def _width(key: Key) -> float:
    return BEND if isinstance(key, tuple) else 1.0


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _row(key: Key, rows: Mapping[str, int]) -> int:
    return key[1] if isinstance(key, tuple) else rows[key]
