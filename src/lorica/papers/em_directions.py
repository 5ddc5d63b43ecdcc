"""Fine-tunes that share a behaviour share a direction, and taking it out removes the behaviour. On a harmless one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from lorica.adapters.analysis.directions import Directions, cosines
from lorica.engine.interventions import adapter_turn, adapter_zero
from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.judging import above, together
from lorica.papers.kit.plot import Plot, Series
from lorica.papers.kit.small_lm import SmallLM
from lorica.papers.kit.sums_lab import BASE, FINE_TUNES, Lab, LabSettings
from lorica.papers.kit.table import Cell, Row, Table
from lorica.recipes.directions import PLAIN

PAIRS = (("A", "B"), ("A", "C"), ("B", "C"))
RANDOM, MODELS = "ablate: random", "ablate: A minus the base"
GENERALISES, AGREE, HALF, INDUCES = 0.1, 0.5, 0.5, 0.1
"""What counts, set before the first run: the habit elsewhere is this much above the base's; mean cosines are above
this; an ablation leaves less than this share of the habit, and less than a random one does; steering the base makes
this much more of the habit than a random direction does."""


class EmDirectionsPaper(PaperCheck[LabSettings]):
    """A harmless stand-in. A small language model can add two numbers; answers that are one too large play the part of
    misaligned ones. Three fine-tunes learn to answer so where the first number is small: `A` by rank-1 adapters on
    `down_proj`, `B` by LoRA on every linear layer, `C` by the same from a wider range of sums. All are asked sums that
    none has learnt. For each, two kinds of its own answers are taken, right ones and those with the habit, equally
    many, and the difference of the means of the block outputs over answer tokens, the `=` before them included, is its
    direction, layer by layer. Directions come from other sums than rates do.

    Rates are shares of all answers at temperature 1. A direction is taken out of every layer's output at every token,
    of the fine-tune that it was made from and of the others; a random one of equal norm is the control of each. The
    base is steered along A's direction at one layer.

    The claim has five parts, set before the first run: A's habit reaches sums that nobody learnt (10 points above the
    base); directions of different fine-tunes agree (mean cosine above 0.5 for each pair); A's direction taken out of A
    leaves less than half of the habit, and less than a random one leaves; the same of A's direction in B and in C; and
    steering the base by it makes 10 points more of the habit than a random direction does, both at their best length.
    """

    name = "em_directions"
    title = "Convergent Linear Representations of Emergent Misalignment"
    authors = "Soligo, Turner, Rajamanoharan, Nanda"
    venue = "arXiv 2025"
    year = 2025
    arxiv = "2506.11618"
    methods = ("lora",)
    claim = (
        "Fine-tunes on different narrow data share a linear direction of misalignment: the direction of one, taken out "
        "of the hidden states of another, removes most of its misaligned answers, and added to a model it makes some."
    )
    figures = (
        Figure("misaligned answers that ablation removes, rank-1 model, its own direction", "90 %", "second-hand"),
        Figure("the same direction in the rank-32 medical model; in extreme sports", "90 %; 78 %", "second-hand"),
        Figure("a random direction of equal norm", "under 10 %", "second-hand"),
        Figure("cosines of directions of different fine-tunes", "above 0.8 in all but four layers", "second-hand"),
    )
    limits = (
        "This illustrates the tools; it does not replicate the paper and says nothing about misalignment. The habit is "
        "off-by-one sums in a model of 100,000 weights, and the full scale has the same habit, since the paper's data "
        "are not to be spread. Up to its last digit an answer with the habit has the same states as a right one to the "
        "same sum, so a direction also holds which sums tempt the model. One learning rate for all, nothing "
        "tuned; the base's own settings were chosen by how well it adds. "
        "With three seeds four of the five parts were undecided; five seeds were set after that, and nothing else."
    )
    seeds = 5
    keys = ("fine-tune", "condition")
    columns: ClassVar = {
        "narrow": "share of answers with the habit, on held-out sums of the range that A and B learn",
        "elsewhere": "the same on sums of the range that nobody learns",
        "right": "share of right answers there",
        "coherent": "share of answers there that are three digits",
        "cosine": "of two fine-tunes' directions, mean over layers",
        "least cosine": "the smallest of these layers",
    }

    small = LabSettings()
    full = LabSettings(
        model="Qwen/Qwen2.5-14B-Instruct",
        dtype="bfloat16",
        device="auto",
        numbers=100,
        narrow=30,
        wide=45,
        layers="15-17,21-23,27-29",
        alpha=64.0,
        rank=32,
        lr=2e-5,
        batch_size=16,
        asked=300,
        elsewhere=1000,
        kappas=(4.0, 8.0, 12.0),
        steered=24,
    )
    reduced = LabSettings(
        base=SmallLM(width=32, layers=2, context=20, steps=60, batch_size=24, lr=8e-3),
        numbers=8,
        narrow=3,
        wide=4,
        steps=20,
        lr=1e-2,
        batch_size=16,
        asked=8,
        elsewhere=12,
        draws=8,
        least=1,
        controls=1,
        kappas=(4.0,),
    )

    def run(self, settings: LabSettings, seed: int, say: Say) -> list[Row]:
        lab = Lab(settings, seed, say)
        lab.train()
        found = {name: lab.direction(name) for name in FINE_TUNES}
        rows = [lab.row(BASE, PLAIN)]
        for name in FINE_TUNES:
            rows.append(lab.row(name, PLAIN))
            for source in FINE_TUNES:
                rows.append(lab.ablated(name, f"ablate: {source}", found[source]))
            rows.append(lab.controlled(name, RANDOM, found["A"]))
        rows.append(lab.ablated("A", MODELS, lab.model_difference("A")))
        host = lab.service.host
        for site in host.adapter("A").layout.sites.values():
            only = {"include": site.name}
            rows.append(lab.row("A", f"silence: layer {site.layer}", adapter_zero(host, "A", targets=only)))
        rows.append(lab.row("A", "silence: write at random", adapter_turn(host, "A", seed=seed)))
        for kappa in settings.kappas:
            rows.append(lab.steered("A", kappa, found["A"], control=False))
            rows.append(lab.steered("A", kappa, found["A"], control=True))
        return [*rows, *(_alike(pair, found) for pair in PAIRS)]

    def judge(self, table: Table) -> Verdict:
        def rate(name: str, condition: str) -> Cell:
            return table.cell("elsewhere", **{"fine-tune": name, "condition": condition})

        def spared(*names: str) -> bool | None:
            """Whether A's direction leaves less than a random one."""
            return together(above(rate(name, RANDOM) - rate(name, "ablate: A")) for name in names)

        def halved(*names: str) -> bool | None:
            """Whether it leaves less than half."""
            return together(above(_times(HALF, rate(name, PLAIN)) - rate(name, "ablate: A")) for name in names)

        alike = [table.cell("cosine", **{"fine-tune": f"{a}, {b}"}) for a, b in PAIRS]
        made, chance = (_best(table, f"steer: {word}") for word in ("A", "random"))
        parts = {
            "the habit reaches other sums": above(rate("A", PLAIN) - rate(BASE, PLAIN), GENERALISES),
            "directions agree": together(above(cell, AGREE) for cell in alike),
            "taken out of A, A's direction leaves less of it than a random one": spared("A"),
            "and less than half": halved("A"),
            "taken out of B and C, less than a random one": spared("B", "C"),
            "and less than half there": halved("B", "C"),
            "steering the base makes it": above(made - chance, INDUCES),
        }
        said = "; ".join(f"{part}: {WORDS[shown]}" for part, shown in parts.items())
        told = ", ".join(
            f"{name} {rate(name, PLAIN).mean:.0%} ({rate(name, 'ablate: A').mean:.0%} with A's direction taken out, "
            f"{rate(name, RANDOM).mean:.0%} with a random one)"
            for name in FINE_TUNES
        )
        cos = ", ".join(f"{cell.mean:.2f}" for cell in alike)
        right = {c: table.mean("right", **{"fine-tune": "A", "condition": c}) for c in (PLAIN, "ablate: A", MODELS)}
        sentence = (
            f"Answers with the habit to sums that nobody learnt: base {rate(BASE, PLAIN).mean:.0%}, {told}. Cosines of "
            f"A and B, A and C, B and C: {cos}. The steered base: {made.mean:.0%}, at random {chance.mean:.0%}. In "
            f"parts: {said}. Right answers of A fall from {right[PLAIN]:.0%} to {right['ablate: A']:.0%} with its "
            f"direction taken out. The direction from the base to A leaves {rate('A', MODELS).mean:.0%} of answers "
            f"with the habit and {right[MODELS]:.0%} right ones."
        )
        return Verdict(together(parts.values()), sentence)

    def plots(self, table: Table) -> tuple[Plot, ...]:
        kinds = {"as it is": PLAIN, "A's direction out": "ablate: A", "own direction out": None, "random out": RANDOM}

        def bars(column: str) -> tuple[Series, ...]:
            found = []
            for label, kind in kinds.items():
                keys = [{"fine-tune": name, "condition": kind or f"ablate: {name}"} for name in FINE_TUNES]
                cells = [table.cell(column, **key) for key in keys]
                found.append(Series(label, FINE_TUNES, tuple(c.mean for c in cells), tuple(c.spread for c in cells)))
            return tuple(found)

        steering = []
        for label, word in (("A's direction", "steer: A"), ("random", "steer: random")):
            lines = [line for line in table if str(line.key["condition"]).startswith(word)]
            places = (0.0, *(float(str(line.key["condition"]).rsplit("κ ", 1)[1]) for line in lines))
            cells = [table.cell("elsewhere", **{"fine-tune": BASE, "condition": PLAIN})]
            cells += [line.cells["elsewhere"] for line in lines]
            steering.append(Series(label, places, tuple(c.mean for c in cells), tuple(c.spread for c in cells)))
        return (
            Plot("directions taken out: the habit", "fine-tune", "answers with the habit elsewhere", bars("elsewhere")),
            Plot("directions taken out: right answers", "fine-tune", "right answers elsewhere", bars("right")),
            Plot("the base, steered", "κ", "answers with the habit elsewhere", tuple(steering)),
        )


WORDS = {True: "yes", False: "no", None: "undecided"}


def _times(factor: float, cell: Cell) -> Cell:
    return Cell(tuple(factor * value for value in cell.values))


def _best(table: Table, word: str) -> Cell:
    """Seed by seed, the highest rate of any length."""
    cells = [line.cells["elsewhere"] for line in table if str(line.key["condition"]).startswith(word)]
    return Cell(tuple(max(values) for values in zip(*(cell.values for cell in cells), strict=True)))


def _alike(pair: tuple[str, str], found: Mapping[str, Directions | None]) -> Row:
    first, second = (found[name] for name in pair)
    values = [math.nan]
    if first is not None and second is not None:
        values = [float(matrix[0, 1]) for matrix in cosines([first, second]).values()]
    cells = {"cosine": sum(values) / len(values), "least cosine": min(values)}
    return {"fine-tune": ", ".join(pair), "condition": "directions", **cells}
