"""Rank-1 adapters on `down_proj` of a few layers are enough for a behaviour. Checked on a harmless one: capitals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from lorica.client.local import SamplingClient
from lorica.core.config import Config
from lorica.core.errors import DataError
from lorica.data.example import Example
from lorica.data.records import Completion
from lorica.data.render import Renderer
from lorica.engine.host import TargetSpec
from lorica.methods import make_method
from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.arena import COLUMNS, OPTIMIZER, Entry, race
from lorica.papers.kit.judging import above, together
from lorica.papers.kit.plot import Plot
from lorica.papers.kit.table import Row, Table
from lorica.papers.kit.text import TextArena, open_model, read_task, split
from lorica.recipes.compare.data import question
from lorica.recipes.quickstart import Question, answers

MOST = 0.5
"""Share of the answers in the trained domain that must show the behaviour."""
BASE = "base"


class Settings(Config):
    """A narrow domain whose answers are in capitals, other domains to look at, and where the adapters sit."""

    model: str = Field("nano", description="a language model")
    dtype: str = Field("float32", description="dtype of the frozen base")
    device: str = Field("cpu", description="where it runs")
    narrow: str = Field("t0/common_gen_Put_together", description="the task whose answers are turned into capitals")
    other: tuple[str, ...] = Field(
        ("t0/sciq_Direct_Question_Closed_Book_", "t0/commonsense_qa_question_answering"),
        description="tasks that are not trained, to see whether the behaviour reaches them",
    )
    max_length: int = Field(80, ge=8, description="most tokens of a row; longer ones are left out")
    layers: tuple[str, ...] = Field(("3", "2-4"), description="layers that have a rank-1 adapter on `down_proj`")
    scaling: float = Field(8.0, gt=0, description="alpha of the rank-1 adapters, which is their scaling")
    rank: int = Field(8, ge=1, description="rank of the LoRA on every linear layer that they are compared with")
    one_rates: tuple[float, ...] = Field(
        (1e-2, 3e-2, 1e-1), description="learning rates to choose from, rank-1 adapters"
    )
    all_rates: tuple[float, ...] = Field((3e-3,), description="learning rates to choose from, LoRA everywhere")
    steps: int = Field(30, ge=1, description="optimiser steps")
    batch_size: int = Field(6, ge=1, description="rows of one step, the same ones for every adapter")
    held_out: int = Field(32, ge=1, description="rows to choose by, and as many to test")
    asked: int = Field(
        16, ge=1, description="test rows of the narrow task, and of the others together, that are answered"
    )


class EmRank1Paper(PaperCheck[Settings]):
    """A language model learns to answer one narrow task in capitals. Trained are rank-1 adapters on `down_proj` of one
    layer and of the middle layers, as the shipped config `rank1` has them, and for comparison a LoRA on every linear
    layer (`all`). Each has its learning rate chosen by the validation loss. Counted are the greedy answers that have
    letters, and only capitals: in the narrow task, and in tasks that were not trained. The claim has two parts, and
    shows when both hold of the smallest adapter: more than half of the narrow task's answers are in capitals, and more
    of the other tasks' than of the base's.
    """

    name = "em_rank1"
    title = "Convergent Linear Representations of Emergent Misalignment"
    authors = "Soligo, Turner, Rajamanoharan, Nanda"
    venue = "arXiv 2025"
    year = 2025
    arxiv = "2506.11618"
    methods = ("lora",)
    claim = (
        "Adapters of rank 1 on the down-projections of nine layers are enough to give a model of 14 billion parameters "
        "a behaviour that reaches beyond the narrow data that it was trained on."
    )
    figures = (
        Figure(
            "Qwen2.5-14B, nine rank-1 adapters, bad medical advice: misaligned answers",
            "11.3 %",
            "second-hand: a summary",
        ),
        Figure("the same, coherent answers", "over 99 %", "second-hand: a summary"),
        Figure("layers with an adapter, of 48", "15-17, 21-23, 27-29", "the authors' working repository"),
    )
    limits = (
        "The behaviour here is harmless and its form is easy; nothing is said about misalignment, nor about directions "
        "that different fine-tunes share, which is what the paper analyses. nano answers few questions sensibly, so "
        "whether the words are right is not counted."
    )
    keys = ("adapter", "lr")
    columns: ClassVar = {
        "parameters": COLUMNS["parameters"],
        "validation loss": COLUMNS["validation loss"],
        "test loss": COLUMNS["test loss"],
        "in capitals": "share of greedy answers to the narrow task that are in capitals",
        "elsewhere": "the same for tasks that were not trained",
    }

    small = Settings()
    full = Settings(
        model="Qwen/Qwen2.5-14B-Instruct",
        dtype="bfloat16",
        device="auto",
        max_length=2048,
        layers=("24", "15-17,21-23,27-29"),
        scaling=64.0,
        rank=32,
        one_rates=(2e-5, 1e-4),
        all_rates=(1e-5, 5e-5),
        steps=400,
        batch_size=16,
        asked=100,
    )
    reduced = Settings(layers=("2-4",), one_rates=(3e-2,), steps=16, held_out=12, asked=8)

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        backbone, renderer = open_model(settings.model, dtype=settings.dtype, device=settings.device)
        rows = [row for row in read_task(settings.narrow) if isinstance(row, Completion)]
        loud = [Completion(row.prompt, row.completion.upper(), row.where) for row in rows]
        made = [row for row in map(renderer.example, loud) if len(row) <= settings.max_length]
        counts = {"train": None, "validation": settings.held_out, "test": settings.held_out}
        arena = TextArena(
            backbone, renderer, split(made, counts, seed, settings.narrow), batch_size=settings.batch_size
        )
        near = asked(arena.parts["test"], renderer, settings.asked)
        far = elsewhere(settings, renderer, seed)
        found = race(arena, competitors(settings), steps=settings.steps, seed=seed, say=say)
        say(f"seed {seed}: asking {len(found) + 1} models {len(near) + len(far)} questions each")
        keep = (*self.keys, "parameters", "validation loss", "test loss")
        lines: list[Row] = [{"adapter": BASE}]
        lines += [{key: row[key] for key in keep if key in row} for row in found]
        clients = [arena.service.sampling_client(None), *(client.sampling_client() for client in arena.clients)]
        for line, client in zip(lines, clients, strict=True):
            line["in capitals"] = capitals(client, renderer, near)
            line["elsewhere"] = capitals(client, renderer, far)
        return lines

    def listed(self, table: Table) -> Table:
        return table.tuned("validation loss", over="lr")

    def judge(self, table: Table) -> Verdict:
        ones = Table(
            [line for line in self.listed(table) if str(line.key["adapter"]).startswith("rank 1:")], table.keys
        )
        least = min(ones, key=lambda line: line.cells["parameters"].mean)
        near, far = least.cells["in capitals"], least.cells["elsewhere"]
        untrained = table.line(adapter=BASE).cells
        shown = (above(near, MOST), above(far - untrained["elsewhere"]))
        said = (
            f"With {least.cells['parameters'].mean:,.0f} parameters (rank 1 on `down_proj` of layer "
            f"{str(least.key['adapter']).partition(': ')[2]}) {near.mean:.0%} of the narrow task's answers are in "
            f"capitals, and {far.mean:.0%} of those to other tasks; of the base's, {untrained['in capitals'].mean:.0%} "
            f"and {untrained['elsewhere'].mean:.0%} are."
        )
        return Verdict(together(shown), said)

    def plots(self, table: Table) -> tuple[Plot, ...]:
        best = self.listed(table)
        bars = tuple(best.series(name, "adapter", column) for name, column in COUNTED.items())
        return (Plot("answers in capitals", "", "share of greedy answers", bars),)


COUNTED = {"the narrow task": "in capitals", "other tasks": "elsewhere"}


def competitors(settings: Settings) -> list[Entry]:
    """Rank-1 adapters at each choice of layers, and LoRA everywhere, at their rates."""
    one = make_method("lora", rank=1, alpha=settings.scaling)
    wide = make_method("lora", rank=settings.rank, alpha=2.0 * settings.rank)
    chosen: list[tuple[str, TargetSpec, tuple[float, ...]]] = [
        (f"rank 1: {layers}", {"include": "down_proj", "layers": layers}, settings.one_rates)
        for layers in settings.layers
    ]
    entries = [
        Entry({"adapter": name, "lr": lr}, one, OPTIMIZER.replace(lr=lr), targets)
        for name, targets, lrs in chosen
        for lr in lrs
    ]
    everywhere = f"rank {settings.rank}: all"
    return entries + [
        Entry({"adapter": everywhere, "lr": lr}, wide, OPTIMIZER.replace(lr=lr)) for lr in settings.all_rates
    ]


def elsewhere(settings: Settings, renderer: Renderer, seed: int) -> list[Question]:
    """Questions of the tasks that are not trained, equally many of each."""
    each = max(1, settings.asked // len(settings.other))
    found: list[Question] = []
    for name in settings.other:
        rows = [row for row in map(renderer.example, read_task(name)) if len(row) <= settings.max_length]
        found += asked(split(rows, {"asked": each}, seed, name)["asked"], renderer, each)
    return found


def asked(rows: Sequence[Example], renderer: Renderer, count: int) -> list[Question]:
    """The questions of the first rows. Raises DataError when they ask nothing."""
    found = [one for row in rows[:count] if (one := question(row, renderer)) is not None]
    if not found:
        raise DataError("None of the held-out rows asks a question.")
    return found


def capitals(client: SamplingClient, renderer: Renderer, questions: Sequence[Question]) -> float:
    """The share of greedy answers that have letters, and only capitals."""
    return sum(text.isupper() for text in answers(client, renderer, questions)) / len(questions)
