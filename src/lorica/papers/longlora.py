"""LongLoRA: shifted attention, and LoRA with embeddings and norms, extend a context as full fine-tuning does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lorica.client.local import Service
from lorica.core.config import Config
from lorica.core.errors import ConfigError, DataError
from lorica.data.example import Example
from lorica.engine.host import TargetSpec
from lorica.methods import Method, make_method
from lorica.models import Backbone, load
from lorica.models.shifted_attention import Shifted
from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.arena import COLUMNS, OPTIMIZER, Entry, race
from lorica.papers.kit.flops import attention_flops
from lorica.papers.kit.judging import above
from lorica.papers.kit.plot import Plot, Series
from lorica.papers.kit.small_lm import MADE, SmallLM, copy_of, pretrain_lm
from lorica.papers.kit.table import Cell, Row, Table
from lorica.papers.kit.text import TextArena, data_folder, stream

CLOSED = 0.5
"""Share of the gap between LoRA and full fine-tuning that LongLoRA has to close."""


class Settings(Config):
    """A base, a text, how far the context grows, and what competes."""

    model: str = Field(MADE, description="`made here`: pre-trained on characters of the text; else any model")
    text: str = Field("tinyshakespeare", description="`tinyshakespeare` or a text file; its last tenth is held out")
    base: SmallLM = Field(SmallLM(), description="the model that is made here")
    context: int = Field(64, ge=8, description="context that the base was trained at")
    scale: int = Field(4, ge=2, description="how many times longer the new context is; positions are divided by it")
    lengths: tuple[int, ...] = Field((64, 128, 256), description="lengths of the windows that perplexity is taken over")
    windows: int = Field(12, ge=1, description="held-out windows of the new context, to choose by and again to test")
    rank: int = Field(8, ge=1, description="rank of LoRA, alpha = 2 rank")
    low_rates: tuple[float, ...] = Field(
        (1e-3, 2e-3, 4e-3), description="learning rates to choose from, LoRA, LongLoRA"
    )
    full_rates: tuple[float, ...] = Field(
        (8e-4, 1.5e-3, 3e-3), description="learning rates to choose from, all weights"
    )
    steps: int = Field(60, ge=1, description="optimiser steps at the new context")
    batch_size: int = Field(3, ge=1, description="windows of one step")
    counted: tuple[int, ...] = Field((256, 512, 1024), description="lengths at which arithmetic is counted")
    dtype: str = Field("float32", description="dtype of a loaded base")
    device: str = Field("cpu", description="where a loaded base runs")


@dataclass(frozen=True, slots=True)
class Ready:
    """The base, its copy with stretched positions for each attention, and tokens by part."""

    plain: Backbone
    stretched: dict[str, Backbone]
    parts: dict[str, Tensor]


class LongLoRAPaper(PaperCheck[Settings]):
    """A base that was pre-trained on short windows of a text goes on with windows four times as long, its rotary
    positions divided by four. Trained are: LoRA on attention (`lora`), LoRA on attention with embeddings and norms
    (`longlora`), and all weights (`full`, by `delta`), each in training with shifted attention, groups of a quarter;
    and all weights with dense attention. Everything is evaluated dense, on held-out windows. `base` is the base as it
    is, `base, stretched` the same with divided positions and no training. Attention's floating-point
    operations in a training pass are counted as it runs, with torch's formulas for plain matrix products, which count
    the masked half of a product too.
    """

    name = "longlora"
    title = "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models"
    authors = "Chen et al."
    venue = "ICLR 2024"
    year = 2024
    arxiv = "2309.12307"
    methods = ("longlora", "lora", "delta")
    claim = (
        "Training with shifted sparse attention extends a context as well as dense training does at a fraction of "
        "attention's arithmetic, and LoRA comes close to full fine-tuning once embeddings and norms are trained too."
    )
    figures = (
        Figure("LLaMA-2-7B at 32k, perplexity on PG19: full fine-tuning", "8.08", "memory"),
        Figure("the same: LoRA of rank 8 / rank 256", "11.44 / 11.98", "memory"),
        Figure("the same: LoRA with norms / with embeddings / with both", "10.49 / 8.29 / 8.12", "memory"),
    )
    limits = (
        "A model of 140,000 weights on characters has little use for a long context, so what is measured is mostly how "
        "well it recovers from divided positions. One base is made for each seed."
    )
    keys = ("method", "attention", "length", "lr")
    columns: ClassVar = {
        "perplexity": "on held-out windows of that length, dense attention",
        "parameters": COLUMNS["parameters"],
        "validation loss": "at the longest length; the learning rate is chosen by it",
        "attention GFLOP": "of attention's products, forward and backward of one sequence",
    }

    small = Settings()
    full = Settings(
        model="meta-llama/Llama-2-7b-hf",
        text="pg19.txt",
        context=4096,
        scale=8,
        lengths=(2048, 8192, 32768),
        counted=(8192, 32768),
        low_rates=(2e-5, 1e-4, 4e-4),
        full_rates=(2e-5,),
        steps=1000,
        batch_size=64,
        dtype="bfloat16",
        device="auto",
    )
    reduced = Settings(
        base=SmallLM(width=32, layers=2, context=32, steps=150),
        context=32,
        lengths=(32, 128),
        low_rates=(1e-2,),
        full_rates=(3e-3,),
        steps=40,
        counted=(128, 512),
    )

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        ready = prepare(settings, seed, say)
        rows = untrained(Service(ready.plain), ready, settings, "base")
        for attention in ("dense", "shifted"):
            rows += self._trained(settings, ready, attention, seed, say)
        return rows

    def _trained(self, settings: Settings, ready: Ready, attention: str, seed: int, say: Say) -> list[Row]:
        longest = settings.context * settings.scale
        parts = {"train": cut(ready.parts["train"], longest), "validation": cut(ready.parts["validation"], longest)}
        parts |= {str(length): cut(ready.parts["test"], length) for length in settings.lengths}
        backbone = ready.stretched[attention]
        arena = TextArena(backbone, None, parts, batch_size=settings.batch_size, token_budget=8192)
        shifted = Shifted(ratio=0.25) if attention == "shifted" else None
        arena.service.host.set_attention(shifted)
        optimizer = OPTIMIZER.replace(clip=1.0, schedule="constant", betas=(0.9, 0.95))
        entries = [
            Entry({"method": name, "attention": attention, "lr": lr}, method, optimizer.replace(lr=lr), targets)
            for name, method, targets, lrs in competitors(settings, backbone, attention)
            for lr in lrs
        ]
        measured = ("validation", *map(str, settings.lengths))
        found = race(arena, entries, steps=settings.steps, seed=seed, say=say, parts=measured)
        rows = untrained(arena.service, ready, settings, "base, stretched") if shifted is None else []
        for row in found:
            kept = {key: row[key] for key in ("method", "attention", "lr", "parameters", "validation loss")}
            rows += [{**kept, "length": n, "perplexity": _exp(row[f"{n} loss"])} for n in settings.lengths]
        for length in settings.counted:
            products = attention_flops(arena.service, length) / 1e9
            rows.append({"attention": attention, "length": length, "attention GFLOP": products})
        return rows

    def listed(self, table: Table) -> Table:
        return table.tuned("validation loss", over="lr")

    def judge(self, table: Table) -> Verdict:
        best = self.listed(table)
        longest = longest_with(best, "perplexity")
        at = {
            name: best.cell("perplexity", method=name, attention="shifted", length=longest)
            for name in ("lora", "longlora", "full")
        }
        dense = best.cell("perplexity", method="full", attention="dense", length=longest)
        gained = at["lora"] - at["longlora"]
        wanted = Cell(tuple(CLOSED * gap for gap in (at["lora"] - at["full"]).values))
        closed = above(gained - wanted)
        last = longest_with(best, "attention GFLOP")
        cost = [best.mean("attention GFLOP", attention=name, length=last) for name in ("shifted", "dense")]
        said = (
            f"Trained with shifted attention, perplexity at {longest} tokens is {at['lora'].mean:.3f} with LoRA, "
            f"{at['longlora'].mean:.3f} with LongLoRA and {at['full'].mean:.3f} with full fine-tuning, which reaches "
            f"{dense.mean:.3f} with dense attention; attention's arithmetic at {last} tokens is "
            f"{cost[0] / cost[1]:.2f} of the dense one's."
        )
        return Verdict(closed, said)

    def plots(self, table: Table) -> tuple[Plot, ...]:
        best = self.listed(table)
        alone = tuple(best.series(name, "length", "perplexity", method=name) for name in ("base", "base, stretched"))
        full = best.series("full, dense", "length", "perplexity", method="full", attention="dense")
        names = [str(name) for name in best.where(attention="shifted").values("method")]
        above_full = tuple(_above_full(best, name) for name in names)
        costs = Table([line for line in best if "attention GFLOP" in line.cells], table.keys)
        products = tuple(costs.series(str(a), "length", "attention GFLOP", attention=a) for a in ("dense", "shifted"))
        return (
            Plot(
                "before and after training", "tokens of a window", "perplexity", (*alone, full), log_x=True, log_y=True
            ),
            Plot("trained shifted, evaluated dense", "tokens of a window", "perplexity above full, dense", above_full),
            Plot("attention in training", "tokens", "attention GFLOP", products, log_x=True, log_y=True),
        )


def _above_full(best: Table, method: str) -> Series:
    """By how much a method's perplexity is above that of full fine-tuning with dense attention, seed by seed."""
    places, found = [], []
    for line in best.where(method=method, attention="shifted"):
        if "perplexity" in line.cells:
            length = line.key["length"]
            full = best.cell("perplexity", method="full", attention="dense", length=length)
            places.append(float(length))
            found.append(line.cells["perplexity"] - full)
    return Series(method, tuple(places), tuple(c.mean for c in found), tuple(c.spread for c in found))


