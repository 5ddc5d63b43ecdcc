"""High-rank LoRA for many tasks at once: enough rank equals full fine-tuning, and helps tasks that were never seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from pydantic import Field

from lorica.core.config import Config
from lorica.core.errors import DataError
from lorica.data.example import Example
from lorica.data.records import Completion, Record
from lorica.methods import make_method
from lorica.models import Backbone
from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.arena import COLUMNS, OPTIMIZER, Entry, race, rates
from lorica.papers.kit.judging import above, together
from lorica.papers.kit.plot import Plot, Series
from lorica.papers.kit.small_lm import MADE, SmallLM, pretrain_lm
from lorica.papers.kit.table import Row, Table
from lorica.papers.kit.text import TextArena, data_folder, open_model, read_task, split

LETTERS = "\n" + "".join(map(chr, range(32, 127)))
"""What a base that is made here reads: each is a token."""
Render = Callable[[Record], Example | None]
MARGIN = 0.02
"""How much worse than full fine-tuning, relatively, still counts as its quality."""


class Settings(Config):
    """A base, tasks to train on, tasks that stay unseen, and the ranks."""

    model: str = Field(MADE, description="`made here`: pre-trained on other texts of the mixture; else any model")
    base: SmallLM = Field(
        SmallLM(context=64, batch_size=24, steps=300), description="the model that is made here, on letters"
    )
    dtype: str = Field("float32", description="dtype of a loaded base")
    device: str = Field("cpu", description="where a loaded base runs")
    old: tuple[str, ...] = Field(
        ("xsum_DOC", "imdb_Movie", "quoref_Find", "ropes_plain_no", "wiki_bio_who", "duorc_SelfRC_answer"),
        description="templates whose prompts are the plain text that a base made here is pre-trained on",
    )
    seen: tuple[str, ...] = Field(
        (
            *("common_gen", "trec", "rotten_tomatoes", "social_i_qa_G", "kilt_tasks", "glue_qqp", "qasc_is"),
            *("app_reviews", "commonsense_qa"),
        ),
        description="templates, by the beginnings of their names, of the tasks that are trained",
    )
    unseen: tuple[str, ...] = Field(
        ("cosmos_qa_no", "cosmos_qa_only", "sciq", "wiki_qa", "paws", "gigaword", "quartz", "quarel", "dbpedia"),
        description="templates of the tasks that nothing is trained on",
    )
    max_length: int = Field(160, ge=8, description="most tokens (letters) of a row; longer ones are left out")
    held_out: int = Field(96, ge=1, description="rows of the seen tasks to choose by, as many to test, as many unseen")
    ranks: tuple[int, ...] = Field((1, 8, 64), description="ranks, alpha = 2 rank")
    lora_rates: tuple[float, ...] = Field(
        (1e-2, 2e-2, 4e-2), description="learning rates to choose from at rank 1; at rank r divided by the root of r"
    )
    full_rates: tuple[float, ...] = Field((1e-3, 2e-3, 4e-3), description="learning rates to choose from, all weights")
    steps: int = Field(70, ge=1, description="optimiser steps; the rate falls linearly")
    batch_size: int = Field(6, ge=1, description="rows of one step, of all tasks mixed, the same ones for every rank")


class HighRankPaper(PaperCheck[Settings]):
    """A base that knows no task learns many at once from prompt templates of the T0 mixture, rows of all mixed, by LoRA
    at ranks from 1 to the width of its layers (alpha = 2 rank, so the scaling is 2 at every rank) and by training all
    the same weights (`full`, which is `delta`). All ranks train jointly in mixed batches; the learning rate of each is
    chosen on held-out rows of the seen tasks. Measured is the loss of an answer's tokens on other rows of the seen
    tasks, and on tasks of data sets that nothing was trained on. The base is made here, on letters, from plain text of
    a third group of data sets: `nano`, which ships with the package, was itself trained on all these templates, so none
    is unseen to it. The claim has two parts, and shows when both hold: the largest rank is at most 2 % worse than full
    fine-tuning on seen tasks, and better than it on unseen ones.
    """

    name = "highrank"
    title = "Beyond Full Fine-tuning: Harnessing the Power of LoRA for Multi-Task Instruction Tuning"
    authors = "Xin et al."
    venue = "LREC-COLING 2024"
    year = 2024
    arxiv = ""
    link = "https://aclanthology.org/2024.lrec-main.206"
    methods = ("lora", "delta")
    claim = (
        "In instruction tuning on many tasks with much data, LoRA of adequate rank matches full fine-tuning, and ranks "
        "of 1024 and more generalise better than it to unseen tasks."
    )
    figures = (
        Figure("rank from which unseen tasks gain over full fine-tuning", "about 1024", "second-hand: notes of others"),
    )
    limits = (
        "A base of 140,000 weights answers no question; its loss on unseen tasks falls mostly because it learns how "
        "answers look. Loss is not accuracy, and a rank equal to the width leaves nothing to be missed. In a first run "
        "(rates up to 1.5e-2 for LoRA and 3e-3 for all weights, longer pre-training and training) the claim showed, "
        "with the best rates of all weights, of rank 1 and of rank 64 at the ends of their grids. A second one, with "
        "the present settings but rates of 2e-3 to 8e-3 for all weights, of which the lowest was the best, was "
        "undecided; 1e-3 took the place of 8e-3 after that."
    )
    keys = ("method", "rank", "lr")
    columns: ClassVar = {
        "parameters": COLUMNS["parameters"],
        "share": COLUMNS["share"],
        "train loss": COLUMNS["train loss"],
        "validation loss": COLUMNS["validation loss"],
        "seen loss": "of answers to held-out rows of the trained tasks, nats a token",
        "unseen loss": "of answers in tasks that were not trained, nats a token",
    }

    small = Settings()
    full = Settings(
        model="meta-llama/Llama-2-7b-hf",
        dtype="bfloat16",
        device="auto",
        max_length=512,
        held_out=1000,
        ranks=(8, 64, 512, 1024, 4096),
        lora_rates=(1e-3, 2e-3, 4e-3),
        full_rates=(5e-6, 1e-5, 2e-5),
        steps=1000,
        batch_size=128,
    )
    reduced = Settings(
        base=SmallLM(width=32, layers=2, context=64, steps=200),
        ranks=(1, 32),
        lora_rates=(1.5e-2,),
        full_rates=(3e-3,),
        steps=60,
        held_out=60,
    )

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        backbone, render = base(settings, seed, say)
        counts = {"train": None, "validation": settings.held_out, "seen": settings.held_out}
        parts = split(rows_of(settings.seen, render, settings.max_length), counts, seed, "seen tasks")
        rest = rows_of(settings.unseen, render, settings.max_length)
        parts |= split(rest, {"unseen": settings.held_out}, seed, "unseen tasks")
        arena = TextArena(backbone, None, parts, batch_size=settings.batch_size)
        client = arena.service.sampling_client(None)
        untrained: Row = {"method": "base"}
        for part in ("seen", "unseen"):
            loss = sum(found.loss for found in client.logprobs(parts[part]))
            untrained[f"{part} loss"] = loss / sum(example.trained for example in parts[part])
        measured = ("validation", "seen", "unseen")
        found = race(arena, competitors(settings), steps=settings.steps, seed=seed, say=say, parts=measured)
        return [untrained, *found]

    def listed(self, table: Table) -> Table:
        return table.tuned("validation loss", over="lr")

    def judge(self, table: Table) -> Verdict:
        best = self.listed(table)
        ranks = [int(rank) for rank in best.values("rank")]
        seen, unseen = (
            {
                name: best.cell(f"{part} loss", **{key: value for key, value in line.key.items() if key != "lr"})
                for name, line in (("full", best.line(method="full")), *((r, best.line(rank=r)) for r in ranks))
            }
            for part in ("seen", "unseen")
        )
        low, high = min(ranks), max(ranks)
        parts = (above(seen["full"] - seen[high], -MARGIN * seen["full"].mean), above(unseen["full"] - unseen[high]))
        said = " and ".join(
            f"{found[high].mean:.3f} at rank {high}, {found[low].mean:.3f} at rank {low} and {found['full'].mean:.3f} "
            f"for full fine-tuning on {name} tasks"
            for name, found in (("seen", seen), ("unseen", unseen))
        )
        return Verdict(together(parts), f"The loss is {said}.")

    def plots(self, table: Table) -> tuple[Plot, ...]:
        best = self.listed(table)
        lines = best.where(method="lora").lines
        ranks = tuple(float(line.key["rank"]) for line in lines)
        panels = []
        for part in ("seen", "unseen"):
            full = best.cell(f"{part} loss", method="full")
            found = [line.cells[f"{part} loss"] - full for line in lines]
            curve = Series("lora", ranks, tuple(c.mean for c in found), tuple(c.spread for c in found))
            flat = Series("full", ranks, (0.0,) * len(ranks), style="dashed")
            panels.append(Plot(f"{part} tasks", "rank", "loss above full fine-tuning's", (curve, flat), log_x=True))
        return tuple(panels)


def competitors(settings: Settings) -> list[Entry]:
    """Full fine-tuning and every rank, each at its rates, with the paper's falling rate."""
    optimizer = OPTIMIZER.replace(schedule="linear")
    entries = rates({"method": "full"}, make_method("delta"), settings.full_rates, optimizer)
    for rank in settings.ranks:
        lora = make_method("lora", rank=rank, alpha=2.0 * rank)
        lrs = [float(f"{lr * rank**-0.5:.2g}") for lr in settings.lora_rates]
        entries += rates({"method": "lora", "rank": rank}, lora, lrs, optimizer)
    return entries


