"""LoRA-FA: with A frozen, LoRA keeps its quality at about half the parameters and less memory. Checked on E2E."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from lorica.core.errors import ConfigError
from lorica.methods import make_method
from lorica.papers.base import Figure, Verdict
from lorica.papers.kit.arena import COLUMNS, Arena
from lorica.papers.kit.contest import Contest, Contestant
from lorica.papers.kit.judging import above, quality
from lorica.papers.kit.plot import Plot, Series
from lorica.papers.kit.table import Row, Table
from lorica.papers.kit.task import FULL_GSM8K, REDUCED_E2E, SMALL_E2E, TaskSettings
from lorica.papers.kit.text import TextArena
from lorica.recipes.compare.costs import measure

MARGIN = 0.03
"""How much worse than LoRA, relatively, still counts as its quality."""


class Settings(TaskSettings):
    """A task, and what competes."""

    rank: int = Field(8, ge=1, description="rank of both, alpha = 2 rank")
    lora_rates: tuple[float, ...] = Field(description="learning rates to choose from, LoRA")
    fa_rates: tuple[float, ...] = Field(description="learning rates to choose from, LoRA-FA")


class LoRAFAPaper(Contest[Settings]):
    """LoRA and LoRA-FA of the same rank learn the same task in the same batches, each with its learning rate chosen by
    the validation loss. For each method alone, the bytes that autograd keeps between the forward and the backward pass
    of one batch are counted (`saved`; the frozen weights are not counted). The claim shows when LoRA-FA's result is at
    most 3 % behind LoRA's, with fewer trained parameters and fewer saved bytes.
    """

    name = "lora_fa"
    title = "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning"
    authors = "Zhang et al."
    venue = "preprint"
    year = 2023
    arxiv = "2308.03303"
    methods = ("lora_fa", "lora")
    claim = (
        "With LoRA's A frozen at its random start and only B trained, fine-tuning is about as good as LoRA's, trains "
        "half of the parameters, and need not keep the wide inputs of the adapted layers for the backward pass."
    )
    figures = (
        Figure("memory of fine-tuning, LoRA over LoRA-FA", "up to 1.4", "the abstract"),
        Figure("Llama-3.2-3B on GSM8K, rank 32: LoRA-FA / LoRA", "0.404 / 0.478", "PEFT's method comparison"),
        Figure("Llama-2-7B, MMLU: LoRA-FA / full fine-tuning", "56.2 / 57.8", "second-hand: summaries of LoRA-Pro"),
    )
    limits = (
        "Bytes are those of this library's own graph on a small model, where attention and norms keep most; an "
        "allocator's peak and gradient checkpointing are another matter. Few steps favour what learns fast."
    )
    keys = ("method", "rank", "lr")
    columns: ClassVar = {**COLUMNS, "saved": "MiB that autograd keeps for the backward pass of one batch"}

    small = Settings(
        **SMALL_E2E,
        train_rows=300,
        lora_rates=(4e-3, 1e-2),
        fa_rates=(1e-2, 2e-2, 4e-2),
    )
    full = Settings(
        **FULL_GSM8K,
        model="meta-llama/Llama-2-7b-hf",
        steps=1400,
        batch_size=16,
        exact=500,
        rank=64,
        lora_rates=(5e-5, 1e-4, 3e-4),
        fa_rates=(1e-4, 3e-4, 1e-3),
    )
    reduced = Settings(
        **REDUCED_E2E,
        steps=12,
        train_rows=60,
        lora_rates=(1e-2,),
        fa_rates=(4e-2,),
    )

    def contestants(self, settings: Settings) -> Sequence[Contestant]:
        return [
            Contestant(
                {"method": name, "rank": settings.rank},
                make_method(name, rank=settings.rank, alpha=2.0 * settings.rank),
                lrs,
            )
            for name, lrs in (("lora", settings.lora_rates), ("lora_fa", settings.fa_rates))
        ]

    def inspect(self, settings: Settings, arena: Arena) -> list[Row]:
        if not isinstance(arena, TextArena):
            raise ConfigError(f"This paper counts bytes on a language model; its task cannot be {settings.task!r}.")
        batch = arena.parts["train"][: arena.batch_size]
        saved: dict[str, float] = {}
        for client in arena.clients:
            method = client.adapter.method
            if method.name not in saved:
                fresh = arena.service.training_client(method, name=f"{method.name} alone")
                saved[method.name] = measure(fresh, None, [batch]).saved_bytes / 2**20
        return [{"saved": saved[client.adapter.method.name]} for client in arena.clients]

    def judge(self, table: Table) -> Verdict:
        best, column = self.listed(table), quality(table)
        lora, own = best.line(method="lora"), best.line(method="lora_fa")
        theirs = lora.cells[column.column].mean
        gain = column.gain(best, dict(own.key), dict(lora.key))
        fewer, less = (own.cells[name] / lora.cells[name] for name in ("parameters", "saved"))
        said = f"LoRA-FA trains {fewer.mean:.0%} of LoRA's parameters and keeps {less.mean:.0%} of its bytes; its "
        said += f"{column.column} is {own.cells[column.column].mean:.3f} against {theirs:.3f}."
        cheaper = fewer.mean < 1 and less.mean < 1
        return Verdict(above(gain, -MARGIN * abs(theirs)) if cheaper else False, said)

    def plots(self, table: Table) -> tuple[Plot, ...]:
        best = self.listed(table)
        names = tuple(str(line.key["method"]) for line in best)
        saved = Series("", names, tuple(line.cells["saved"].mean for line in best))
        return super().plots(table)[1], Plot("kept for the backward pass", "", "MiB", (saved,))
