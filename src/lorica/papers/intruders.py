"""LoRA brings intruder dimensions that full fine-tuning does not, and they cost what the base knew. Checked on code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from lorica.adapters.analysis.bases import Bases
from lorica.adapters.analysis.intruders import Intruders, Search, find_intruders
from lorica.adapters.analysis.rescale import rescale_intruders
from lorica.methods import make_method
from lorica.papers import learns_less
from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.arena import COLUMNS, Entry, race, rates
from lorica.papers.kit.judging import above, average, together
from lorica.papers.kit.plot import Plot, Series
from lorica.papers.kit.table import Cell, Line, Row, Table
from lorica.papers.kit.text import TextArena
from lorica.recipes.forgetting import Sets, measure_forgetting

FACTOR = 0.75
"""The scaling at which forgetting is traded against the task; PEFT's default."""


class Settings(learns_less.Settings):
    """What is learnt, what is forgotten, what competes, and what counts as an intruder."""

    ranks: tuple[int, ...] = Field((1, 8, 64), description="ranks of LoRA, alpha = 2 rank")
    lora_rates: tuple[float, ...] = Field(
        (2.4e-2, 4.8e-2), description="learning rates to choose from at rank 1; at rank r divided by the root of r"
    )
    full_rates: tuple[float, ...] = Field((2e-3, 4e-3), description="learning rates to choose from, all weights")
    steps: int = Field(28, ge=1, description="optimiser steps")
    top: int = Field(10, ge=1, description="k: leading singular vectors of each tuned weight that are looked at")
    threshold: float = Field(0.5, gt=0, le=1, description="ε: an intruder's largest |cos| to the base is below it")
    held_out: int = Field(
        32, ge=1, description="rows of the target to choose by, and as many to test; rows of a source"
    )
    scales: tuple[float, ...] = Field(
        (0.5, FACTOR, 1.25), description="what intruders are multiplied by; 1 is the adapter itself"
    )


