"""VeRA: LoRA's quality with an order of magnitude fewer trained parameters. Checked on digits."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from lorica.methods import make_method
from lorica.papers.base import Figure, Verdict
from lorica.papers.kit.contest import Contest, Contestant
from lorica.papers.kit.judging import above, quality
from lorica.papers.kit.table import Table
from lorica.papers.kit.task import FULL_E2E, TaskSettings

MARGIN = 0.02
"""How much worse than LoRA still counts as its quality: as a share of LoRA's."""
ORDER = 8.0
"""How many times fewer parameters the claim is about, at least."""


class Settings(TaskSettings):
    """A task, and what competes."""

    vera_ranks: tuple[int, ...] = Field((64, 256), description="ranks of VeRA's shared projections")
    lora_ranks: tuple[int, ...] = Field((1, 4, 8), description="ranks of LoRA, alpha = 2 rank; the last is compared")
    vera_rates: tuple[float, ...] = Field(description="learning rates to choose from, VeRA")
    lora_rates: tuple[float, ...] = Field(description="learning rates to choose from, LoRA")


class VeRAPaper(Contest[Settings]):
    """VeRA (two trained vectors a layer around frozen random projections) and LoRA at several ranks learn the same task
    in the same batches, each with its learning rate chosen by the validation loss. The best VeRA is compared with the
    largest LoRA, and has to come within 2 % of it with at least eight times fewer trained parameters. At small scale an
    MLP that has learnt to read handwritten digits learns to read them mirrored.
    """

    name = "vera"
    title = "VeRA: Vector-based Random Matrix Adaptation"
    authors = "Kopiczko, Blankevoort, Asano"
    venue = "ICLR 2024"
    year = 2024
    arxiv = "2310.11454"
    methods = ("vera", "lora")
    claim = "Two vectors a layer around shared random projections do as well as LoRA with ten times the parameters."
    figures = (
        Figure("RoBERTa-large, mean of GLUE: VeRA with 0.061 M / LoRA with 0.8 M parameters", "87.8 / 87.8", "memory"),
        Figure("RoBERTa-base: VeRA with 0.043 M / LoRA with 0.3 M parameters", "85.2 / 86.6", "memory"),
        Figure("Llama-2-7B on MT-Bench: VeRA / LoRA", "5.5 / 5.7", "a table of DoRA's authors"),
    )
    limits = (
        "Two layers share one pair of projections here; in a large model hundreds do. With rank 64 alone and 100 steps "
        "the result was undecided; rank 256, the paper's, and 50 more steps were added after that."
    )
    seeds = 8
    keys = ("method", "rank", "lr")

    small = Settings(
        task="turned-digits",
        width=512,
        steps=150,
        train_rows=300,
        vera_rates=(3e-2, 6e-2, 1e-1, 2e-1),
        lora_rates=(3e-3, 1e-2, 3e-2),
    )
    full = Settings(
        **FULL_E2E,
        vera_ranks=(1024,),
        lora_ranks=(4,),
        vera_rates=(1e-3, 3e-3, 1e-2, 3e-2),
        lora_rates=(1e-4, 2e-4, 5e-4, 1e-3),
    )
    reduced = Settings(
        task="turned-digits",
        train_rows=300,
        width=512,
        steps=100,
        vera_ranks=(256,),
        lora_ranks=(8,),
        vera_rates=(1e-1,),
        lora_rates=(1e-2, 3e-2),
    )

    def contestants(self, settings: Settings) -> Sequence[Contestant]:
        lora = [
            Contestant(
                {"method": "lora", "rank": rank}, make_method("lora", rank=rank, alpha=2.0 * rank), settings.lora_rates
            )
            for rank in settings.lora_ranks
        ]
        vera = [
            Contestant({"method": "vera", "rank": rank}, make_method("vera", rank=rank), settings.vera_rates)
            for rank in settings.vera_ranks
        ]
        return [*lora, *vera]

    def judge(self, table: Table) -> Verdict:
        best, measure = self.listed(table), quality(table)
        lora = best.where(method="lora").lines[-1]
        vera = best.best(self.chosen_by, method="vera")
        gain = measure.gain(
            best, {"method": "vera", "rank": vera.key["rank"]}, {"method": "lora", "rank": lora.key["rank"]}
        )
        fewer = lora.cells["parameters"].mean / vera.cells["parameters"].mean
        mine, theirs = (line.cells[measure.column].mean for line in (vera, lora))
        said = f"VeRA of rank {vera.key['rank']} trains {fewer:.1f} times fewer parameters than LoRA of rank "
        said += f"{lora.key['rank']}, and has {measure.column} {mine:.4f} against {theirs:.4f}."
        equal = above(gain, -MARGIN * abs(theirs))
        return Verdict(equal if fewer >= ORDER else False, said)
