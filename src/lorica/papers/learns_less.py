"""LoRA learns less and forgets less than full fine-tuning, whose change is of high rank. Checked on source code."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from lorica.core.config import Config
from lorica.core.errors import DataError
from lorica.data.example import Example
from lorica.data.render import Renderer
from lorica.methods import make_method
from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.arena import COLUMNS, Entry, race, rates
from lorica.papers.kit.judging import above, average, together
from lorica.papers.kit.plot import Plot, Series
from lorica.papers.kit.table import Cell, Line, Row, Table
from lorica.papers.kit.text import TextArena, examples, open_model, split, stream
from lorica.recipes.forgetting import Forgetting, measure_forgetting

STDLIB = "python"


class Settings(Config):
    """What is learnt, what is forgotten, and what competes."""

    model: str = Field("nano", description="a language model")
    dtype: str = Field("float32", description="dtype of the frozen base")
    device: str = Field("cpu", description="where it runs")
    target: str = Field(STDLIB, description="what is learnt: `python` is the standard library's source; or a task")
    files: int = Field(20, ge=1, description="modules of the standard library that are read, the largest ones")
    source: tuple[str, ...] = Field(
        ("t0/sciq_Direct_Question", "t0/common_gen_Put_together", "gsm8k"), description="what stands for the old data"
    )
    length: int = Field(48, ge=8, description="tokens of a window of code, and most tokens of other rows")
    ranks: tuple[int, ...] = Field((2, 16), description="ranks of LoRA, alpha = 2 rank")
    lora_rates: tuple[float, ...] = Field((2e-3, 6e-3, 1.8e-2), description="learning rates to choose from, LoRA")
    full_rates: tuple[float, ...] = Field(
        (5e-4, 1.5e-3, 4.5e-3), description="learning rates to choose from, all weights"
    )
    steps: int = Field(32, ge=1, description="optimiser steps")
    batch_size: int = Field(4, ge=1, description="rows of one step, the same ones for every adapter")
    held_out: int = Field(
        48, ge=1, description="rows of the target to choose by, and as many to test; rows of a source"
    )
    share: float = Field(0.9, gt=0, le=1, description="share of a change's variance whose components are counted")


class LearnsLessPaper(PaperCheck[Settings]):
    """A language model learns a domain that it never saw, source code of Python's standard library (every token of a
    window), by LoRA at several ranks on every linear layer and by training all these weights (`delta`). The learning
    rate of each is chosen by the validation loss of the target. Then the loss of held-out target rows is compared with
    the base's (*gained*), as is that of rows of the kind that the base was trained on (*forgotten*), and the singular
    directions are counted that hold 90 % of the variance of each weight's change. The claim has three parts, and shows
    when all hold on the mean of the ranks: LoRA gains less, LoRA forgets less, and the change of full fine-tuning has
    more components than the largest rank.
    """

    name = "learns_less"
    title = "LoRA Learns Less and Forgets Less"
    authors = "Biderman et al."
    venue = "TMLR 2024"
    year = 2024
    arxiv = "2405.09673"
    methods = ("lora", "delta")
    claim = (
        "LoRA reaches less than full fine-tuning on a far target and keeps more of what the base knew; the change that "
        "full fine-tuning makes has a rank 10 to 100 times that of common LoRAs."
    )
    figures = (
        Figure(
            "Llama-2-7B, code instructions, HumanEval after 4 epochs: rank 16 / rank 256 / full", ".358 / .498 / .470"
        ),
        Figure("the same after 8 epochs", ".338 / .437 / .497"),
        Figure("what it kept (mean of three tests) after 8 epochs: rank 16 / rank 256 / full", ".646 / .552 / .446"),
        Figure("what it kept of maths after 16 epochs: rank 256 / full", ".567 / .559"),
        Figure("components for 90 % of the change in continued pre-training, of 4096", "about 1000 to 2800", "memory"),
    )
    limits = (
        "Some 30 steps are no epochs of many thousand rows: neither side is near what it could learn. A high rank of "
        "the change is no proof that a high rank is needed: the authors find that small noise has such a spectrum too. "
        "Both depend on the learning rate, so the picture shows every rate. A first run (40 steps, two rates each, the "
        "larger ones 6e-3 for LoRA and 1.5e-3 for all weights) was undecided; a third, larger rate for each, and the "
        "reading at equal gain only up to the best rate, came after that."
    )
    keys = ("method", "rank", "lr", "part")
    columns: ClassVar = {
        "parameters": COLUMNS["parameters"],
        "validation loss": COLUMNS["validation loss"],
        "gained": "by how much the loss of the target's test rows fell, nats a token",
        "forgotten": "by how much the loss of the source's rows rose, nats a token",
        "components": "mean number of singular directions that hold the share of the variance of a weight's change",
        "of": "most directions that there could be",
    }

    small = Settings()
    full = Settings(
        model="meta-llama/Llama-2-7b-hf",
        dtype="bfloat16",
        device="auto",
        files=400,
        length=1024,
        ranks=(16, 64, 256),
        lora_rates=(5e-5, 1e-4, 2e-4, 5e-4),
        full_rates=(1e-5, 2e-5, 5e-5),
        steps=2000,
        batch_size=192,
        held_out=200,
    )
    reduced = Settings(
        files=8, ranks=(2,), lora_rates=(6e-3,), full_rates=(1.5e-3,), steps=12, batch_size=4, held_out=16
    )

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        arena, source = open_arena(settings, seed)
        entries = competitors(settings)
        found = race(arena, entries, steps=settings.steps, seed=seed, say=say, parts=("validation",))
        say(f"seed {seed}: asking {len(entries)} adapters about the target and the source")
        measured = measure_forgetting(
            arena.service, arena.adapters, {"target": arena.parts["test"]}, {"source": source}, share=settings.share
        )
        return [line for row, own in zip(found, measured, strict=True) for line in _lines(row, own)]

    def listed(self, table: Table) -> Table:
        return table.tuned("validation loss", over="lr")

    def judge(self, table: Table) -> Verdict:
        whole = Table([line for line in self.listed(table) if "part" not in line.key], table.keys)
        full, lora = whole.line(method="full").cells, [line.cells for line in whole.where(method="lora")]
        full_lines = [line for line in table.where(method="full") if "part" not in line.key]
        less = average([full["gained"] - own["gained"] for own in lora])
        kept = average([full["forgotten"] - own["forgotten"] for own in lora])
        largest = max(int(line.key["rank"]) for line in whole.where(method="lora"))
        shown = (above(less), above(kept), above(full["components"], largest))
        each = ", ".join(
            f"{line.cells['forgotten'].mean:.3f} at rank {line.key['rank']}"
            + ("" if (same := at_gain(full_lines, line)) is None else f" (full at equal gain: {same.mean:.3f})")
            for line in whole.where(method="lora")
        )
        said = (
            f"LoRA gains {less.mean:.3f} ± {less.error:.3f} (standard error) less than full fine-tuning, which gains "
            f"{full['gained'].mean:.3f}; full fine-tuning forgets {full['forgotten'].mean:.3f}, LoRA {each}; 90 % of "
            f"the variance of full fine-tuning's change takes {full['components'].mean:.0f} of {full['of'].mean:.0f} "
            f"components, LoRA's largest rank is {largest}."
        )
        return Verdict(together(shown), said)

    def plots(self, table: Table) -> tuple[Plot, ...]:
        whole = Table([line for line in table if "part" not in line.key], table.keys)
        names = [("full", whole.where(method="full"))]
        names += [(f"lora, rank {rank}", whole.where(rank=rank)) for rank in whole.values("rank")]
        parts = Table([line for line in self.listed(table) if "part" in line.key], table.keys)
        bars = parts.where(method="full").series("full", "part", "components")
        return (
            Plot("each point a learning rate", "gained on the target", "forgotten of the source", _curves(names)),
            Plot("rank of full fine-tuning's change", "", "components for 90 % of the variance", (bars,)),
        )


def _curves(names: Sequence[tuple[str, Table]]) -> tuple[Series, ...]:
    found = []
    for label, lines in names:
        cells = [(line.cells["gained"].mean, line.cells["forgotten"]) for line in lines]
        x, y, spread = (tuple(values) for values in zip(*((g, f.mean, f.spread) for g, f in cells), strict=True))
        found.append(Series(label, x, y, spread))
    return tuple(found)


def at_gain(lines: Sequence[Line], other: Line) -> Cell | None:
    """What full fine-tuning forgets where it gains as much as another line, seed by seed, on a straight line between
    its learning rates up to the one that gains most: beyond it more is forgotten for less. None where some seed's gain
    is outside of what they reach.
    """
    found = []
    for seed, gain in enumerate(other.cells["gained"].values):
        points = [(line.cells["gained"].values[seed], line.cells["forgotten"].values[seed]) for line in lines]
        for (x, y), (right, upper) in pairwise(points[: points.index(max(points)) + 1]):
            if x <= gain <= right:
                found.append(y + (upper - y) * ((gain - x) / (right - x) if right > x else 0.0))
                break
        else:
            return None
    return Cell(tuple(found))


def competitors(settings: Settings) -> list[Entry]:
    """Full fine-tuning and LoRA at every rank, each at its rates."""
    entries = rates({"method": "full"}, make_method("delta"), settings.full_rates)
    for rank in settings.ranks:
        lora = make_method("lora", rank=rank, alpha=2.0 * rank)
        entries += rates({"method": "lora", "rank": rank}, lora, settings.lora_rates)
    return entries


def _lines(row: Row, found: Forgetting) -> list[Row]:
    """The adapter's line, and for full fine-tuning one for each role and layer."""
    kept: Row = {key: row[key] for key in ("method", "rank", "lr", "validation loss") if key in row}
    counts = [site.count for site in found.components]
    line: Row = {**kept, "parameters": row["parameters"], "gained": found.gained, "forgotten": found.forgotten}
    line |= {"components": sum(counts) / len(counts), "of": max(site.most for site in found.components)}
    if found.method != "delta":
        return [line]
    groups = found.by_role() | {f"layer {layer}": own for layer, own in found.by_layer().items()}
    return [line, *({**kept, "part": name, "components": mean, "of": most} for name, (mean, most) in groups.items())]


