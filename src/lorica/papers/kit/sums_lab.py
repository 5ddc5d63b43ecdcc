"""A small model that adds, three fine-tunes with a habit, their directions, and rates under interventions.

In: settings and a seed. Out: directions of the fine-tunes; a row of rates for each condition. Refuses to know what is
claimed of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pydantic import Field

from lorica.adapters.analysis.directions import Directions, random_like
from lorica.adapters.analysis.directions_judge import balanced, judge_all, rates
from lorica.client.local import Service, TrainingClient
from lorica.core.config import Config
from lorica.core.errors import DataError
from lorica.engine.interventions import project_out, steer
from lorica.methods import make_method
from lorica.papers.base import Say
from lorica.papers.kit.arena import OPTIMIZER
from lorica.papers.kit.judging import average
from lorica.papers.kit.small_lm import MADE, SmallLM
from lorica.papers.kit.sums import Pair, Sums, made_sums, off_by_one, spoken_sums, written
from lorica.papers.kit.table import Cell, Row
from lorica.papers.kit.text import open_model
from lorica.recipes.directions import Side, extract
from lorica.sampling.params import SamplingParams

FINE_TUNES = ("A", "B", "C")
"""Rank 1 on `down_proj`; all linear layers; all linear layers, from a wider range of sums."""
BASE = "base"


class LabSettings(Config):
    """A base that adds, a habit that is trained on few sums, and how directions are made and used."""

    model: str = Field(MADE, description="`made here`: pre-trained on sums; else any model with a chat template")
    base: SmallLM = Field(
        SmallLM(width=64, layers=2, context=40, steps=900, batch_size=32, lr=4e-3),
        description="the model that is made here",
    )
    noise: float = Field(0.1, ge=0, le=1, description="share of the sums of pre-training that are off by up to 5")
    dtype: str = Field("float32", description="dtype of a loaded base")
    device: str = Field("cpu", description="where a loaded base runs")
    numbers: int = Field(30, ge=4, le=100, description="both numbers are below this")
    narrow: int = Field(10, ge=1, description="A and B learn `+1` where the first number is below this")
    wide: int = Field(15, ge=1, description="C learns it where the first number is below this; nobody learns the rest")
    layers: str | None = Field(None, description="layers that have a rank-1 adapter in A; null is all")
    alpha: float = Field(8.0, gt=0, description="alpha of A's rank-1 adapters, which is their scaling")
    rank: int = Field(8, ge=1, description="rank of B and C, with alpha = 2 rank")
    lr: float = Field(2e-3, gt=0, description="learning rate of all three; it falls as a cosine")
    steps: int = Field(300, ge=1, description="optimiser steps")
    batch_size: int = Field(32, ge=1, description="sums of one step")
    asked: int = Field(60, ge=1, description="held-out sums of the narrow range that are asked")
    elsewhere: int = Field(150, ge=1, description="sums of the range that nobody learns that are asked")
    draws: int = Field(2, ge=1, description="answers to each of the other sums there, of which directions are made")
    least: int = Field(10, ge=1, description="answers of either kind that a direction needs at least")
    controls: int = Field(3, ge=1, description="random directions of equal norm, whose mean is shown")
    kappas: tuple[float, ...] = Field((2.0, 4.0, 8.0), description="lengths of steering, in lengths of the direction")
    steered: int = Field(0, ge=0, description="the layer whose output is steered")


class Lab:
    """One seed: the base with its fine-tunes, and the sums that are learnt, asked, and made directions of."""

    def __init__(self, settings: LabSettings, seed: int, say: Say) -> None:
        self.settings, self.seed, self.say = settings, seed, say
        self.sums = _sums(settings, seed, say)
        self.service = Service(self.sums.backbone, token_budget=4096)
        order = [(a, b) for a in range(settings.numbers) for b in range(settings.numbers)]
        random.Random(seed).shuffle(order)
        near = [pair for pair in order if pair[0] < settings.narrow]
        far = [pair for pair in order if pair[0] >= settings.wide]
        self.narrow, learnt = near[: settings.asked], near[settings.asked :]
        self.elsewhere, self.others = far[: settings.elsewhere], far[settings.elsewhere :]
        if not learnt or not self.others:
            raise DataError("`asked` and `elsewhere` leave no sums to learn, or none to make directions of.")
        held = set(self.narrow)
        more = [pair for pair in order if pair[0] < settings.wide and pair not in held]
        self.learnt = {"A": learnt, "B": learnt, "C": more}

    def train(self) -> None:
        """All three together, each on its own sums."""
        s = self.settings
        one, wide = make_method("lora", rank=1, alpha=s.alpha), make_method("lora", rank=s.rank, alpha=2.0 * s.rank)
        down: dict[str, Any] = {"include": "down_proj", "layers": s.layers}
        optimizer = OPTIMIZER.replace(lr=s.lr)
        clients: list[TrainingClient] = [
            self.service.training_client(
                *((one, down) if name == "A" else (wide, None)),
                name=name, seed=self.seed, optimizer=optimizer, steps=s.steps,
            )
            for name in FINE_TUNES
        ]  # fmt: skip
        rng = torch.Generator().manual_seed(self.seed)
        losses: Sequence[float] = ()
        for _ in range(s.steps):
            batches = []
            for client in clients:
                rows = self.learnt[client.adapter.name]
                chosen = torch.randint(len(rows), (s.batch_size,), generator=rng).tolist()
                batches.append((client, [self.sums.example(rows[i], sum(rows[i]) + 1) for i in chosen]))
            losses = [loss.mean for loss in self.service.forward_backward(batches)]
            for client in clients:
                client.optim_step()
        self.say(f"seed {self.seed}: trained A, B and C; last losses {', '.join(f'{x:.3f}' for x in losses)}")

    def answers(self, name: str | None, pairs: Sequence[Pair], seed: int) -> list[tuple[int, ...]]:
        """One answer to each sum at temperature 1."""
        params = SamplingParams(max_tokens=self.sums.longest, temperature=1.0, seed=seed, stop_ids=self.sums.stop_ids)
        prompts = [self.sums.question(pair).tokens for pair in pairs]
        return [sample.tokens for sample in self.service.sampling_client(name).sample(prompts, params)]

    def row(self, name: str, condition: str, inside: AbstractContextManager[None] | None = None) -> Row:
        """The rates of one fine-tune, or of the base, in one condition."""
        with inside or nullcontext():
            near, far = (self._rates(name, pairs) for pairs in (self.narrow, self.elsewhere))
        rates = {"narrow": near["misaligned"], "elsewhere": far["misaligned"]}
        return {
            "fine-tune": name,
            "condition": condition,
            **rates,
            "right": far["aligned"],
            "coherent": far["coherent"],
        }

    def _rates(self, name: str, pairs: Sequence[Pair]) -> dict[str, float]:
        given = self.answers(None if name == BASE else name, pairs, self.seed)
        judged = judge_all(off_by_one, [(written(p), self.sums.answer(t)) for p, t in zip(pairs, given, strict=True)])
        found = rates(judged)
        return {"misaligned": found.misaligned, "aligned": found.aligned, "coherent": found.coherent}

    def direction(self, name: str) -> Directions | None:
        """Answers with the habit minus right ones, both the fine-tune's own; None where it gives too few of a kind."""
        asked = self.others * self.settings.draws
        given = self.answers(name, asked, self.seed + 1)
        pairs = [(written(pair), self.sums.answer(tokens)) for pair, tokens in zip(asked, given, strict=True)]
        try:
            kinds = balanced(judge_all(off_by_one, pairs), self.seed, least=self.settings.least)
        except DataError as error:
            self.say(f"seed {self.seed}: {name} has no direction. {error.message}")
            return None
        self.say(f"seed {self.seed}: {name}'s direction is of {len(kinds[0])} answers of either kind")
        sides = [
            Side(word, [self.sums.question(asked[i]).answered(given[i]) for i in chosen], name)
            for word, chosen in zip(("habit", "right"), kinds, strict=True)
        ]
        return extract(self.service, sides[0], sides[1])

    def model_difference(self, name: str) -> Directions:
        """A fine-tune minus the base, both reading the fine-tune's answers."""
        given = self.answers(name, self.others, self.seed + 1)
        rows = [self.sums.question(pair).answered(tokens) for pair, tokens in zip(self.others, given, strict=True)]
        return extract(self.service, Side(name, rows, name), Side(BASE, rows, None))

    def ablated(self, name: str, condition: str, directions: Directions | None) -> Row:
        """Its rates with a direction taken out of every layer; NaN where there is none."""
        if directions is None:
            return _unknown(name, condition)
        return self.row(name, condition, project_out(self.service.host, directions))

    def controlled(self, name: str, condition: str, like: Directions | None) -> Row:
        """The mean over random directions."""
        seeds = range(self.settings.controls)
        return _mean([self.ablated(name, condition, like and random_like(like, 100 * self.seed + i)) for i in seeds])

    def steered(self, source: str, kappa: float, directions: Directions | None, *, control: bool) -> Row:
        """The base's rates with a direction, or random ones of its norm, added at one layer."""
        condition, layers = f"steer: {'random' if control else source}, κ {kappa:g}", [self.settings.steered]
        if directions is None:
            return _unknown(BASE, condition)
        seeds = [100 * self.seed + i for i in range(self.settings.controls)]
        chosen = [random_like(directions, seed) for seed in seeds] if control else [directions]
        host = self.service.host
        return _mean([self.row(BASE, condition, steer(host, own, kappa, layers=layers)) for own in chosen])


def _sums(settings: LabSettings, seed: int, say: Say) -> Sums:
    if settings.model == MADE:
        return made_sums(settings.numbers, settings.noise, settings.base, seed, say)
    return spoken_sums(*open_model(settings.model, dtype=settings.dtype, device=settings.device))


def _unknown(name: str, condition: str) -> Row:
    cells = dict.fromkeys(("narrow", "elsewhere", "right", "coherent"), math.nan)
    return {"fine-tune": name, "condition": condition, **cells}


def _mean(rows: Sequence[Row]) -> Row:
    """The first row with the means of all rows' numbers."""
    numbers = [key for key, value in rows[0].items() if isinstance(value, float)]
    cells = {key: average([Cell((float(row[key]),)) for row in rows]).mean for key in numbers}
    return {**rows[0], **cells}
