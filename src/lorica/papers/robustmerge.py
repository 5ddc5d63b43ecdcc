"""RobustMerge, beside every other rule: six adapters of six tasks made into one, on their tasks and on unseen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from lorica.adapters.adapter import Adapter
from lorica.adapters.merging import make_merging
from lorica.adapters.merging.combine import combine
from lorica.client.local import Service
from lorica.core.config import Config
from lorica.data.example import Example
from lorica.engine.engine import Item
from lorica.methods.lora import LoRA
from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.arena import OPTIMIZER
from lorica.papers.kit.judging import above, together
from lorica.papers.kit.plot import Plot, Series
from lorica.papers.kit.skills import side_by_side
from lorica.papers.kit.table import Row, Table
from lorica.papers.kit.text import examples, open_model, split

TRAINED = (
    "boolean_expressions",
    "hyperbaton",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "sports_understanding",
)
UNSEEN = ("movie_recommendation", "ruin_names", "snarks", "web_of_lies")
OURS, RIVALS = "robustmerge", ("linear", "ties")
Parts = Mapping[str, Mapping[str, Sequence[Example]]]

STRENGTHS: Mapping[str, tuple[float, ...]] = {
    "task_arithmetic": (0.17, 0.3, 0.6),
    "linear": (0.17, 0.3, 0.6),
    "soup": (0.17, 0.3, 0.6),
    "svd": (0.17, 0.3, 0.6),
    "magnitude_prune": (0.3, 0.6, 1.2),
    "ties": (0.5, 1.0, 2.0),
    "dare": (0.17, 0.3, 0.6),
    "knots": (0.3, 0.6, 1.2),
    "robustmerge": (0.7, 1.0, 1.5, 2.0),
}
"""The one number of each rule that its strength is tuned by: its λ where it has one, else the weight of each parent."""


class Settings(Config):
    """A model, tasks, adapters and the strengths to choose from."""

    model: str = Field("nano", description="a causal language model")
    dtype: str = Field("float32", description="dtype of the base")
    device: str = Field("cpu", description="where it runs")
    trained: tuple[str, ...] = Field(TRAINED, description="BIG-Bench Hard tasks, one adapter each")
    unseen: tuple[str, ...] = Field(UNSEEN, description="tasks that no adapter was trained on")
    max_length: int = Field(128, ge=8, description="most tokens of a row; longer ones are left out")
    validation: int = Field(12, ge=1, description="rows a task that the strength is chosen by")
    test: int = Field(24, ge=1, description="rows a task that nothing is chosen by")
    rank: int = Field(8, ge=1, description="of every adapter, alpha = 2 rank; all start from the same A")
    lr: float = Field(4e-3, gt=0, description="learning rate of every adapter")
    steps: int = Field(60, ge=1, description="optimiser steps of every adapter")
    batch_size: int = Field(4, ge=1, description="rows of one step and adapter")
    strengths: dict[str, tuple[float, ...]] = Field(
        dict(STRENGTHS), description="rules, each with the strengths to choose from"
    )


class RobustMergePaper(PaperCheck[Settings]):
    """Six LoRA adapters of one model, each trained on one task of BIG-Bench Hard in joint mixed batches, are merged by
    every rule. Each rule has one number of strength (its λ, or the weight of each parent), which is chosen on held-out
    rows of the six tasks; all else stands at the rule's defaults. Measured is the loss of the answers on other rows of
    these tasks and on four tasks that nothing was trained on, beside the base and beside the adapters themselves
    (`own`: each on its own task; unseen tasks: the mean of all six). The claim has two parts, and shows when both hold:
    RobustMerge's mean loss is below that of `linear` and below that of `ties` on the six tasks, and on the unseen ones.
    """

    name = "robustmerge"
    title = "RobustMerge: Parameter-Efficient Model Merging for MLLMs with Direction Robustness"
    authors = "Zeng et al."
    venue = "NeurIPS 2025"
    year = 2025
    arxiv = "2502.17159"
    methods = ("lora",)
    claim = (
        "Merging adapters with pruning and rescaled rank directions, without training, beats earlier rules of merging "
        "on the tasks that were merged and on unseen ones."
    )
    figures = (
        Figure("gain over the best earlier rule, eight seen tasks", "3.4 points", "second-hand: notes of others"),
        Figure("gain over the best earlier rule, four unseen tasks", "4.5 points", "second-hand: notes of others"),
    )
    limits = (
        "The paper merges adapters of a vision-language model of seven billion weights; here a small language model "
        "learns mostly how the answers of a task look, and losses are small for that reason. Loss is not accuracy. "
        "Rules differ by less than tasks do. Of most rules, `linear` and `ties` among them, the best strength was the "
        "lowest of the grid, so they might do better still. An earlier start with more rows and strengths was given up "
        "for time after its first rule."
    )
    keys = ("rule", "strength")
    columns: ClassVar = {
        "validation loss": "of answers, mean over the trained tasks; what the strength is chosen by",
        "seen loss": "of answers, mean over the trained tasks, nats a token",
        "unseen loss": "of answers, mean over the unseen tasks, nats a token",
        "rank": "largest rank of a site's change, 0 where it is kept dense",
        **dict.fromkeys(TRAINED, "test loss of this trained task"),
        **dict.fromkeys(UNSEEN, "test loss of this unseen task"),
    }

    small = Settings()
    full = Settings(
        model="meta-llama/Llama-3.2-3B",
        dtype="bfloat16",
        device="auto",
        max_length=512,
        test=100,
        rank=16,
        lr=2e-4,
        steps=200,
        batch_size=8,
    )
    reduced = Settings(
        trained=TRAINED[:3],
        unseen=UNSEEN[-1:],
        validation=4,
        test=6,
        steps=12,
        strengths={"linear": (0.3,), "ties": (1.0,), "robustmerge": (2.0,)},
    )

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        service, parts = prepared(settings, seed)
        adapters = trained(service, settings, parts, seed, say)
        own = {task: tested(service, adapters[task], {task: parts[task]})[task] for task in settings.trained}
        unseen = {task: parts[task] for task in settings.unseen}
        strange = [tested(service, adapter, unseen) for adapter in adapters.values()]
        own |= {task: sum(found[task] for found in strange) / len(strange) for task in settings.unseen}
        rows = [
            summed({"rule": "base"}, settings, tested(service, None, parts)),
            summed({"rule": "own"}, settings, own),
        ]
        for rule, strengths in settings.strengths.items():
            for strength in strengths:
                rows.append(merged(service, settings, parts, list(adapters.values()), rule, strength))
            best = min(float(row["validation loss"]) for row in rows[-len(strengths) :])
            say(f"seed {seed}: {rule}, best validation loss {best:.3f}")
        return rows

    def listed(self, table: Table) -> Table:
        return table.tuned("validation loss", over="strength")

    def judge(self, table: Table) -> Verdict:
        best = self.listed(table)
        parts = [
            above(best.cell(part, rule=rival) - best.cell(part, rule=OURS))
            for part in ("seen loss", "unseen loss")
            for rival in RIVALS
        ]
        said = " and ".join(
            f"{best.mean(f'{part} loss', rule=OURS):.3f} by RobustMerge, "
            + ", ".join(f"{best.mean(f'{part} loss', rule=rival):.3f} by {rival}" for rival in RIVALS)
            + f" ({best.mean(f'{part} loss', rule='base'):.3f} without an adapter) on {part} tasks"
            for part in ("seen", "unseen")
        )
        seen = [line for line in best if line.key["rule"] not in ("base", "own")]
        first = min(seen, key=lambda line: line.cells["seen loss"].mean).key["rule"]
        return Verdict(together(parts), f"The loss is {said}. Of all rules {first} is best on seen tasks.")

    def plots(self, table: Table) -> tuple[Plot, ...]:
        best, panels = self.listed(table), []
        for part in ("seen", "unseen"):
            found = [(str(line.key["rule"]), line.cells[f"{part} loss"]) for line in best]
            bars = Series(
                "", tuple(n for n, _ in found), tuple(c.mean for _, c in found), tuple(c.spread for _, c in found)
            )
            panels.append(Plot(f"{part} tasks", "rule", "loss, nats a token", (bars,)))
        return tuple(panels)


def prepared(settings: Settings, seed: int) -> tuple[Service, Parts]:
    """The model, and for each task its rows in three parts; unseen tasks have test rows alone."""
    backbone, renderer = open_model(settings.model, dtype=settings.dtype, device=settings.device)
    learnt = {"train": None, "validation": settings.validation, "test": settings.test}
    counts: dict[str, dict[str, int | None]] = dict.fromkeys(settings.trained, learnt)
    counts |= {task: {"test": settings.test} for task in settings.unseen}
    parts = {
        task: split(examples(f"bbh/{task}", renderer, settings.max_length), own, seed, task)
        for task, own in counts.items()
    }
    return Service(backbone), parts


def trained(service: Service, settings: Settings, parts: Parts, seed: int, say: Say) -> dict[str, Adapter]:
    """An adapter for each task."""
    adapters, losses = side_by_side(
        service,
        {task: parts[task]["train"] for task in settings.trained},
        LoRA(rank=settings.rank, alpha=2.0 * settings.rank),
        OPTIMIZER.replace(lr=settings.lr),
        steps=settings.steps,
        batch_size=settings.batch_size,
        seed=seed,
    )
    say(f"seed {seed}: trained; last losses " + ", ".join(f"{task} {loss:.3f}" for task, loss in losses.items()))
    return adapters


def merged(
    service: Service, settings: Settings, parts: Parts, parents: Sequence[Adapter], rule: str, strength: float
) -> Row:
    """The row of one rule at one strength."""
    made, adapter_rank = _combined(service, parents, rule, strength)
    try:
        row = summed({"rule": rule, "strength": strength, "rank": adapter_rank}, settings, tested(service, made, parts))
        chosen = {task: {"test": parts[task]["validation"]} for task in settings.trained}
        found = tested(service, made, chosen)
        return {**row, "validation loss": sum(found.values()) / len(found)}
    finally:
        service.host.delete(made.name)


def _combined(service: Service, parents: Sequence[Adapter], rule: str, strength: float) -> tuple[Adapter, int]:
    parameters: dict[str, Any] = {}
    weights: list[float] | None = None
    chosen = make_merging(rule)
    if "scale" in type(chosen).model_fields:
        parameters["scale"] = strength
    else:
        weights = [strength] * len(parents)
    made, report = combine(parents, service.host.backbone, chosen.replace(**parameters), weights)
    return service.host.put(made), report.highest


def tested(service: Service, adapter: Adapter | None, parts: Parts) -> dict[str, float]:
    """The loss of each task's test rows, nats a token of the answers."""
    found = {}
    for task, own in parts.items():
        rows = own["test"]
        results = service.engine.forward([Item(row, adapter) for row in rows])
        found[task] = sum(result.loss for result in results) / sum(row.trained for row in rows)
    return found


def summed(key: Row, settings: Settings, losses: Mapping[str, float]) -> Row:
    """A row with the means over trained and over unseen tasks."""

    def mean(tasks: Sequence[str]) -> float:
        return sum(losses[task] for task in tasks) / len(tasks)

    return {**key, **losses, "seen loss": mean(settings.trained), "unseen loss": mean(settings.unseen)}
