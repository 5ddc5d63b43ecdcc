"""IA³: scales on inner activations beat the training of all weights when there are few examples. Checked on E2E."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from lorica.methods import make_method
from lorica.papers.base import Figure, Verdict
from lorica.papers.kit.contest import Contest, Contestant
from lorica.papers.kit.judging import above, quality
from lorica.papers.kit.table import Table
from lorica.papers.kit.task import REDUCED_E2E, SMALL_E2E, TaskSettings


class Settings(TaskSettings):
    """A task with few rows, and what competes."""

    rank: int = Field(8, ge=1, description="rank of LoRA, alpha = 2 rank")
    ia3_rates: tuple[float, ...] = Field(description="learning rates to choose from, IA³")
    lora_rates: tuple[float, ...] = Field(description="learning rates to choose from, LoRA")
    full_rates: tuple[float, ...] = Field(description="learning rates to choose from, all weights")


class IA3Paper(Contest[Settings]):
    """A language model sees a handful of restaurant descriptions from E2E again and again, and is trained by IA³ (keys,
    values and the inner feed-forward features are scaled), by LoRA on every linear layer and by training all linear
    weights (`delta`), in the same batches, each with its learning rate chosen by the validation loss. The claim shows
    when IA³ is better on test rows than the training of all weights.
    """

    name = "ia3"
    title = "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
    authors = "Liu et al."
    venue = "NeurIPS 2022"
    year = 2022
    arxiv = "2205.05638"
    methods = ("ia3", "lora", "delta")
    claim = (
        "With few examples, learned scales for keys, values and inner feed-forward features do better than training "
        "all weights, with about one parameter in ten thousand."
    )
    figures = (
        Figure("T-Few (IA³ on T0-11B) on RAFT, mean accuracy", "75.8 %", "second-hand: a table of results"),
        Figure("above the state of the art on RAFT", "6 points", "the abstract"),
        Figure("Llama-3.2-3B on GSM8K: IA³ default / LoRA rank 32", "0.311 / 0.478", "PEFT's method comparison"),
    )
    limits = (
        "T0 was trained on many tasks before, so that scales suffice to call up what it can do; nano was not. Accuracy "
        "of a choice between answers, unlikelihood and length terms of the recipe are left out."
    )
    keys = ("method", "rank", "lr")

    small = Settings(
        **SMALL_E2E,
        train_rows=16,
        ia3_rates=(3e-2, 1e-1, 2e-1),
        lora_rates=(4e-3, 1e-2),
        full_rates=(4e-4, 1e-3),
    )
    full = Settings(
        task="t0/glue_mrpc_equivalent",
        model="meta-llama/Llama-3.2-3B",
        dtype="bfloat16",
        device="auto",
        steps=1000,
        batch_size=8,
        max_length=512,
        held_out=500,
        exact=500,
        train_rows=32,
        ia3_rates=(1e-3, 3e-3, 1e-2),
        lora_rates=(5e-5, 1e-4, 3e-4),
        full_rates=(1e-5, 3e-5),
    )
    reduced = Settings(
        **REDUCED_E2E,
        steps=10,
        train_rows=8,
        ia3_rates=(1e-1,),
        lora_rates=(1e-2,),
        full_rates=(6e-4,),
    )

    def contestants(self, settings: Settings) -> Sequence[Contestant]:
        lora = make_method("lora", rank=settings.rank, alpha=2.0 * settings.rank)
        return [
            Contestant({"method": "full"}, make_method("delta"), settings.full_rates),
            Contestant({"method": "lora", "rank": settings.rank}, lora, settings.lora_rates),
            Contestant({"method": "ia3"}, make_method("ia3"), settings.ia3_rates),
        ]

    def judge(self, table: Table) -> Verdict:
        best, measure = self.listed(table), quality(table)
        full, own = best.line(method="full"), best.line(method="ia3")
        mine, theirs, lora = (best.mean(measure.column, method=name) for name in ("ia3", "full", "lora"))
        share = own.cells["parameters"].mean / full.cells["parameters"].mean
        said = f"IA³ trains {share:.2%} of what full fine-tuning trains, and has {measure.column} {mine:.3f} against "
        said += f"{theirs:.3f}; LoRA has {lora:.3f}."
        return Verdict(above(measure.gain(best, dict(own.key), dict(full.key))), said)
