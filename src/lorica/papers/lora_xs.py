"""LoRA-XS: a small matrix between frozen singular directions matches LoRA with far fewer parameters. On digits."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from lorica.methods import make_method
from lorica.papers.base import Figure, Verdict
from lorica.papers.kit.contest import Contest, Contestant
from lorica.papers.kit.judging import above, quality
from lorica.papers.kit.table import Table
from lorica.papers.kit.task import FULL_GSM8K, TaskSettings

MARGIN = 0.02
"""How much worse than LoRA still counts as matching it: as a share of LoRA's result."""
FEWER = 8.0
"""How many times fewer parameters the claim is about, at least."""


class Settings(TaskSettings):
    """A task, and what competes."""

    xs_ranks: tuple[int, ...] = Field((8, 16, 24), description="ranks of LoRA-XS, alpha = rank")
    lora_ranks: tuple[int, ...] = Field((1, 4, 8), description="ranks of LoRA, alpha = 2 rank; the last is compared")
    xs_rates: tuple[float, ...] = Field(description="learning rates to choose from, LoRA-XS")
    lora_rates: tuple[float, ...] = Field(description="learning rates to choose from, LoRA")


class LoRAXSPaper(Contest[Settings]):
    """LoRA-XS at several ranks and LoRA at several ranks learn the same task in the same batches, each with its
    learning rate chosen by the validation loss. The LoRA-XS with the best validation loss among those with at least
    eight times fewer trained parameters than the largest LoRA has to come within 2 % of it.
    """

    name = "lora_xs"
    title = "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters"
    authors = "Bałazy et al."
    venue = "ECAI 2025"
    year = 2025
    arxiv = "2405.17604"
    methods = ("lora_xs", "lora")
    claim = (
        "A trained r × r matrix between the leading singular vectors of each weight matches LoRA with ten to a hundred "
        "times fewer trained parameters."
    )
    figures = (
        Figure("fewer parameters to store than LoRA, 7B models", "over 100 times", "the abstract"),
        Figure("RoBERTa-large on GLUE, parameters: LoRA-XS / LoRA", "60 K / 800 K", "second-hand: a summary"),
        Figure("LLaMA-3-8B, commonsense, parameters: LoRA-XS / LoRA", "3.67 M / 57 M", "second-hand: a summary"),
    )
    limits = (
        "The saving grows with width, and these layers are narrow. The singular directions of a small network hold "
        "less than those of a language model; the frozen factors are not counted, as in the paper. A first run, on new "
        "classes of digits, was undecided (0.933 against LoRA's 0.957); turned digits came after that."
    )
    keys = ("method", "rank", "lr")

    small = Settings(
        task="turned-digits",
        width=256,
        depth=3,
        steps=150,
        train_rows=400,
        xs_rates=(1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1),
        lora_rates=(3e-3, 6e-3, 1.2e-2, 2.5e-2, 5e-2),
    )
    full = Settings(
        **FULL_GSM8K,
        model="mistralai/Mistral-7B-v0.1",
        steps=1500,
        batch_size=64,
        exact=500,
        xs_ranks=(16, 32, 64),
        lora_ranks=(64,),
        xs_rates=(1e-3, 2e-3, 4e-3),
        lora_rates=(5e-5, 1e-4, 2e-4),
    )
    reduced = Settings(
        task="turned-digits",
        width=256,
        steps=80,
        train_rows=300,
        xs_ranks=(16,),
        lora_ranks=(8,),
        xs_rates=(4e-2, 8e-2),
        lora_rates=(1.2e-2, 2.5e-2),
    )

    def contestants(self, settings: Settings) -> Sequence[Contestant]:
        lora = [
            Contestant(
                {"method": "lora", "rank": rank}, make_method("lora", rank=rank, alpha=2.0 * rank), settings.lora_rates
            )
            for rank in settings.lora_ranks
        ]
        small = [
            Contestant(
                {"method": "lora_xs", "rank": rank},
                make_method("lora_xs", rank=rank, alpha=float(rank)),
                settings.xs_rates,
            )
            for rank in settings.xs_ranks
        ]
        return [*lora, *small]

    def judge(self, table: Table) -> Verdict:
        best, measure = self.listed(table), quality(table)
        lora = best.where(method="lora").lines[-1]
        most = lora.cells["parameters"].mean / FEWER
        few = Table([x for x in best.where(method="lora_xs") if x.cells["parameters"].mean <= most], best.keys)
        if not len(few):
            return Verdict(None, f"No LoRA-XS has {FEWER:g} times fewer parameters than LoRA.")
        own = few.best(self.chosen_by)
        fewer = lora.cells["parameters"].mean / own.cells["parameters"].mean
        mine, theirs = (line.cells[measure.column].mean for line in (own, lora))
        said = f"LoRA-XS of rank {own.key['rank']} trains {fewer:.1f} times fewer parameters than LoRA of rank "
        said += f"{lora.key['rank']}, and has {measure.column} {mine:.4f} against {theirs:.4f}."
        return Verdict(above(measure.gain(best, dict(own.key), dict(lora.key)), -MARGIN * abs(theirs)), said)
