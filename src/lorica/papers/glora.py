"""GLoRA: a searched configuration beats LoRA, and any one form for all layers, at the same number of parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from lorica.core.glora_choices import Choice
from lorica.core.site import Site
from lorica.methods.base import Method
from lorica.methods.glora import GLoRA
from lorica.methods.lora import LoRA
from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.arena import COLUMNS, Arena, race, rates
from lorica.papers.kit.judging import above, average, quality
from lorica.papers.kit.plot import Plot
from lorica.papers.kit.table import Cell, Row, Table
from lorica.papers.kit.task import TaskSettings, open_arena
from lorica.recipes.evolution import Evolution, EvolutionConfig, Genome
from lorica.recipes.glora_search import set_choices

SEARCHED, ALONE, LORA, RANDOM, SINGLE = "searched", "searched, alone", "lora", "random", "all: "


class Settings(TaskSettings):
    """A task, budgets, what competes, and the search."""

    budgets: tuple[int, ...] = Field((512, 1024, 2048), description="most trained parameters")
    rank: int = Field(4, ge=1, description="rank of the supernet's pairs")
    supernet_steps: int = Field(1500, ge=1, description="optimiser steps of the supernet, whose forms share them")
    singles: tuple[str, ...] = Field(
        (
            "none,lora,none,none,none",
            "vector,lora,none,none,vector",
            "lora,none,none,none,none",
        ),
        description="forms that all layers share, at the largest rank within the budget",
    )
    random: int = Field(2, ge=0, description="random configurations within each budget, for comparison")
    lrs: tuple[float, ...] = Field((1e-2, 3e-2, 1e-1), description="learning rates to choose from, the same for all")
    evolution: EvolutionConfig = Field(
        EvolutionConfig(population=40, keep=8, mutations=20, crossovers=15, generations=8),
        description="the search; its budget and seed are set for each run",
    )


class GLoRAPaper(PaperCheck[Settings]):
    """A supernet of all 432 forms a layer is trained, one random form a layer at each step. For each budget an
    evolutionary search picks the configuration with the least validation loss under the supernet's values
    (`searched`); the same configuration is also trained from scratch (`searched, alone`). Against it, with as many
    steps as the latter and the same batches, each at the largest rank within the budget: LoRA, single forms for all
    layers, and random configurations. Learning rates are chosen by the validation loss; nothing is chosen by test rows.
    The claim shows when the searched configuration, with the supernet's values or alone, whichever has the lower
    validation loss, beats LoRA on the mean of the budgets.
    """

    name = "glora"
    title = "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning"
    authors = "Chavan et al."
    venue = "preprint"
    year = 2023
    arxiv = "2306.07967"
    methods = ("glora", "lora")
    claim = (
        "Scaling and shifting both weights and biases, in a form that is searched for layer by layer, adapts better "
        "than LoRA with as many parameters."
    )
    figures = (
        Figure("LLaMA-7B on Alpaca, mean of four benchmarks: GLoRA / LoRA", "50.8 / 49.8", "the authors' README"),
        Figure("LLaMA-7B on ShareGPT, the same", "52.7 / 51.2", "the authors' README"),
    )
    limits = (
        "The published search scores configurations on the test data, which is not repeated here. Four layers have "
        "fewer configurations to choose among than a transformer, and a supernet that is trained shortly ranks them "
        "less well. In a small ReLU network forms with a constant can switch a layer off in training, which is what "
        "happens to most random configurations, and to some that were searched when they are trained alone. Before "
        "these settings one seed was run with 2,000 steps of the supernet: LoRA was better by 0.056. The best rate of "
        "the supernet is the lowest of the grid."
    )
    keys = ("budget", "method", "lr")
    columns: ClassVar = COLUMNS

    small = Settings(width=64, depth=4, steps=200, train_rows=200)
    full = Settings(
        task="t0/glue_mrpc_equivalent",
        model="huggyllama/llama-7b",
        dtype="bfloat16",
        device="auto",
        steps=3000,
        supernet_steps=10_000,
        batch_size=16,
        held_out=400,
        budgets=(2_000_000, 8_000_000),
        lrs=(3e-5, 1e-4, 3e-4),
        evolution=EvolutionConfig(),
    )
    reduced = Settings(
        width=32,
        depth=3,
        steps=60,
        supernet_steps=300,
        train_rows=300,
        budgets=(400,),
        lrs=(1e-2, 3e-2),
        singles=("none,lora,none,none,none",),
        random=1,
        evolution=EvolutionConfig(population=20, keep=5, mutations=10, crossovers=8, generations=4),
    )

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        arena = open_arena(settings, seed)
        searched: dict[int, list[tuple[Row, Genome]]] = {budget: [] for budget in settings.budgets}
        for lr in settings.lrs:
            entries = rates({"method": SEARCHED}, GLoRA(rank=settings.rank, supernet=True), (lr,))
            (trained,) = race(arena, entries, steps=settings.supernet_steps, seed=seed, say=say, parts=("validation",))
            for budget in settings.budgets:
                row, genome = search(settings, arena, budget, seed)
                shown = {"budget": budget, **row, "train loss": trained["train loss"], "method": SEARCHED, "lr": lr}
                searched[budget].append((shown, genome))
                say(f"seed {seed}: lr {lr:g}, budget {budget}: found {', '.join(map(str, genome))}")
        sites = list(arena.adapters[0].layout.sites.values())
        rows = [row for found in searched.values() for row, _ in found]
        entries = []
        for budget, found in searched.items():
            best = min(found, key=lambda pair: float(pair[0]["validation loss"]))[1]
            for label, method in contestants(settings, sites, budget, best, seed):
                entries += rates({"budget": budget, "method": label}, method, settings.lrs)
        return [*rows, *race(arena, entries, steps=settings.steps, seed=seed, say=say)]

    def listed(self, table: Table) -> Table:
        return table.tuned("validation loss", over="lr")

    def judge(self, table: Table) -> Verdict:
        best, measure = self.listed(table), quality(table)
        budgets = [int(budget) for budget in best.values("budget")]
        names = [str(name) for name in best.values("method")]
        mine = [better(best, budget, (SEARCHED, ALONE)) for budget in budgets]

        def over(others: Sequence[str]) -> list[Cell]:
            """By how much the searched configuration is better than another, budget by budget."""
            pairs = zip(budgets, mine, others, strict=True)
            return [measure.gain(best, {"budget": b, "method": m}, {"budget": b, "method": n}) for b, m, n in pairs]

        each = over([LORA] * len(budgets))
        single = average(over([better(best, budget, only(names, SINGLE)) for budget in budgets]))
        won, drawn = average(each), only(names, RANDOM)
        apart = ", ".join(f"{gain.mean:+.4f} at {budget:,}" for budget, gain in zip(budgets, each, strict=True))
        said = f"Over LoRA the searched configuration gains {won.mean:+.4f} ± {won.error:.4f} (standard error) in "
        said += f"{measure.column} on the mean of {len(budgets)} budgets ({apart} parameters), and over the best form "
        said += f"shared by all layers {single.mean:+.4f}"
        if drawn:
            luck = average([average(over([name] * len(budgets))) for name in drawn])
            said += f"; over random configurations {luck.mean:+.4f} ± {luck.error:.4f}"
        return Verdict(above(won), f"{said}.")

    def plots(self, table: Table) -> tuple[Plot, ...]:
        best, measure = self.listed(table), quality(table)
        names = [str(name) for name in best.values("method")]
        singles = only(names, SINGLE)

        def panel(title: str, chosen: Sequence[str]) -> Plot:
            series = tuple(best.series(name, "budget", measure.column, method=name) for name in chosen)
            return Plot(title, "most trained parameters", measure.column, series, log_x=True)

        return (
            panel("search and chance", [name for name in names if name not in singles]),
            panel("search and one form for all layers", [SEARCHED, LORA, *singles]),
        )


def only(names: Sequence[str], kind: str) -> list[str]:
    """The methods of a kind, by the word that their names begin with."""
    return [name for name in names if name.startswith(kind)]


def better(best: Table, budget: int, names: Sequence[str]) -> str:
    """Which of these has the lowest mean validation loss within a budget."""
    lines = [line for line in best.where(budget=budget) if line.key["method"] in names]
    return str(Table(lines, best.keys).best("validation loss").key["method"])


def search(settings: Settings, arena: Arena, budget: int, seed: int) -> tuple[Row, Genome]:
    """The best configuration within a budget under the values of the arena's supernet, and its scores."""
    (supernet,) = arena.adapters
    names, sites = list(supernet.layout.sites), list(supernet.layout.sites.values())
    evolution = Evolution(settings.evolution.replace(largest=budget, seed=seed), sites, settings.rank)

    def scored(genome: Genome, part: str) -> dict[str, float]:
        set_choices(supernet, dict(zip(names, genome, strict=True)))
        return arena.score(part)[0]

    best = evolution.run(lambda genome: -scored(genome, "validation")["validation loss"]).best
    row: Row = {"parameters": best.parameters, "share": best.parameters / arena.base_parameters()}
    return {**row, **scored(best.genome, "validation"), **scored(best.genome, "test")}, best.genome