def open_arena(settings: Settings, seed: int) -> tuple[TextArena, list[Example]]:
    """The arena of the target, with parts `train`, `validation` and `test`, and the rows of the sources. Raises
    MissingError, DataError.
    """
    backbone, renderer = open_model(settings.model, dtype=settings.dtype, device=settings.device)
    rows = target_rows(settings, renderer)
    counts = {"train": None, "validation": settings.held_out, "test": settings.held_out}
    parts = split(rows, counts, seed, settings.target)
    source = [
        row
        for name in settings.source
        for row in split(examples(name, renderer, 2 * settings.length), {"kept": settings.held_out // 2}, seed, name)[
            "kept"
        ]
    ]
    return TextArena(backbone, renderer, parts, batch_size=settings.batch_size), source


def target_rows(settings: Settings, renderer: Renderer) -> list[Example]:
    """The rows of the target. Raises MissingError, DataError."""
    if settings.target != STDLIB:
        return examples(settings.target, renderer, settings.length)
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"), key=lambda path: (-path.stat().st_size, path.name))[: settings.files]
    if not files:
        raise DataError(f"{folder} holds no modules, so there is no source code to learn.")
    rows: list[Example] = []
    for path in files:
        tokens = torch.tensor(stream(renderer.tokenizer, path.read_text(encoding="utf-8").split("\n")))
        windows = tokens.unfold(0, settings.length, settings.length) if len(tokens) >= settings.length else ()
        rows += [Example.whole(window.tolist(), path.name) for window in windows]
    return rows
