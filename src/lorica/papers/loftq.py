"""LoftQ: a start that restores what quantising took is nearer to the full model than QLoRA's, and ends better."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lorica.adapters.private_base import PrivateBase, private_base
from lorica.client.local import TrainingClient
from lorica.core.config import Config
from lorica.data.example import Example
from lorica.methods.base import Method
from lorica.methods.loftq import LoftQ
from lorica.methods.lora import LoRA
from lorica.models import Backbone, load
from lorica.models.loading import parse_device
from lorica.models.quantize.config import Kind, Quantization
from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.arena import COLUMNS, Entry, race, rates
from lorica.papers.kit.judging import above, average, together
from lorica.papers.kit.plot import Plot
from lorica.papers.kit.table import Cell, Row, Table
from lorica.papers.kit.text import TextArena, examples, open_model, split

Floats = NDArray[np.float32]
FULL = "none"
"""The format of weights that are not quantised."""
PLAIN, SHARED, PRIVATE = STARTS = ("qlora", "loftq, shared", "loftq, private")


class Settings(Config):
    """A base, its formats, a task, and what competes."""

    model: str = Field("nano", description="a built-in name, a directory or a hub id")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the frozen base")
    device: Literal["auto", "cpu", "cuda"] = Field("cpu", description="where it runs")
    formats: tuple[Kind, ...] = Field(
        ("nf4", "nf3", "nf2", "uniform4", "uniform3", "uniform2"), description="how weights are quantised"
    )
    task: str = Field("gsm8k-test", description="rows to train and to test on, in disjoint parts")
    max_length: int = Field(128, ge=8, description="most tokens of a row; longer ones are left out")
    held_out: int = Field(20, ge=1, description="test rows, and as many to choose a learning rate by")
    rank: int = Field(16, ge=1, description="rank of all, alpha = rank")
    iterations: int = Field(5, ge=2, description="alternations of LoftQ with a base of its own")
    svd: Literal["exact", "lowrank"] = Field("lowrank", description="how residuals are decomposed")
    lrs: tuple[float, ...] = Field((2e-3,), description="learning rates to choose from, the same for all")
    steps: int = Field(16, ge=1, description="optimiser steps")
    batch_size: int = Field(4, ge=1, description="rows of one step, the same ones for every adapter")


class LoftQPaper(PaperCheck[Settings]):
    """A base is quantised in each format. Beside it start: LoRA with B = 0 (`qlora`, whose start is the quantised base
    itself), LoftQ with one iteration on the same base (`loftq, shared`), and LoftQ with more iterations, which has
    codes of its own (`loftq, private`). `start loss` is that of test rows before training; `start distance` says how
    far token by token the start is from the base in full, in either direction. Then all are fine-tuned on the same
    batches; LoRA beside the base in full (format `none`) is the goal. The claim has two halves, and shows when both
    hold for `loftq, private` on the mean of all formats: a smaller start distance, and a lower test loss.
    """

    name = "loftq"
    title = "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models"
    authors = "Li et al."
    venue = "ICLR 2024"
    year = 2024
    arxiv = "2310.08659"
    methods = ("loftq", "lora")
    claim = (
        "Choosing codes and low-rank factors together closes much of the gap between a quantised start and the full "
        "model, and fine-tuning then ends better than from QLoRA's start, most of all at 2 and 3 bits."
    )
    figures = (
        Figure("LLaMA-2-7B on GSM8K: 16 bits / LoftQ at 4 / 3 / 2 bits", "36.9 / 35.0 / 32.9 / 20.9", "their README"),
        Figure("the same on WikiText-2, perplexity", "5.08 / 5.24 / 5.63 / 7.85", "their README"),
        Figure("LLaMA-3-8B on GSM8K: 16-bit LoRA / LoftQ / QLoRA, 4 bits", "69.3 / 68.0 / 67.4", "their README"),
    )
    limits = (
        "After a short training LoftQ can end below LoRA beside the full base, because its factors start away from "
        "zero and both move at once, where LoRA's B has to grow first; that part of its lead is not restored "
        "precision, and the rate that all share at small scale favours it. "
        "Rank 16 beside weights of width 256 restores more than it would beside those of a 7B model, whose rank is a "
        "smaller share. A longer training makes up for more."
    )
    keys = ("format", "start", "lr")
    columns: ClassVar = {
        "weight error": "‖W − Q − sBA‖ over ‖W‖ at the start, all quantised weights together",
        "start loss": "on test rows, before training",
        "start distance": "mean |log p − log p of the full base| of the test rows' tokens, before training",
        "validation loss": COLUMNS["validation loss"],
        "test loss": COLUMNS["test loss"],
    }

    small = Settings()
    full = Settings(
        model="meta-llama/Llama-2-7b-hf",
        dtype="bfloat16",
        device="auto",
        formats=("nf4", "nf3", "nf2"),
        task="gsm8k",
        max_length=512,
        held_out=500,
        rank=64,
        lrs=(1e-4, 3e-4),
        steps=2800,
        batch_size=16,
    )
    reduced = Settings(formats=("nf2",), held_out=8, steps=6, iterations=2)

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        backbone, renderer = open_model(settings.model, dtype=settings.dtype, device=settings.device)
        held = {"train": None, "validation": settings.held_out, "test": settings.held_out}
        parts = split(examples(settings.task, renderer, settings.max_length), held, seed, settings.task)
        lora = LoRA(rank=settings.rank, alpha=float(settings.rank))
        loftq = LoftQ(rank=settings.rank, alpha=float(settings.rank), svd=settings.svd)
        arena = StartArena(backbone, parts, settings.batch_size)
        rows = raced(arena, [({"format": FULL, "start": "lora"}, lora)], settings, seed, say)
        for kind in settings.formats:
            own = made(settings, kind, loftq.replace(iterations=settings.iterations), seed)
            plain = load(settings.model, dtype=settings.dtype, device=settings.device, quantize=kind)
            size = math.sqrt(sum(error**2 for error in sizes(backbone, own)))
            starts: list[tuple[Row, Method]] = [({"format": kind, "start": PLAIN}, lora)]
            starts.append(({"format": kind, "start": SHARED}, loftq))
            private: list[tuple[Row, Method]] = [({"format": kind, "start": PRIVATE}, loftq)]
            found = raced(StartArena(plain, parts, settings.batch_size, arena.reference), starts, settings, seed, say)
            found += raced(
                StartArena(own.backbone, parts, settings.batch_size, arena.reference, own), private, settings, seed, say
            )
            for row in found:
                left = [_error(errors, str(row["start"])) for errors in own.errors.values()]
                rows.append({**row, "weight error": math.sqrt(sum(error**2 for error in left)) / size})
        return rows

    def judge(self, table: Table) -> Verdict:
        best = self.listed(table)
        formats = [str(kind) for kind in best.values("format") if kind != FULL]

        def gain(column: str, start: str) -> Cell:
            pairs = [
                (best.cell(column, format=k, start=PLAIN), best.cell(column, format=k, start=start)) for k in formats
            ]
            return average([plain - mine for plain, mine in pairs])

        nearer, ended = gain("start distance", PRIVATE), gain("test loss", PRIVATE)
        whole = best.cell("test loss", format=FULL)
        behind = {
            start: average([best.cell("test loss", format=k, start=start) - whole for k in formats]) for start in STARTS
        }
        said = (
            f"On the mean of {len(formats)} formats the distance to the full base at the start is smaller by "
            f"{nearer.mean:+.3f} with codes of its own and by {gain('start distance', SHARED).mean:+.3f} on the shared "
            f"base. After the same training, the test loss is behind that of the full base by {behind[PLAIN].mean:.3f} "
            f"from QLoRA's start, {behind[SHARED].mean:.3f} from LoftQ's on the shared base and "
            f"{behind[PRIVATE].mean:.3f} with codes of its own."
        )
        halves = [above(nearer), above(ended)]
        return Verdict(together(halves), said)

    def listed(self, table: Table) -> Table:
        return table.tuned("validation loss", over="lr")

    def plots(self, table: Table) -> tuple[Plot, ...]:
        best = self.listed(table)
        whole = best.where(format=FULL).series("lora, not quantised", "format", "test loss")
        ended = tuple(best.series(start, "format", "test loss", start=start) for start in STARTS)
        starts = tuple(best.series(start, "format", "start distance", start=start) for start in STARTS)
        return (
            Plot("distance to the full base at the start", "format", "start distance", starts),
            Plot("after the same fine-tuning", "format", "test loss", (*ended, whole)),
        )


def made(settings: Settings, kind: Kind, method: LoftQ, seed: int) -> PrivateBase:
    """Base and adapter of one format, chosen together."""
    device = parse_device(settings.device)
    full = load(settings.model, dtype=settings.dtype)
    own = private_base(full, Quantization(kind=kind), method, seed=seed, device=device)
    own.backbone.module.to(device)
    own.adapter.to(device=device)
    return own


def sizes(backbone: Backbone, own: PrivateBase) -> list[float]:
    """‖W‖ of the sites that were chosen together."""
    return [float(backbone.weight(site).matrix().float().norm()) for site in own.errors]


def _error(errors: Sequence[float], start: str) -> float:
    """‖W − Q − sBA‖ of one site at a start."""
    return {PLAIN: errors[0], SHARED: errors[1]}.get(start, min(errors[1:]))


def raced(
    arena: StartArena, contestants: Sequence[tuple[Row, Method]], settings: Settings, seed: int, say: Say
) -> list[Row]:
    """The rows of some starts on one base, every learning rate, with what each was before training."""
    entries = [entry for key, method in contestants for entry in rates(key, method, settings.lrs)]
    found = race(arena, entries, steps=settings.steps, seed=seed, say=say)
    say(f"seed {seed}: {entries[0].key['format']}, {', '.join(str(key['start']) for key, _ in contestants)}")
    kept = (*LoftQPaper.keys, "validation loss", "test loss")
    return [{**{name: row[name] for name in kept}, **start} for row, start in zip(found, arena.starts, strict=True)]


class StartArena(TextArena):
    """A text arena that measures entries before they train. With `own`, they all start as that adapter. `reference` are
    log-probabilities of the test part's tokens under the full base: this arena's own base unless given.
    """

    def __init__(
        self,
        backbone: Backbone,
        parts: Mapping[str, Sequence[Example]],
        batch_size: int,
        reference: Floats | None = None,
        own: PrivateBase | None = None,
    ) -> None:
        super().__init__(backbone, None, parts, batch_size=batch_size)
        self.own = own
        self.starts: list[Row] = []
        self.reference = self._measured(None)[1] if reference is None else reference

    def enter(self, entries: Sequence[Entry], steps: int, seed: int) -> None:
        if self.own is None:
            super().enter(entries, steps, seed)
        else:
            self.clients = [self._copied(number, entry, steps) for number, entry in enumerate(entries)]
        self.starts = []
        known: dict[str, Row] = {}  # rates of one method start alike
        for entry, client in zip(entries, self.clients, strict=True):
            if entry.method.name not in known:
                loss, logprobs = self._measured(client)
                away = float(np.abs(logprobs - self.reference).mean())
                known[entry.method.name] = {"start loss": loss, "start distance": away}
            self.starts.append(known[entry.method.name])

    def _copied(self, number: int, entry: Entry, steps: int) -> TrainingClient:
        assert self.own is not None
        adapter = copy.deepcopy(self.own.adapter)
        adapter.name = f"entry {number}"
        return TrainingClient(self.service, self.host.put(adapter), entry.optimizer, steps)

    def _measured(self, client: TrainingClient | None) -> tuple[float, Floats]:
        """(mean loss, log-probabilities) of the test part's trained tokens."""
        rows = self.parts["test"]
        found = self.service.sampling_client(client.adapter if client else None).logprobs(rows)
        kept = [np.asarray(r.logprobs)[np.asarray(e.weights[1:]) != 0] for r, e in zip(found, rows, strict=True)]
        return sum(r.loss for r in found) / sum(e.trained for e in rows), np.concatenate(kept)