class IntrudersPaper(PaperCheck[Settings]):
    """A language model learns source code of Python's standard library, by LoRA at several ranks on every linear layer
    and by training all these weights (`full`, which is `delta`); the learning rate of each is chosen by the validation
    loss. Of every tuned weight the ten leading left singular vectors are compared with all of the base's: one whose
    largest |cos| is below 0.5 is an intruder. Then the intruders of each adapter, at its seed's best rate, are scaled
    in place (exactly: nothing is cut to a rank), and gain on held-out code and forgetting of rows like the base's own
    data are measured again. Two parts, fixed before the first run, must hold on the mean of the ranks: LoRA has more
    intruders than full fine-tuning; and scaling them by 0.75 takes away a larger share of what was forgotten than of
    what was gained. How the count goes with the rank is told and not judged.
    """

    name = "intruders"
    title = "LoRA vs Full Fine-tuning: An Illusion of Equivalence"
    authors = "Shuttleworth et al."
    venue = "arXiv"
    year = 2024
    arxiv = "2410.21228"
    methods = ("lora", "delta")
    claim = (
        "At equal task quality LoRA leaves leading singular directions that are like none of the base's, most at low "
        "ranks, and full fine-tuning hardly any; they cause forgetting, and scaling them down restores most of what "
        "the base knew at little cost to the task."
    )
    figures = (
        Figure("vectors that are looked at in each weight, and the threshold of |cos|", "10, 0.5", "the authors' code"),
        Figure("intruders in RoBERTa and LLaMA2-7B: LoRA / full fine-tuning", "many / almost none", "second-hand"),
        Figure(
            "scaled by 0.7: loss on pre-training data / accuracy on the task",
            "falls sharply / nearly unchanged",
            "second-hand",
        ),
        Figure("learning rates for MNLI: LoRA rank 1 / rank 8 / full", "3e-4 / 1.5e-4 / 1e-5", "the authors' code"),
    )
    limits = (
        "Some 30 steps on 5.8 million weights are no fine-tuning of a large model. The count depends on the rate: at "
        "4e-3, twice its best, full fine-tuning has some 48 intruders itself, and forgets more. A first run tried half "
        "of these rates (all chose the larger one, as all choose the smaller one here, so the best are bracketed) and "
        "scaled by 0 in place of 0.5, which at rank 1 undid the whole gain; its verdict was the same. The base was "
        "trained with Muon: neighbours among the ten leading singular values of its weights differ by 1 to 2 %, so its "
        "vectors are less fixed than those of other models."
    )
    keys = ("method", "rank", "lr", "scaled by")
    columns: ClassVar = {
        "parameters": COLUMNS["parameters"],
        "validation loss": COLUMNS["validation loss"],
        "intruders": "leading vectors like none of the base's, summed over all weights",
        "nearest": "mean over all leading vectors of the largest |cos| to the base's",
        "gained": "by how much the loss of the target's test rows fell, nats a token",
        "forgotten": "by how much the loss of the source's rows rose, nats a token",
    }

    small = Settings()
    full = Settings(
        model="meta-llama/Llama-2-7b-hf",
        dtype="bfloat16",
        device="auto",
        files=400,
        length=1024,
        ranks=(1, 8, 64, 256),
        lora_rates=(3e-4, 1e-3, 3e-3),
        full_rates=(1e-5, 2e-5, 5e-5),
        steps=2000,
        batch_size=64,
        held_out=200,
        scales=(0.0, 0.3, 0.5, 0.7, FACTOR, 0.9, 1.1, 1.25),
    )
    reduced = Settings(
        files=8, ranks=(1,), lora_rates=(2.4e-2,), full_rates=(2e-3,), steps=16, held_out=16, scales=(FACTOR,)
    )

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        arena, source = learns_less.open_arena(settings, seed)
        entries = competitors(settings)
        found = race(arena, entries, steps=settings.steps, seed=seed, say=say, parts=("validation",))
        say(f"seed {seed}: looking for intruders in {len(entries)} adapters")
        targets: Sets = {"target": arena.parts["test"]}
        bases, search = Bases(keep=True), Search(top=settings.top, threshold=settings.threshold)
        measured = measure_forgetting(arena.service, arena.adapters, targets, {"source": source})
        rows: list[Row] = []
        for row, adapter, own in zip(found, arena.adapters, measured, strict=True):
            seen = find_intruders(adapter, arena.host.backbone, search, bases=bases)
            kept: Row = {
                name: row[name] for name in ("method", "rank", "lr", "parameters", "validation loss") if name in row
            }
            line: Row = {**kept, "intruders": seen.count, "nearest": nearest(seen)}
            rows.append({**line, "gained": own.gained, "forgotten": own.forgotten})
        say(f"seed {seed}: scaling the intruders of the best adapters")
        return [*rows, *_scaled(arena, rows, settings, bases, targets, {"source": source})]

    def listed(self, table: Table) -> Table:
        return table.tuned("validation loss", over="lr")

    def judge(self, table: Table) -> Verdict:
        best = self.listed(table)
        full = _adapter(best, method="full")
        lora = [line for line in best.where(method="lora") if "lr" in line.key]
        more = average([line.cells["intruders"] for line in lora]) - full["intruders"]
        removed, lost = (average([share(table, line, name) for line in lora]) for name in ("forgotten", "gained"))
        counts = ", ".join(f"{line.cells['intruders'].mean:.1f} at rank {line.key['rank']}" for line in lora)
        said = (
            f"LoRA has {counts}, full fine-tuning {full['intruders'].mean:.1f} intruders (on the mean of the ranks "
            f"{more.mean:.1f} ± {more.error:.1f}, standard error, more); scaled by {FACTOR}, they take away "
            f"{removed.mean:.1%} ± {removed.error:.1%} of what LoRA forgot and {lost.mean:.1%} ± {lost.error:.1%} of "
            f"what it gained."
        )
        return Verdict(together((above(more), above(removed - lost))), said)

    def plots(self, table: Table) -> tuple[Plot, ...]:
        best = self.listed(table)
        lora = Table([line for line in best.where(method="lora") if "lr" in line.key], table.keys)
        counts = lora.series("lora", "rank", "intruders")
        full = _adapter(best, method="full")["intruders"]
        flat = Series("full", counts.x, (full.mean,) * len(counts.x), (full.spread,) * len(counts.x), "dashed")
        names = [("full", table.where(method="full"))]
        names += [(f"lora, rank {rank}", table.where(rank=rank)) for rank in table.values("rank")]
        sweeps = [Table([line for line in own if "scaled by" in line.key], table.keys) for _, own in names]
        panels = [
            Plot(f"intruders scaled: {column}", "scaled by", f"{column}, nats a token", tuple(
                sweep.series(label, "scaled by", column) for (label, _), sweep in zip(names, sweeps, strict=True)
            ))
            for column in ("forgotten", "gained")
        ]  # fmt: skip
        return (Plot("intruders at the best rate", "rank", "in all weights", (counts, flat), log_x=True), *panels)


