"""LayerNorm tuning: training the norms alone adapts a language model as well as LoRA. Checked on E2E."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from lorica.methods import make_method
from lorica.papers.base import Figure, Verdict
from lorica.papers.kit.contest import Contest, Contestant
from lorica.papers.kit.judging import above, quality
from lorica.papers.kit.table import Table
from lorica.papers.kit.task import FULL_GSM8K, REDUCED_E2E, SMALL_E2E, TaskSettings


class Settings(TaskSettings):
    """A task, and what competes."""

    rank: int = Field(8, ge=1, description="rank of LoRA, alpha = 2 rank")
    norm_rates: tuple[float, ...] = Field(description="learning rates to choose from, norm tuning")
    lora_rates: tuple[float, ...] = Field(description="learning rates to choose from, LoRA")


class LNTuningPaper(Contest[Settings]):
    """A language model is fine-tuned on restaurant descriptions from E2E by training the gains of its norms alone, and
    by LoRA on every linear layer, in the same batches, each with its learning rate chosen by the validation loss. The
    claim shows when norm tuning is better than LoRA, as published.
    """

    name = "ln_tuning"
    title = "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning"
    authors = "Zhao et al."
    venue = "ICLR 2024"
    year = 2024
    arxiv = "2312.11420"
    methods = ("norm", "lora")
    claim = (
        "Training the normalisation layers of a language model, and nothing else inside it, is enough to adapt it to a "
        "new domain, and does better than LoRA with far fewer trained parameters."
    )
    figures = (
        Figure("13B, five multi-modal tasks: gain over LoRA, mean", "over 20 %", "the abstract"),
        Figure("the same, fewer trained parameters / less GPU memory", "41.9 % / 17.6 %", "the abstract"),
        Figure("Llama-3.2-3B on GSM8K at rate 1e-4, 175 K parameters", "0.000", "PEFT's method comparison"),
    )
    limits = (
        "The paper turns language models into multi-modal ones, and trains connector, embeddings and head as well; "
        "here nothing but the norms is trained, on text, for few steps."
    )
    keys = ("method", "rank", "lr")

    small = Settings(
        **SMALL_E2E,
        train_rows=300,
        norm_rates=(3e-2, 1e-1, 2e-1),
        lora_rates=(4e-3, 1e-2),
    )
    full = Settings(
        **FULL_GSM8K,
        model="meta-llama/Llama-3.2-3B",
        steps=5000,
        batch_size=4,
        exact=500,
        rank=32,
        norm_rates=(1e-3, 3e-3, 1e-2, 3e-2),
        lora_rates=(5e-5, 1e-4, 2e-4),
    )
    reduced = Settings(
        **REDUCED_E2E,
        steps=10,
        train_rows=60,
        norm_rates=(1e-1,),
        lora_rates=(1e-2,),
    )

    def contestants(self, settings: Settings) -> Sequence[Contestant]:
        lora = make_method("lora", rank=settings.rank, alpha=2.0 * settings.rank)
        return [
            Contestant({"method": "lora", "rank": settings.rank}, lora, settings.lora_rates),
            Contestant({"method": "norm"}, make_method("norm"), settings.norm_rates),
        ]

    def judge(self, table: Table) -> Verdict:
        best, measure = self.listed(table), quality(table)
        lora, norm = best.line(method="lora"), best.line(method="norm")
        fewer = (lora.cells["parameters"] / norm.cells["parameters"]).mean
        mine, theirs = (line.cells[measure.column].mean for line in (norm, lora))
        said = f"Norm tuning trains {fewer:.0f} times fewer parameters than LoRA of rank {lora.key['rank']}, and has "
        said += f"{measure.column} {mine:.3f} against {theirs:.3f}."
        return Verdict(above(measure.gain(best, dict(norm.key), dict(lora.key))), said)
