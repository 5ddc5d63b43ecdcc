"""AdaLoRA: a budget of singular triplets shared out by importance does as well as equal ranks. Checked on digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from lorica.methods import make_method
from lorica.papers.base import Figure, Say, Verdict
from lorica.papers.kit.arena import COLUMNS, race, rates
from lorica.papers.kit.contest import Contest, Contestant
from lorica.papers.kit.judging import above, average, quality
from lorica.papers.kit.plot import Plot, Series
from lorica.papers.kit.table import Row, Table
from lorica.papers.kit.task import TaskSettings, open_arena

MARGIN = 0.01
"""How much worse than LoRA still counts as not worse: accuracy, or a loss relative to LoRA's."""


class Settings(TaskSettings):
    """A task, the budgets, and what competes."""

    ranks: tuple[int, ...] = Field((2, 8), description="ranks of LoRA, and AdaLoRA's mean rank in the end")
    start: float = Field(1.5, ge=1, description="AdaLoRA's rank at the start over that in the end")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps before anything is pruned")
    final: float = Field(0.3, ge=0, lt=1, description="share of the steps after the choice is made")
    orthogonality: float = Field(0.1, ge=0, description="weight of the penalty, as in the authors' code")
    lora_rates: tuple[float, ...] = Field(description="learning rates to choose from, LoRA")
    adalora_rates: tuple[float, ...] = Field(description="learning rates to choose from, AdaLoRA")


