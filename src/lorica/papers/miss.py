"""MiSS: one matrix shared by all blocks of the input does better than LoRA at equal parameters. On E2E."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from lorica.methods import make_method
from lorica.papers.base import Figure, Verdict
from lorica.papers.kit.contest import Contest, Contestant
from lorica.papers.kit.judging import above, average, quality
from lorica.papers.kit.table import Table
from lorica.papers.kit.task import FULL_GSM8K, SMALL_E2E, TaskSettings


class Settings(TaskSettings):
    """A task, and what competes."""

    lora_ranks: tuple[int, ...] = Field((4, 8, 16), description="ranks of LoRA, alpha = 2 rank")
    miss_ranks: tuple[int, ...] = Field(
        (8, 16, 32), description="ranks of MiSS, each compared with the LoRA at its place; about as many parameters"
    )
    lora_rates: tuple[float, ...] = Field(description="learning rates to choose from, LoRA")
    miss_rates: tuple[float, ...] = Field(description="learning rates to choose from, both forms of MiSS")


class MiSSPaper(Contest[Settings]):
    """MiSS, its form `bat` (the shared matrix goes through blocks of the weight) and LoRA with about as many trained
    parameters learn the same task in the same batches, each with its learning rate chosen by the validation loss. The
    claim shows when MiSS is better than LoRA on the mean of the pairs.
    """

    name = "miss"
    title = "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing"
    authors = "Kang, Yin"
    venue = "preprint"
    year = 2024
    arxiv = "2409.15371"
    methods = ("miss", "lora")
    claim = (
        "A single trained matrix that all blocks of the input share learns faster and ends better than LoRA with as "
        "many parameters, for less memory and time."
    )
    figures = (
        Figure("Llama-3.2-3B on GSM8K, 7.3 M parameters: MiSS bat / MiSS", "0.504 / 0.487", "PEFT's method comparison"),
        Figure("the same, LoRA of rank 32, 9.2 M parameters", "0.478", "PEFT's method comparison"),
        Figure("the same, peak memory: MiSS / LoRA", "20.3 / 22.3 GB", "PEFT's method comparison"),
        Figure("reinforcement learning, six maths benchmarks: MiSS / LoRA", "43.4 / 42.5", "arXiv 2512.23165"),
    )
    limits = (
        "A run of minutes on a small model says little about where long training ends. Digits were tried first, where "
        "the first layer sums blocks of pixels: there MiSS was behind LoRA, by 0.03 of accuracy on new classes and by "
        "about 0.1 on turned digits. Text came after that. Memory and time are measured by the benchmarks."
    )
    keys = ("method", "rank", "lr")

    small = Settings(
        **SMALL_E2E,
        train_rows=300,
        lora_ranks=(8,),
        miss_ranks=(16,),
        lora_rates=(5e-3, 1e-2),
        miss_rates=(5e-3, 1e-2),
    )
    full = Settings(
        **FULL_GSM8K,
        model="meta-llama/Llama-3.2-3B",
        steps=5000,
        batch_size=4,
        exact=500,
        lora_ranks=(32,),
        miss_ranks=(64,),
        lora_rates=(5e-5, 1e-4, 2e-4),
        miss_rates=(2e-5, 5e-5, 1e-4, 2e-4),
    )
    reduced = Settings(
        task="turned-digits",
        width=96,
        depth=3,
        steps=50,
        train_rows=300,
        lora_ranks=(4,),
        miss_ranks=(8,),
        lora_rates=(1.2e-2, 2.5e-2),
        miss_rates=(6e-3, 1.2e-2),
    )

    def contestants(self, settings: Settings) -> Sequence[Contestant]:
        found = []
        for rank in settings.lora_ranks:
            lora = make_method("lora", rank=rank, alpha=2.0 * rank)
            found.append(Contestant({"method": "lora", "rank": rank}, lora, settings.lora_rates))
        for label, form in (("miss", "full"), ("miss bat", "bat")):
            for rank in settings.miss_ranks:
                miss = make_method("miss", rank=rank, form=form)
                found.append(Contestant({"method": label, "rank": rank}, miss, settings.miss_rates))
        return found

    def judge(self, table: Table) -> Verdict:
        best, measure = self.listed(table), quality(table)

        def gain(label: str) -> tuple[bool | None, str]:
            pairs = zip(best.where(method=label), best.where(method="lora"), strict=True)
            cell = average([measure.gain(best, dict(own.key), dict(lora.key)) for own, lora in pairs])
            return above(cell), f"{cell.mean:+.4f} ± {cell.error:.4f}"

        (shows, plain), (_, bat) = gain("miss"), gain("miss bat")
        said = f"At about equal parameters MiSS gains {plain} (standard error) of {measure.column} over LoRA, and its "
        return Verdict(shows, f"{said}form bat {bat}.")
