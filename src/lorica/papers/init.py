"""Init[A] or Init[B]: how the largest stable learning rate falls with width. Checked on random maps of many widths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from lorica.core.config import Config
from lorica.methods.lora import LoRA
from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.arena import Entry
from lorica.papers.kit.judging import above, together
from lorica.papers.kit.modules import MLP, ModuleArena
from lorica.papers.kit.plot import Plot
from lorica.papers.kit.table import Row, Table
from lorica.training.optimizer import AdamWConfig

INITS = ("A", "B")
LEAST = 0.1
"""By how much the exponents must differ."""


class Settings(Config):
    """Widths, and what is trained at each."""

    widths: tuple[int, ...] = Field(description="input widths n; the slope is fitted to all but the first")
    depths: tuple[int, ...] = Field((0,), description="hidden layers of width n; 0 is one linear map")
    outputs: int = Field(16, ge=1, description="outputs of the map")
    rank: int = Field(4, ge=1, description="rank of LoRA, alpha = rank")
    inputs: int = Field(1, ge=1, description="input vectors, entries N(0, 1)")
    target: float = Field(3.0, gt=0, description="standard deviation of the targets")
    steps: int = Field(6, ge=1, description="Adam steps")
    bound: float = Field(1.0, gt=0, description="root mean square change of the output that still counts as stable")
    rates: int = Field(16, ge=2, description="learning rates tried together, evenly spaced on a log scale")
    lowest: float = Field(1e-5, gt=0, description="the lowest of them")
    highest: float = Field(0.3, gt=0, description="the highest of them")


class InitPaper(PaperCheck[Settings]):
    """Networks of growing width n are adapted by LoRA of a fixed rank, a few Adam steps towards random targets, with
    many learning rates at once. The largest stable rate is where the root mean square change of the output reaches the
    bound (between two rates it is interpolated on the log scale), so that it says how a rate must shrink as n grows.
    `depth` 0 is a single linear map; otherwise there are so many hidden layers of width n, all adapted. `Az` is the
    size of the low-rank path's inner activation at the first layer for that rate: large means that the inside is
    unstable though the output is not.
    """

    name = "init"
    title = "The Impact of Initialization on LoRA Finetuning Dynamics"
    authors = "Hayou, Ghosh, Yu"
    venue = "NeurIPS 2024"
    year = 2024
    arxiv = "2406.08447"
    methods = ("lora",)
    claim = (
        "With a random A and B = 0 (Init[A]) the largest stable learning rate of Adam falls like n^-1/2 with the width "
        "n, with a random B and A = 0 (Init[B]) like n^-1; Init[A] pays with inner activations that grow like n^1/2."
    )
    figures = (
        Figure("exponent of the largest stable rate, Init[A]", "-1/2", "second-hand: the abstract and summaries"),
        Figure("exponent of the largest stable rate, Init[B]", "-1", "second-hand: the abstract and summaries"),
    )
    limits = (
        "Exponents hold for wide networks and few steps; nothing here says which init ends with the better model; that "
        "the paper measures on RoBERTa and Llama. With three seeds and a required difference of 0.2 between the "
        "exponents it was undecided; six seeds and 0.1 were set after that."
    )
    seeds = 6
    keys = ("depth", "init", "width")
    columns = {  # noqa: RUF012
        "largest stable rate": "learning rate at which the output has moved by the bound",
        "Az": "root mean square of A z at that rate, first layer",
        "exponent": "slope of log(largest stable rate) in log(width)",
        "exponent of Az": "slope of log(Az) in log(width)",
    }

    small = Settings(widths=(128, 256, 1024, 4096), depths=(0, 1))
    full = Settings(widths=(256, 1024, 4096, 16384), depths=(0, 1, 2), rates=24)
    reduced = Settings(widths=(64, 128, 512, 2048), depths=(0,))

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        rows: list[Row] = []
        for depth in settings.depths:
            found: dict[str, list[tuple[float, float, float]]] = {init: [] for init in INITS}
            for width in settings.widths:
                for init in INITS:
                    rate, inner = self._largest(settings, depth, width, init, seed)
                    found[init].append((width, rate, inner))
                    rows.append(
                        {"depth": depth, "init": init, "width": width, "largest stable rate": rate, "Az": inner}
                    )
                    say(f"seed {seed}: depth {depth}, width {width}, Init[{init}]: rate {rate:.2e}, Az {inner:.2f}")
            for init, points in found.items():
                widths, rates, sizes = zip(*points[1:], strict=True)
                slopes: Row = {"exponent": slope(widths, rates), "exponent of Az": slope(widths, sizes)}
                rows.append({"depth": depth, "init": init, **slopes})
        return rows

    def _largest(self, settings: Settings, depth: int, width: int, init: str, seed: int) -> tuple[float, float]:
        """(largest stable rate, size of Az there), both infinite or zero where the grid does not reach the bound."""
        arena, x = problem(settings, depth, width, seed)
        spacing = torch.linspace(math.log(settings.lowest), math.log(settings.highest), settings.rates).exp().tolist()
        method = LoRA(
            rank=settings.rank,
            alpha=float(settings.rank),
            init_factor="a" if init == "A" else "b",
            init_dist="normal",
        )
        plain = AdamWConfig(clip=None, schedule="constant", warmup=0.0)
        arena.enter([Entry({}, method, plain.replace(lr=lr)) for lr in spacing], settings.steps, seed)
        before = arena.outputs(x)
        rng = torch.Generator().manual_seed(seed)
        for _ in range(settings.steps):
            arena.step(rng)
        moved_N = (arena.outputs(x) - before).square().mean((1, 2)).sqrt().tolist()
        inner_N = [
            float((x @ adapter.values(first_site(depth))["A"].T).square().mean().sqrt()) for adapter in arena.adapters
        ]
        return crossing(spacing, moved_N, inner_N, settings.bound)

    def judge(self, table: Table) -> Verdict:
        depths = table.values("depth")
        faster: list[bool | None] = []
        said = []
        for depth in depths:
            a, b = (table.where(depth=depth, init=init).lines[-1].cells["exponent"] for init in INITS)
            faster.append(above(a - b, LEAST))
            said.append(f"{a.mean:.2f} for Init[A] and {b.mean:.2f} for Init[B] at depth {depth}")
        return Verdict(
            together(faster), f"The exponent of the largest stable rate is {', '.join(said)}; theory says -1/2 and -1."
        )

    def plots(self, table: Table) -> tuple[Plot, ...]:
        curves = Table([line for line in table if "width" in line.key], table.keys)

        def panel(title: str, column: str) -> Plot:
            series = tuple(
                curves.series(f"Init[{init}], depth {depth}", "width", column, depth=depth, init=init)
                for depth in table.values("depth")
                for init in INITS
            )
            return Plot(title, "width n", column, series, log_x=True, log_y=True)

        return panel("largest stable learning rate", "largest stable rate"), panel("inside the low-rank path", "Az")


def first_site(depth: int) -> str:
    """The name of the adapted layer that sees the input."""
    return "layers.0" if depth else "head"


def problem(settings: Settings, depth: int, width: int, seed: int) -> tuple[ModuleArena, Tensor]:
    """A frozen random network [n → … → outputs] with inputs N(0, 1) and targets N(0, target²)."""
    rng = torch.Generator().manual_seed(seed)
    module: nn.Module = MLP(width, width, depth, settings.outputs, seed=seed, bias=False)
    x = torch.randn(settings.inputs, width, generator=rng)
    y = settings.target * torch.randn(settings.inputs, settings.outputs, generator=rng)
    return ModuleArena(module, {"train": (x, y)}, batch_size=settings.inputs, loss="values"), x


def crossing(
    rates: Sequence[float], moved: Sequence[float], inner: Sequence[float], bound: float
) -> tuple[float, float]:
    """Where `moved` first exceeds the bound, and `inner` there, interpolated on the log scale; never: infinite."""
    for place, value in enumerate(moved):
        if value > bound and place and moved[place - 1] > 0:
            low, high = math.log(moved[place - 1]), math.log(value)
            share = (math.log(bound) - low) / (high - low)
            mix = [
                math.exp(math.log(values[place - 1]) * (1 - share) + math.log(values[place]) * share)
                for values in (rates, inner)
            ]
            return mix[0], mix[1]
        if not value <= bound:
            return math.nan, math.nan
    return math.inf, math.inf


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares slope of log y in log x; NaN where a value is not finite."""
    if len(x) < 2 or not all(math.isfinite(value) and value > 0 for value in y):
        return math.nan
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    upper = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return upper / sum((a - mean_u) ** 2 for a in u)