def base(settings: Settings, seed: int, say: Say) -> tuple[Backbone, Render]:
    """The base of a seed, and what makes examples of rows; None for a row that it cannot write."""
    if settings.model != MADE:
        backbone, renderer = open_model(settings.model, dtype=settings.dtype, device=settings.device)
        return backbone, renderer.example
    rows = [row for name in templates(settings.old) for row in read_task(f"t0/{name}")]
    text = "\n".join(row.prompt for row in rows if isinstance(row, Completion))
    places = {letter: place for place, letter in enumerate(LETTERS)}
    tokens = torch.tensor([places[letter] for letter in text if letter in places])

    def render(row: Record) -> Example | None:
        assert isinstance(row, Completion)
        asked, answer = f"{row.prompt}\n", f"{row.completion}\n"
        if not set(asked + answer) <= places.keys():
            return None
        weights = [0.0] * len(asked) + [1.0] * len(answer)
        return Example(tuple(places[letter] for letter in asked + answer), tuple(weights), row.where)

    return pretrain_lm(tokens, len(LETTERS), settings.base, seed, say), render


def templates(beginnings: Sequence[str]) -> list[str]:
    """The templates whose names begin so, sorted. Raises DataError for a beginning that none has."""
    names = sorted(path.stem for path in (data_folder() / "t0_templates").glob("*.jsonl"))
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in names):
            raise DataError(f"No template of t0_templates begins with {beginning!r}.")
    return [name for name in names if name.startswith(tuple(beginnings))]


def rows_of(beginnings: Sequence[str], render: Render, max_length: int) -> list[Example]:
    """The rows of all these templates that can be written and are short enough."""
    made = (render(row) for name in templates(beginnings) for row in read_task(f"t0/{name}"))
    return [row for row in made if row is not None and len(row) <= max_length]