def contestants(
    settings: Settings, sites: Sequence[Site], budget: int, found: Genome, seed: int
) -> list[tuple[str, Method]]:
    """What competes with the search within a budget, each at the largest rank that fits; absent where none does."""
    listed: list[tuple[str, Method]] = [(ALONE, fixed(found, sites, settings.rank))]
    chance = Evolution(settings.evolution.replace(largest=budget, seed=seed + 1000), sites, settings.rank)
    listed += [(f"{RANDOM} {n + 1}", fixed(chance.random(), sites, settings.rank)) for n in range(settings.random)]
    for form in settings.singles:
        rank = largest(Choice.parse(form), sites, budget)
        if rank:
            listed.append((f"{SINGLE}{form}", GLoRA(rank=rank, choice=form)))
    rank = largest(Choice("none", "lora", "none", "none", "none"), sites, budget)
    return [*listed, (LORA, LoRA(rank=rank, alpha=float(rank)))] if rank else listed


def fixed(genome: Genome, sites: Sequence[Site], rank: int) -> GLoRA:
    """The method whose every site has its choice; longer names first, as a name may be the end of another."""
    pairs = sorted(zip(sites, genome, strict=True), key=lambda pair: -len(pair[0].name))
    return GLoRA(rank=rank, choices=tuple((re.escape(site.name), str(choice)) for site, choice in pairs))


def largest(choice: Choice, sites: Sequence[Site], budget: int) -> int:
    """The largest rank at which a form of all sites fits a budget; 0 where none does."""
    most = min(min(site.shape[:2]) for site in sites)
    fitting = (r for r in range(most, 0, -1) if sum(choice.trained(site, r) for site in sites) <= budget)
    return next(fitting, 0)
