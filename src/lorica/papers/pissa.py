"""PiSSA: starting from the principal directions of the weights converges faster than LoRA. Checked on digits."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from lorica.methods import make_method
from lorica.papers.base import Figure, Verdict
from lorica.papers.kit.contest import Contest, Contestant
from lorica.papers.kit.judging import above, average, quality, together
from lorica.papers.kit.table import Table
from lorica.papers.kit.task import FULL_GSM8K, TaskSettings


class Settings(TaskSettings):
    """A task, and what competes."""

    ranks: tuple[int, ...] = Field((2, 4, 8), description="ranks of both, alpha = rank")
    lrs: tuple[float, ...] = Field(description="learning rates to choose from, the same for both")


class PiSSAPaper(Contest[Settings]):
    """PiSSA and LoRA at the same ranks, with the same scaling, on the same layers, in the same batches. The learning
    rate of each rank of each method is chosen by the validation loss. The claim has two halves, and shows when both
    hold on the mean of the ranks: a lower training loss after the same steps, and better quality on test rows. At small
    scale an MLP that has learnt to read handwritten digits learns to read them mirrored.
    """

    name = "pissa"
    title = "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models"
    authors = "Meng, Wang, Zhang"
    venue = "NeurIPS 2024"
    year = 2024
    arxiv = "2404.02948"
    methods = ("pissa", "lora")
    claim = (
        "Factors that start from the principal singular directions of each weight converge faster than LoRA's, and end "
        "better at equal rank."
    )
    figures = (
        Figure("Mistral-7B on GSM8K, rank 128: PiSSA / LoRA", "72.86 / 67.7", "the authors' README"),
        Figure("LLaMA-2-7B in 4 bits on GSM8K: QPiSSA / QLoRA / LoftQ", "49.13 / 39.8 / 40.71", "the authors' README"),
    )
    limits = (
        "The published runs share one learning rate between both methods. Here each has its own; the last sentence of "
        "the result is about a shared one. A small MLP's weights are far less dominated by their principal directions "
        "than a language model's. With three seeds it was undecided; eight were set after that."
    )
    seeds = 8
    keys = ("method", "rank", "lr")

    small = Settings(task="turned-digits", lrs=(3e-3, 1e-2, 3e-2, 6e-2), width=256, steps=100, train_rows=300)
    full = Settings(
        **FULL_GSM8K,
        model="mistralai/Mistral-7B-v0.1",
        steps=470,
        batch_size=128,
        exact=200,
        ranks=(128,),
        lrs=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4),
    )
    reduced = Settings(task="turned-digits", lrs=(1e-2, 3e-2), width=128, steps=50, ranks=(2, 4), train_rows=300)

    def contestants(self, settings: Settings) -> Sequence[Contestant]:
        return [
            Contestant({"method": name, "rank": rank}, make_method(name, rank=rank, alpha=float(rank)), settings.lrs)
            for name in ("lora", "pissa")
            for rank in settings.ranks
        ]

    def judge(self, table: Table) -> Verdict:
        best, measure = self.listed(table), quality(table)
        keys = [({"method": "pissa", "rank": rank}, {"method": "lora", "rank": rank}) for rank in best.values("rank")]
        faster = average([best.cell("train loss", **lora) - best.cell("train loss", **mine) for mine, lora in keys])
        better = average([measure.gain(best, mine, lora) for mine, lora in keys])
        said = f"PiSSA's training loss is lower by {faster.mean:+.4f} ± {faster.error:.4f} (standard error), and its "
        said += f"{measure.column} better by {better.mean:+.4f} ± {better.error:.4f}."
        lowest = min(float(lr) for lr in table.values("lr"))
        early = average(
            [
                table.cell("train loss", **lora, lr=lowest) - table.cell("train loss", **mine, lr=lowest)
                for mine, lora in keys
            ]
        )
        said += (
            f" With one shared rate, the lowest, its training loss is lower by {early.mean:+.3f} ± {early.error:.3f}."
        )
        halves = [above(faster), above(better)]
        return Verdict(together(halves), said)