def nearest(seen: Intruders) -> float:
    """The mean over all leading vectors of the largest |cos| to the base's."""
    cosines = [cosine for site in seen.sites for cosine in site.cosines]
    return sum(cosines) / len(cosines)


def share(table: Table, line: Line, column: str) -> Cell:
    """What scaling by `FACTOR` takes away of an adapter's gain or forgetting, as a share of it, seed by seed."""
    own = {key: value for key, value in line.key.items() if key != "lr"}
    before = table.cell(column, **own, **{"scaled by": 1.0})
    return (before - table.cell(column, **own, **{"scaled by": FACTOR})) / before


def competitors(settings: Settings) -> list[Entry]:
    """Full fine-tuning and every rank, each at its rates."""
    entries = rates({"method": "full"}, make_method("delta"), settings.full_rates)
    for rank in settings.ranks:
        lora = make_method("lora", rank=rank, alpha=2.0 * rank)
        lrs = [float(f"{lr * rank**-0.5:.2g}") for lr in settings.lora_rates]
        entries += rates({"method": "lora", "rank": rank}, lora, lrs)
    return entries


def _adapter(table: Table, **key: str) -> dict[str, Cell]:
    """The cells of the adapter itself, not of its scaled copies."""
    (line,) = [line for line in table.where(**key) if "lr" in line.key]
    return dict(line.cells)


def _scaled(
    arena: TextArena, rows: list[Row], settings: Settings, bases: Bases, targets: Sets, sources: Sets
) -> Iterator[Row]:
    """Each contestant at its best rate in this seed: gain and forgetting with its intruders scaled, and as it is."""
    search = Search(top=settings.top, threshold=settings.threshold)
    groups: dict[tuple[str, int], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((str(row["method"]), int(row.get("rank", 0))), []).append(number)
    for (method, rank), members in groups.items():
        best = min(members, key=lambda number: float(rows[number]["validation loss"]))
        name: Row = {"method": method, **({"rank": rank} if rank else {})}
        lines = [(1.0, rows[best]["gained"], rows[best]["forgotten"])]
        for factor in settings.scales:
            made, _ = rescale_intruders(
                arena.adapters[best], arena.host.backbone, factor, search, exact=True, bases=bases
            )
            made.name = f"{made.name}, intruders times {factor:g}"
            arena.host.put(made)
            (own,) = measure_forgetting(arena.service, [made], targets, sources)
            arena.host.delete(made.name)
            lines.append((factor, own.gained, own.forgotten))
        for factor, gained, forgotten in sorted(lines):
            yield {**name, "scaled by": factor, "gained": gained, "forgotten": forgotten}
