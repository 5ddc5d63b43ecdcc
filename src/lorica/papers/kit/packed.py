"""Fine-tuning on 16-bit and packed bases: the same rows and rates on each, and how far a packed base is from the full.

In: settings that name a model and a task, formats, a seed. Out: a base's arena, its rows after a race, its weight
error and its size. Refuses to know papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from lorica.core.config import Config
from lorica.core.errors import DataError
from lorica.data.example import Example
from lorica.methods.lora import LoRA
from lorica.models import Backbone, load
from lorica.models.quantize.linear import QuantizedLinear
from lorica.papers.kit.arena import COLUMNS, race, rates
from lorica.papers.kit.table import Cell, Row, Table
from lorica.papers.kit.text import TextArena, examples, open_model, split

FULL = "bf16"
"""The base that is not packed."""
FREE = 16.0
"""Bits of a weight that is not packed."""
SHARE = 0.97
"""Of what LoRA gains beside the 16-bit base: beside a packed one it is as good when it gains as much."""
LOSSES: Mapping[str, str] = {
    "start loss": "on test rows, of the base before training",
    "validation loss": COLUMNS["validation loss"],
    "test loss": COLUMNS["test loss"],
}
"""What `tuned_on` measures."""
LARGE: Mapping[str, Any] = {
    "device": "auto",
    "task": "gsm8k",
    "max_length": 512,
    "held_out": 500,
    "steps": 1400,
    "batch_size": 16,
}
"""What the full settings have in common."""
Parts = Mapping[str, Sequence[Example]]


class PackedSettings(Config):
    """A model, a task, and how LoRA is trained beside each base."""

    model: str = Field("nano", description="a built-in name, a directory or a hub id; loaded in bfloat16")
    device: str = Field("cpu", description="where it runs: `cpu`, `cuda` or `auto`")
    task: str = Field("e2e", description="rows to train and to test on, in disjoint parts")
    max_length: int = Field(64, ge=8, description="most tokens of a row; longer ones are left out")
    held_out: int = Field(32, ge=1, description="test rows, and as many to choose a learning rate by")
    rank: int = Field(16, ge=1, description="rank of LoRA on all linear layers, alpha = rank")
    lrs: tuple[float, ...] = Field((6e-3, 1.2e-2), description="learning rates to choose from, the same on all bases")
    steps: int = Field(20, ge=1, description="optimiser steps")
    batch_size: int = Field(4, ge=1, description="rows of one step, the same ones on all bases")


def opened(settings: PackedSettings, kind: str) -> Backbone:
    """The model with its linear weights in a format; `bf16` are the weights as they are. Raises ConfigError."""
    quantize = None if kind == FULL else kind
    return load(settings.model, dtype="bfloat16", device=settings.device, quantize=quantize)


def task_parts(settings: PackedSettings, seed: int) -> dict[str, list[Example]]:
    """The task's rows as `train`, `validation` and `test`."""
    _, renderer = open_model(settings.model, dtype="bfloat16")
    counts = {"train": None, "validation": settings.held_out, "test": settings.held_out}
    return split(examples(settings.task, renderer, settings.max_length), counts, seed, settings.task)


def tuned_on(
    backbone: Backbone, parts: Parts, settings: PackedSettings, seed: int, say: Callable[[str], None]
) -> tuple[TextArena, list[Row]]:
    """LoRA trained beside a base at every rate: the arena with its adapters, and for each its rate and `LOSSES`."""
    arena = TextArena(backbone, None, parts, batch_size=settings.batch_size)
    start = arena.untrained("test")["test loss"]
    lora = LoRA(rank=settings.rank, alpha=float(settings.rank))
    rows = race(arena, rates({}, lora, settings.lrs), steps=settings.steps, seed=seed, say=say)
    kept = ("lr", "validation loss", "test loss")
    return arena, [{"start loss": start, **{name: row[name] for name in kept}} for row in rows]


def share_of_gain(best: Table, kind: str) -> Cell:
    """What LoRA gains beside a base over what it gains beside the 16-bit one; both count from the latter's start."""
    start, full = (best.cell(column, base=FULL) for column in ("start loss", "test loss"))
    return (start - best.cell("test loss", base=kind)) / (start - full)


def packed_weights(backbone: Backbone) -> dict[str, QuantizedLinear]:
    """The packed linear layers by name."""
    return {name: m for name, m in backbone.module.named_modules() if isinstance(m, QuantizedLinear)}


def weight_error(packed: Backbone, full: Backbone) -> float:
    """‖W − Q‖ over ‖W‖, all packed weights together. Raises DataError where nothing is packed."""
    missed = size = 0.0
    for name, module in packed_weights(packed).items():
        weight = full.module.get_submodule(name).get_parameter("weight").detach().float()
        missed += _square(weight - module.packed.dense(weight.dtype))
        size += _square(weight)
    if not size:
        raise DataError("The base has no packed weight, so there is no error to measure.")
    return math.sqrt(missed / size)


def bits(backbone: Backbone) -> float:
    """Bits that a packed weight takes, its share of the scales included; 16 where nothing is packed."""
    modules = packed_weights(backbone).values()
    count = sum(m.in_features * m.out_features for m in modules)
    return 8 * sum(m.packed.nbytes for m in modules) / count if count else FREE


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())
