"""Handwritten digits: 1,797 pictures of 8×8 pixels from scikit-learn, and an MLP that has seen some classes of them.

In: which classes the base learns and which the adapters do, a seed. Out: an arena. Refuses to know papers and methods.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch

from lorica.core.errors import DataError, MissingError
from lorica.papers.kit.modules import MLP, Data, ModuleArena, pretrain

HIDDEN = "re:layers\\..*"
"""What adapters act on: the hidden layers; the output layer stays as it is, as a language model's head does."""


@cache
def _pictures() -> Data:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise MissingError(
            "This experiment reads scikit-learn's digits, and scikit-learn is not installed.",
            hint="pip install 'lorica[papers]'",
        ) from None
    found = datasets.load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16.0, torch.tensor(found.target, dtype=torch.int64)


def pictures(classes: Sequence[int], seed: int, *, train: int | None = None, turned: bool = False) -> dict[str, Data]:
    """The pictures of some classes in a random order of `seed`: `train` of them (60 % unless given) to train on, and of
    the others one half to choose by and one to test. Inputs [rows, 64] in 0…1; a row's class is its digit's place in
    `classes`. `turned` pictures are mirrored at their diagonal. Raises MissingError without scikit-learn, DataError
    when `train` leaves too few.
    """
    x, y = _pictures()
    if turned:
        x = x.view(-1, 8, 8).transpose(1, 2).flatten(1)
    kept = torch.tensor(list(classes))
    places = torch.nonzero(torch.isin(y, kept)).flatten()
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]
    first = int(0.6 * len(places)) if train is None else train
    if first > len(places) - 2:
        raise DataError(f"There are {len(places)} pictures of these digits; {first} leave none to choose by and test.")
    second = (first + len(places)) // 2
    split: dict[str, torch.Tensor] = {
        "train": places[:first],
        "validation": places[first:second],
        "test": places[second:],
    }
    return {part: (x[chosen], (y[chosen][:, None] == kept).int().argmax(1)) for part, chosen in split.items()}


def digits_arena(
    *,
    width: int,
    depth: int,
    seed: int,
    batch_size: int,
    change: Literal["classes", "turned"] = "classes",
    train: int | None = None,
    pretrain_steps: int = 300,
    norms: bool = False,
) -> ModuleArena:
    """An MLP [64 → width × depth → classes] (`norms`: with LayerNorms) trained on some digits, and the task to read
    others through the same outputs: 5 to 9 after 0 to 4 (`classes`), or all ten mirrored at their diagonal (`turned`).
    Raises MissingError without scikit-learn.
    """
    known, new = (range(5), range(5, 10)) if change == "classes" else (range(10), range(10))
    module = MLP(64, width, depth, len(known), seed=seed, norms=norms)
    pretrain(module, pictures(known, seed)["train"], steps=pretrain_steps, batch_size=64, lr=2e-3, seed=seed)
    parts = pictures(new, seed, train=train, turned=change == "turned")
    return ModuleArena(module, parts, batch_size=batch_size, targets=HIDDEN)
