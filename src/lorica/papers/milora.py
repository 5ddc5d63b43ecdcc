"""MiLoRA: starting from the minor singular directions beats LoRA and PiSSA, and keeps off the principal ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from lorica.methods import make_method
from lorica.papers.base import Figure, Verdict
from lorica.papers.kit.arena import COLUMNS, Arena
from lorica.papers.kit.contest import Contest, Contestant
from lorica.papers.kit.judging import above, average, quality, together
from lorica.papers.kit.plot import Plot
from lorica.papers.kit.spectrum import Principal, changes, mean
from lorica.papers.kit.table import Row, Table
from lorica.papers.kit.task import FULL_GSM8K, TaskSettings


class Settings(TaskSettings):
    """A task, and what competes."""

    ranks: tuple[int, ...] = Field((2, 4, 8), description="ranks of all, alpha = rank")
    directions: int = Field(16, ge=1, description="leading singular directions that count as principal")
    lrs: tuple[float, ...] = Field(description="learning rates to choose from, the same for all")


class MiLoRAPaper(Contest[Settings]):
    """MiLoRA, PiSSA and LoRA at the same ranks, with the same scaling, learn the same task in the same batches, each
    with its learning rate chosen by the validation loss. `touching` is the share of the trained change ΔW, squared,
    that reads from or writes to the leading singular directions of the weight; a change without direction has `chance`.
    The claim shows when MiLoRA is better than both others on the mean of the ranks.
    """

    name = "milora"
    title = "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning"
    authors = "Wang et al."
    venue = "NAACL 2025"
    year = 2025
    arxiv = "2406.09044"
    methods = ("milora", "lora", "pissa")
    claim = (
        "Factors that start from the minor singular directions of each weight, with the principal ones frozen, learn a "
        "task better than LoRA and PiSSA and leave alone what the weight already knows."
    )
    figures = (
        Figure("LLaMA-2-7B, mean of eight commonsense tasks: MiLoRA / LoRA", "79.2 / 77.6", "from memory"),
        Figure("reinforcement learning, six maths benchmarks: MiLoRA / LoRA", "18.0 / 42.5", "arXiv 2512.23165"),
    )
    limits = (
        "The base of digits has seen a few hundred pictures: its minor directions are close to their random start, so "
        "that they hold no long-tail knowledge. Forgetting is not measured. A first run, on new classes of digits, was "
        "undecided as well; turned digits came after that."
    )
    keys = ("method", "rank", "lr")
    columns: ClassVar = {
        **COLUMNS,
        "touching": "share of ‖ΔW‖² in the rows or columns of the leading singular subspace of W₀, mean of the layers",
        "chance": "the same of a change without direction",
    }

    small = Settings(
        task="turned-digits",
        width=128,
        depth=4,
        steps=100,
        train_rows=400,
        lrs=(1e-3, 3e-3, 6e-3, 1.2e-2, 2.5e-2, 5e-2),
    )
    full = Settings(
        **FULL_GSM8K,
        model="meta-llama/Llama-2-7b-hf",
        steps=1400,
        batch_size=16,
        exact=500,
        ranks=(32, 64),
        directions=64,
        lrs=(5e-5, 1e-4, 3e-4),
    )
    reduced = Settings(
        task="turned-digits", width=96, depth=3, steps=50, train_rows=300, ranks=(2, 4), lrs=(6e-3, 1.2e-2, 2.5e-2)
    )

    def contestants(self, settings: Settings) -> Sequence[Contestant]:
        return [
            Contestant({"method": name, "rank": rank}, make_method(name, rank=rank, alpha=float(rank)), settings.lrs)
            for name in ("lora", "pissa", "milora")
            for rank in settings.ranks
        ]

    def inspect(self, settings: Settings, arena: Arena) -> list[Row]:
        principal = Principal(settings.directions)
        found: list[Row] = []
        for adapter in arena.adapters:
            shares = [principal.shares(change) for change in changes(arena.host, adapter)]
            found.append({"touching": mean([s[1] for s in shares]), "chance": mean([s[2] for s in shares])})
        return found

    def judge(self, table: Table) -> Verdict:
        best, measure = self.listed(table), quality(table)
        ranks = best.values("rank")

        def gain(other: str) -> tuple[bool | None, str]:
            cell = average(
                [
                    measure.gain(best, {"method": "milora", "rank": rank}, {"method": other, "rank": rank})
                    for rank in ranks
                ]
            )
            return above(cell), f"{cell.mean:+.4f} ± {cell.error:.4f} over {make_method(other).name}"

        (lora, over_lora), (pissa, over_pissa) = gain("lora"), gain("pissa")
        touching = [
            average([best.cell("touching", method=name, rank=rank) for rank in ranks]).mean
            for name in ("milora", "lora", "pissa")
        ]
        said = f"MiLoRA gains {over_lora} and {over_pissa} (standard error) of {measure.column}; its changes touch the "
        said += (
            f"leading directions with {touching[0]:.0%} of their square, LoRA's with {touching[1]:.0%}, PiSSA's with "
        )
        said += f"{touching[2]:.0%} (chance {best.lines[0].cells['chance'].mean:.0%})."
        both = (lora, pissa)
        return Verdict(together(both), said)

    def plots(self, table: Table) -> tuple[Plot, ...]:
        best = self.listed(table)
        names = [str(name) for name in best.values("method")]
        series = tuple(best.series(name, "rank", "touching", method=name) for name in names)
        chance = best.series("chance", "rank", "chance", method=names[0])
        touching = Plot("the principal directions", "rank", "share of ‖ΔW‖² that touches them", (*series, chance))
        return super().plots(table)[0], touching
