"""One word for a task, so that small and full settings run through the same code: `digits`, or a language model's data.

In: `TaskSettings` and a seed. Out: an arena. Refuses to know papers and methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from lorica.core.config import Config
from lorica.papers.kit.arena import Arena
from lorica.papers.kit.digits import digits_arena
from lorica.papers.kit.text import TextArena, examples, open_model, split

DIGITS: Mapping[str, Literal["classes", "turned"]] = {"digits": "classes", "turned-digits": "turned"}
"""Tasks of an MLP, which need no language model."""

REDUCED_E2E: Mapping[str, Any] = {"task": "e2e", "model": "nano", "batch_size": 2, "max_length": 60, "held_out": 8}
SMALL_E2E: Mapping[str, Any] = {**REDUCED_E2E, "steps": 30, "batch_size": 4, "held_out": 24}
FULL_E2E: Mapping[str, Any] = {
    "task": "e2e",
    "model": "openai-community/gpt2-medium",
    "device": "auto",
    "steps": 5000,
    "batch_size": 8,
    "held_out": 500,
}
FULL_GSM8K: Mapping[str, Any] = {
    "task": "gsm8k",
    "dtype": "bfloat16",
    "device": "auto",
    "max_length": 512,
    "held_out": 500,
}
"""What the settings of several papers have in common, `Settings(**SMALL_E2E, …)`: a scale and a task."""


class TaskSettings(Config):
    """What is adapted to what, and for how long; a paper's settings inherit these."""

    task: str = Field(
        "digits",
        description="`digits` (new classes) or `turned-digits`; for a language model `gsm8k`, `bbh/TASK`, "
        "`t0/TEMPLATE`, `e2e`, or a data file",
    )
    model: str = Field("mlp", description="`mlp` for digits; else a built-in name, a directory or a hub id")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the frozen base")
    device: Literal["auto", "cpu", "cuda"] = Field("cpu", description="where a language model runs")
    width: int = Field(256, ge=8, description="width of the mlp")
    depth: int = Field(2, ge=1, description="hidden layers of the mlp")
    train_rows: int | None = Field(
        None, ge=1, description="training rows; null is 60 % of the digits, all of a text task"
    )
    held_out: int = Field(
        100, ge=1, description="rows of a text task to choose by, and as many to test; digits: half of the rest each"
    )
    max_length: int = Field(256, ge=8, description="most tokens of a text row; longer ones are left out")
    exact: int = Field(0, ge=0, description="test rows of a language model that are answered greedily")
    steps: int = Field(100, ge=1, description="optimiser steps")
    batch_size: int = Field(32, ge=1, description="rows of one step, the same ones for every adapter")


def open_arena(settings: TaskSettings, seed: int, *, norms: bool = False) -> Arena:
    """The arena that the settings name, its base, data and split drawn from `seed`; with `norms` the mlp has
    LayerNorms, as language models have norms anyway. Raises MissingError, DataError.
    """
    if settings.task in DIGITS:
        return digits_arena(
            change=DIGITS[settings.task],
            width=settings.width,
            depth=settings.depth,
            seed=seed,
            batch_size=settings.batch_size,
            train=settings.train_rows,
            norms=norms,
        )
    backbone, renderer = open_model(settings.model, dtype=settings.dtype, device=settings.device)
    rows = examples(settings.task, renderer, settings.max_length)
    counts = {"train": settings.train_rows, "validation": settings.held_out, "test": settings.held_out}
    return TextArena(
        backbone,
        renderer,
        split(rows, counts, seed, settings.task),
        batch_size=settings.batch_size,
        exact=settings.exact,
    )