class AdaLoRAPaper(Contest[Settings]):
    """AdaLoRA starts every layer with more triplets than the budget allows and prunes to it; LoRA has the budget's rank
    everywhere. Both learn the same task in the same batches, each with its learning rate chosen by the validation loss.
    `kept` are the triplets of all layers in the end; a second group of rows says how many each layer kept. The claim
    shows when AdaLoRA is at most 0.01 of accuracy (at a language model's task: 1 % of the loss) behind LoRA on the mean
    of the budgets.
    """

    name = "adalora"
    title = "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning"
    authors = "Zhang et al."
    venue = "ICLR 2023"
    year = 2023
    arxiv = "2303.10512"
    methods = ("adalora", "lora")
    claim = (
        "At equal budget, triplets that are shared out between weights by their importance do at least as well as "
        "equal ranks everywhere, most clearly when the budget is small."
    )
    figures = (
        Figure("DeBERTaV3-base, mean of GLUE, 1.3 M parameters: AdaLoRA / LoRA", "about 89.5 / 88.4", "from memory"),
        Figure("Llama-3.2-3B on GSM8K: AdaLoRA 64→32 / LoRA rank 32", "0.373 / 0.478", "PEFT's method comparison"),
    )
    limits = (
        "AdaLoRA trains half again as many parameters until it has pruned. A network of four equal layers has less to "
        "share out than a transformer with its different kinds of weights. A first run, on new classes of digits, was "
        "undecided (+0.0067 ± 0.0104, standard error); turned digits came after that."
    )
    keys = ("method", "rank", "layer", "lr")
    columns: ClassVar = {**COLUMNS, "kept": "singular triplets that are left in the end"}

    small = Settings(
        task="turned-digits",
        width=128,
        depth=4,
        steps=150,
        train_rows=400,
        lora_rates=(2e-3, 6e-3, 1.2e-2, 2e-2, 4e-2),
        adalora_rates=(2e-2, 4e-2, 8e-2, 1.2e-1, 2e-1),
    )
    full = Settings(
        task="t0/glue_mrpc_equivalent",
        model="meta-llama/Llama-3.2-3B",
        dtype="bfloat16",
        device="auto",
        steps=5000,
        batch_size=32,
        held_out=500,
        ranks=(2, 8, 32),
        lora_rates=(5e-5, 1e-4, 2e-4, 5e-4),
        adalora_rates=(5e-4, 1e-3, 2e-3),
    )
    reduced = Settings(
        task="turned-digits",
        width=128,
        depth=3,
        steps=120,
        train_rows=400,
        ranks=(2,),
        lora_rates=(1e-2, 2e-2, 4e-2),
        adalora_rates=(4e-2, 8e-2, 1.2e-1),
    )

    def contestants(self, settings: Settings) -> Sequence[Contestant]:
        found = []
        for rank in settings.ranks:
            lora = make_method("lora", rank=rank, alpha=2.0 * rank)
            found.append(Contestant({"method": "lora", "rank": rank}, lora, settings.lora_rates))
        for rank in settings.ranks:
            first = round(settings.start * rank)
            ada = make_method(
                "adalora",
                rank=first,
                keep=rank / first,
                alpha=2.0 * first,
                warmup=round(settings.warmup * settings.steps),
                final=round(settings.final * settings.steps),
                orthogonality=settings.orthogonality,
            )
            found.append(Contestant({"method": "adalora", "rank": rank}, ada, settings.adalora_rates))
        return found

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        arena = open_arena(settings, seed)
        entries = [e for own in self.contestants(settings) for e in rates(own.key, own.method, own.lrs, own.optimizer)]
        rows = race(arena, entries, steps=settings.steps, seed=seed, say=say)
        layers: list[Row] = []
        for row, adapter in zip(rows, arena.adapters, strict=True):
            if row["method"] == "adalora":
                kept = {site: float(adapter.values(site)["mask"].sum()) for site in adapter.layout.sites}
                row["kept"] = sum(kept.values())
                key: Row = {name: row[name] for name in ("method", "rank", "lr")}
                layers += [{**key, "layer": site, "kept": count} for site, count in kept.items()]
            else:
                row["kept"] = float(row["rank"]) * len(adapter.layout.sites)
        return rows + layers

    def listed(self, table: Table) -> Table:
        """Each contestant at its best learning rate, then the layers of those."""
        best = _whole(table).tuned(self.chosen_by, over="lr")
        chosen = [dict(line.key) for line in best]
        layers = [line for line in table if "layer" in line.key]
        return Table(
            [*best, *(x for x in layers if {k: v for k, v in x.key.items() if k != "layer"} in chosen)], table.keys
        )

    def judge(self, table: Table) -> Verdict:
        best = _whole(self.listed(table))
        measure, ranks = quality(best), best.values("rank")
        keys = [({"method": "adalora", "rank": rank}, {"method": "lora", "rank": rank}) for rank in ranks]
        gain = average([measure.gain(best, ada, lora) for ada, lora in keys])
        scale = 1.0 if measure.largest else average([best.cell(measure.column, **lora) for _, lora in keys]).mean
        said = (
            f"AdaLoRA's {measure.column} is better than LoRA's by {gain.mean:+.4f} ± {gain.error:.4f} (standard error)"
        )
        rank = ranks[0]
        layers = [line for line in self.listed(table).where(rank=rank) if "layer" in line.key]
        most = max(layers, key=lambda line: line.cells["kept"].mean)
        least = min(layers, key=lambda line: line.cells["kept"].mean)
        said += (
            f"; at mean rank {rank} it keeps most in {most.key['layer']} ({most.cells['kept'].mean:.1f}) and least in "
        )
        said += f"{least.key['layer']} ({least.cells['kept'].mean:.1f})."
        return Verdict(above(gain, -MARGIN * scale), said)

    def plots(self, table: Table) -> tuple[Plot, ...]:
        listed = self.listed(table)
        bars = []
        for rank in listed.values("rank"):
            lines = [line for line in listed.where(rank=rank) if "layer" in line.key]
            cells = [line.cells["kept"] for line in lines]
            names = tuple(str(line.key["layer"]) for line in lines)
            bars.append(
                Series(f"mean rank {rank}", names, tuple(c.mean for c in cells), tuple(c.spread for c in cells))
            )
        quality_over, rates_over = super().plots(_whole(table))
        return quality_over, Plot("where AdaLoRA keeps rank", "layer", "triplets kept", tuple(bars)), rates_over


def _whole(table: Table) -> Table:
    """Without the rows of single layers."""
    return Table([line for line in table if "layer" not in line.key], table.keys)