def untrained(service: Service, ready: Ready, settings: Settings, name: str) -> list[Row]:
    """The base's perplexity at every length."""
    client = service.sampling_client(None)
    rows: list[Row] = []
    for length in settings.lengths:
        asked = cut(ready.parts["test"], length)
        loss = sum(found.loss for found in client.logprobs(asked)) / sum(example.trained for example in asked)
        rows.append({"method": name, "length": length, "perplexity": _exp(loss)})
    return rows


def longest_with(table: Table, column: str) -> int:
    """The largest length of the lines that have a column."""
    return max(int(line.key["length"]) for line in table if column in line.cells)


def competitors(
    settings: Settings, backbone: Backbone, attention: str
) -> list[tuple[str, Method, TargetSpec, tuple[float, ...]]]:
    """(name, method, targets, learning rates) of what trains with an attention."""
    head = (
        [backbone.head_site] if backbone.head_site is not None and not backbone.sites[backbone.head_site].tied else []
    )
    full = ("full", make_method("delta"), ["all", *head], settings.full_rates)
    if attention == "dense":
        return [full]
    low = {"rank": settings.rank, "alpha": 2.0 * settings.rank}
    return [
        full,
        ("lora", make_method("lora", **low), ["q_proj", "k_proj", "v_proj", "o_proj"], settings.low_rates),
        ("longlora", make_method("longlora", **low), None, settings.low_rates),
    ]


