"""Intrinsic dimension: d90 falls with pre-training and with model size. Checked on digits, by the search for d90."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import ClassVar

from pydantic import Field

from lorica.core.errors import ConfigError
from lorica.data.render import Renderer
from lorica.methods.base import Method
from lorica.methods.delta import Delta
from lorica.methods.intrinsic import Intrinsic
from lorica.models import load
from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.arena import OPTIMIZER, Arena, Entry, race
from lorica.papers.kit.digits import pictures
from lorica.papers.kit.judging import above, together
from lorica.papers.kit.modules import MLP, ModuleArena, pretrain
from lorica.papers.kit.plot import Plot
from lorica.papers.kit.table import Cell, Row, Table
from lorica.papers.kit.task import TaskSettings
from lorica.papers.kit.text import TextArena, examples, split
from lorica.recipes.d90 import Found, GridConfig, search_d90

AXES = ("pre-training", "size")
KNOWN, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
"""Digits that a base has seen, and those of the task."""


class Settings(TaskSettings):
    """Bases from least to most along two axes, a task, and how d90 is searched for.

    A base is `mlp/WIDTH/STEPS`, made here and pre-trained on other digits, or a model, perhaps `NAME@REVISION`.
    """

    task: str = Field("digits", description="`digits`: 5 to 9 after 0 to 4; for language models a task as elsewhere")
    pretrained: tuple[str, ...] = Field(
        ("mlp/64/0", "mlp/64/20", "mlp/64/400"), min_length=2, description="bases by how long they were pre-trained"
    )
    sizes: tuple[str, ...] = Field(
        ("mlp/16/400", "mlp/64/400", "mlp/128/400"), min_length=2, description="bases by size"
    )
    structured: bool = Field(False, description="SAID, else DID")
    grid: GridConfig = Field(
        GridConfig(
            smallest=16,
            largest=1024,
            per_decade=4,
            refinements=1,
            rates=(3e-2, 1e-1, 3e-1, 1.0),
            full_rates=(1e-3, 3e-3, 1e-2),
        ),
        description="dimensions, learning rates, threshold",
    )


class IntrinsicPaper(PaperCheck[Settings]):
    """For each base all weights are trained on the task, with the learning rate tuned; then the search for d90 trains
    in random subspaces of ever more dimensions, tunes the rate of each, and stops at the first whose accuracy on
    validation rows (the mean over `grid.seeds` subspaces) is 90 % of that. The bases differ in how long they were
    pre-trained, and in width; all begin with a random output layer, which moves in the subspace like the rest. The
    claim has two halves, and shows when d90 is smaller for the most pre-trained base than for the least, and for the
    largest than for the smallest.
    """

    name = "intrinsic"
    title = "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning"
    authors = "Aghajanyan, Gupta, Zettlemoyer"
    venue = "ACL 2021"
    year = 2021
    arxiv = "2012.13255"
    methods = ("intrinsic", "delta")
    claim = (
        "The number of directions that suffices for 90 % of full fine-tuning's quality is small; it falls in the "
        "course of pre-training, and larger models have a smaller one."
    )
    figures = (
        Figure("d90 on MRPC, SAID: BERT-base / BERT-large", "1608 / 1037", "memory"),
        Figure("d90 on MRPC, SAID: RoBERTa-base / RoBERTa-large", "896 / 207", "memory; about 200 is confirmed"),
        Figure("d90 on MRPC, DID: BERT-base / BERT-large", "1861 / 2493", "memory"),
    )
    limits = (
        "Pictures of 64 pixels and networks of two hidden layers: what is measured is how the search behaves on small "
        "bases, not what language models have. d90 is read off a grid, and each seed has one subspace for a dimension, "
        "so a difference below a factor of two is noise. The task matters: tried first, with one seed, was mirrored "
        "digits through the output layer of the upright ones, and there d90 was not lower after pre-training: 388 with "
        "none, 338 after 20 steps, beyond 2,048 after 400. New digits under a new output layer, as here, are nearer to "
        "what the paper does."
    )
    keys = ("axis", "base")
    columns: ClassVar = {
        "parameters": "weights and biases of the base, all of which full fine-tuning trains",
        "full accuracy": "of full fine-tuning on validation rows, the best of the rates",
        "d90": "smallest dimension with 90 % of that",
        "log2 d90": "its logarithm: differences are factors",
        "share": "d90 over the base's parameters",
    }

    small = Settings(steps=60, batch_size=32, train_rows=400)
    full = Settings(
        task="t0/glue_mrpc_equivalent",
        pretrained=tuple(f"EleutherAI/pythia-410m@step{n}" for n in (1000, 16000, 143000)),
        sizes=tuple(f"EleutherAI/pythia-{size}" for size in ("160m", "410m", "1.4b")),
        structured=True,
        steps=1000,
        dtype="bfloat16",
        device="auto",
        held_out=400,
        grid=GridConfig(
            smallest=100, largest=30000, rates=(1e-3, 3e-3, 1e-2), full_rates=(1e-5, 3e-5, 1e-4), seeds=(0, 1)
        ),
    )
    reduced = Settings(
        steps=60,
        train_rows=400,
        pretrained=("mlp/32/0", "mlp/32/400"),
        sizes=("mlp/16/400", "mlp/32/400"),
        grid=GridConfig(smallest=32, largest=1024, per_decade=2, rates=(1e-1, 3e-1), full_rates=(1e-2,), seeds=(0, 1)),
    )

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        found: dict[str, tuple[int, Found]] = {}
        rows: list[Row] = []
        for axis, bases in zip(AXES, (settings.pretrained, settings.sizes), strict=True):
            for base in bases:
                if base not in found:
                    found[base] = measured(settings, base, seed)
                count, result = found[base]
                d90 = float(result.d90 or math.inf)
                rows.append(
                    {
                        "axis": axis,
                        "base": base,
                        "parameters": count,
                        "full accuracy": result.full.metric,
                        "d90": d90,
                        "log2 d90": math.log2(d90),
                        "share": d90 / count,
                    }
                )
                say(f"seed {seed}: {base}: d90 {result.d90}, full fine-tuning {result.full.metric:.3f}")
        return rows

    def judge(self, table: Table) -> Verdict:
        halves, said = [], []
        for axis in AXES:
            lines = table.where(axis=axis).lines
            first, last = (lines[at].cells["log2 d90"] for at in (0, -1))
            halves.append(above(first - last))
            said.append(f"{_told(lines[0].cells['d90'])} to {_told(lines[-1].cells['d90'])} with {axis}")
        return Verdict(together(halves), f"Mean d90 goes from {' and from '.join(said)}.")

    def plots(self, table: Table) -> tuple[Plot, ...]:
        def panel(axis: str, title: str) -> Plot:
            return Plot(title, "base", "d90", (table.series("", "base", "d90", axis=axis),), log_y=True)

        return panel(AXES[0], "d90 by steps of pre-training"), panel(AXES[1], "d90 by size")


def _told(d90: Cell) -> str:
    """The mean, or in how many seeds no dimension of the grid was enough."""
    missed = sum(map(math.isinf, d90.values))
    return f"{d90.mean:.0f}" if not missed else f"one beyond the grid (in {missed} of {len(d90.values)} seeds)"


def measured(settings: Settings, base: str, seed: int) -> tuple[int, Found]:
    """(parameters of the base, what the search for d90 found on it)."""
    arena = opened(settings, base, seed)

    @cache
    def trained(dimension: int | None, lr: float, number: int) -> float:
        method: Method = Delta(bias=True)
        if dimension is not None:
            method = Intrinsic(dimension=dimension, structured=settings.structured, projection_key=seed + 1000 * number)
        entry = Entry({}, method, OPTIMIZER.replace(lr=lr), "all")
        (row,) = race(arena, [entry], steps=settings.steps, seed=seed, say=lambda text: None, parts=("validation",))
        for adapter in arena.adapters:
            arena.host.delete(adapter.name)
        return float(row.get("validation accuracy", math.exp(-float(row["validation loss"]))))

    def train(dimension: int | None, lr: float, number: int) -> float:
        return trained(dimension, lr, 0 if dimension is None else number)  # subspaces differ, full fine-tuning does not

    return arena.base_parameters(), search_d90(train, settings.grid)


def opened(settings: Settings, base: str, seed: int) -> Arena:
    """The task on a base. Raises ConfigError for a name that is none, MissingError."""
    made = re.fullmatch(r"mlp/(\d+)/(\d+)", base)
    if (made is None) is (settings.task == "digits"):
        raise ConfigError(f"Base {base!r} and task {settings.task!r} do not fit: digits need `mlp/WIDTH/STEPS`.")
    if made is not None:
        width, steps = map(int, made.groups())
        parts = pictures(NEW, seed, train=settings.train_rows)
        return ModuleArena(pretrained(width, settings.depth, steps, seed), parts, batch_size=settings.batch_size)
    name, _, revision = base.partition("@")
    backbone = load(name, dtype=settings.dtype, device=settings.device, revision=revision or None)
    if backbone.tokenizer is None:
        raise ConfigError(f"{base!r} has no tokenizer, so text cannot be trained on it.")
    renderer = Renderer(backbone.tokenizer)
    held = {"train": settings.train_rows, "validation": settings.held_out}
    rows = split(examples(settings.task, renderer, settings.max_length), held, seed, settings.task)
    return TextArena(backbone, renderer, rows, batch_size=settings.batch_size)


def pretrained(width: int, depth: int, steps: int, seed: int) -> MLP:
    """A network that learnt to tell the known digits apart for so many steps, under a new random head."""
    module = MLP(64, width, depth, len(KNOWN), seed=seed)
    pretrain(module, pictures(KNOWN, seed)["train"], steps=steps, batch_size=64, lr=2e-3, seed=seed)
    module.head = MLP(64, width, depth, len(NEW), seed=seed + 1).head
    return module
