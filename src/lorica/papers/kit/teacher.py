"""Teacher and student: an MLP whose hidden weights were moved by a known amount, and the task to follow it.

In: sizes, the rank and the size of the move, a seed. Out: an arena for regression whose base is the MLP before the
move. Refuses to know papers and methods.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lorica.papers.kit.modules import MLP, Data, ModuleArena

HIDDEN = "re:layers\\..*"
"""What moved, and what adapters act on."""


def teacher_arena(
    *,
    width: int,
    depth: int,
    outputs: int,
    rank: int | None,
    seed: int,
    batch_size: int,
    strength: float = 1.0,
    rows: int = 512,
    inputs: int | None = None,
) -> ModuleArena:
    """An MLP [inputs → width × depth → outputs] (inputs: the width unless given) and rows `y = teacher(x)`, x ~
    N(0, 1), where each hidden weight of the teacher is the student's plus a random matrix of rank `rank` (None: full),
    whose norm is `strength` times the weight's own. `rows` to train on, a quarter as many to choose by and to test.
    """
    inputs = width if inputs is None else inputs
    student = MLP(inputs, width, depth, outputs, seed=seed, bias=False)
    rng = torch.Generator().manual_seed(seed + 1)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for layer in teacher.layers:
            assert isinstance(layer, nn.Linear)
            layer.weight += strength * move(layer.weight, rank, rng)
        parts: dict[str, Data] = {}
        for part, count in (("train", rows), ("validation", rows // 4), ("test", rows // 4)):
            x = torch.randn(count, inputs, generator=rng)
            parts[part] = (x, teacher(x))
    return ModuleArena(student, parts, batch_size=batch_size, loss="values", targets=HIDDEN)


def move(weight: Tensor, rank: int | None, rng: torch.Generator) -> Tensor:
    """A random matrix of a rank (None: full) with the weight's shape and norm."""
    rows, cols = weight.shape
    if rank is None:
        found = torch.randn(rows, cols, generator=rng)
    else:
        found = torch.randn(rows, rank, generator=rng) @ torch.randn(rank, cols, generator=rng)
    moved: Tensor = found * (weight.norm() / found.norm())
    return moved