def prepare(settings: Settings, seed: int, say: Say) -> Ready:
    """The base and the tokens of a seed. Raises MissingError, ConfigError, DataError."""
    path = (
        data_folder() / "tinyshakespeare" / "input.txt" if settings.text == "tinyshakespeare" else Path(settings.text)
    )
    text = path.read_text(encoding="utf-8")
    scale = float(settings.scale)
    if settings.model == MADE:
        letters = {letter: place for place, letter in enumerate(sorted(set(text)))}
        parts = parted(torch.tensor([letters[letter] for letter in text]), settings, seed)
        plain = pretrain_lm(parts["train"], len(letters), settings.base, seed, say)
        stretched = {a: copy_of(plain, len(letters), settings.base, position_scale=scale) for a in ("dense", "shifted")}
        return Ready(plain, stretched, parts)
    plain, *copies = (
        load(settings.model, dtype=settings.dtype, device=settings.device, position_scale=factor)
        for factor in (1.0, scale, scale)
    )
    if plain.tokenizer is None:
        raise ConfigError(f"{settings.model!r} has no tokenizer, so text cannot be trained on it.")
    tokens = torch.tensor(stream(plain.tokenizer, text.split("\n")))
    return Ready(plain, dict(zip(("dense", "shifted"), copies, strict=True)), parted(tokens, settings, seed))


def parted(tokens: Tensor, settings: Settings, seed: int) -> dict[str, Tensor]:
    """The text but its last tenth, and windows of the new context out of that tenth, drawn by the seed."""
    longest, first = settings.context * settings.scale, int(0.9 * len(tokens))
    held = tokens[first:].unfold(0, longest, longest)
    if len(held) < 2 * settings.windows:
        raise DataError(f"The last tenth of the text has {len(held)} windows; {2 * settings.windows} are asked for.")
    held = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))]
    test, validation = held[: settings.windows], held[settings.windows : 2 * settings.windows]
    return {"train": tokens[:first], "validation": validation.flatten(), "test": test.flatten()}


def cut(tokens: Tensor, length: int) -> list[Example]:
    """Windows of a length, side by side, of whose tokens all but the first are predicted."""
    return [Example.whole(window) for window in tokens.unfold(0, length, length).tolist()]


def _exp(loss: object) -> float:
    value = float(loss)  # type: ignore[arg-type]
    return math.exp(value) if value < 700 else math.inf
