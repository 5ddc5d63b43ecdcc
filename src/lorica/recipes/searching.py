"""What the two searches (`glora_search`, `intrinsic_search`) share: model, data in three parts, training, measuring.

In: the common settings. Out: a service with its data, trained adapters, figures on held-out rows. Scores come from the
validation part; nothing is ever chosen by the test part. Refuses to know what is searched for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from lorica.adapters.adapter import Adapter
from lorica.adapters.targets import Targets
from lorica.client.local import SamplingClient, Service, TrainingClient
from lorica.core.config import Config
from lorica.core.errors import MethodError
from lorica.data.example import Example
from lorica.data.packing import Sampler
from lorica.data.render import Renderer
from lorica.engine.engine import Item
from lorica.models import load
from lorica.recipes.compare.config import CompareConfig
from lorica.recipes.compare.data import Parts, question, read_parts
from lorica.recipes.config import DataConfig
from lorica.recipes.quickstart import answers
from lorica.training.optimizer import AdamWConfig


class SearchConfig(Config):
    """The settings of any search on one base and one data set."""

    model: str = Field("nano", description="a built-in name, a local directory or a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of the frozen base")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU where there is one")
    targets: Targets = Field(Targets(), description="which sites to adapt")
    data: DataConfig = Field(description="what to train on; rows of `eval_path` score candidates")
    test_path: str | None = Field(None, description="a file that nothing is chosen by; without it, rows are held out")
    validation_rows: int = Field(64, ge=1, description="most rows that score candidates")
    test_rows: int = Field(256, ge=1, description="most rows that the result is measured on at the end")
    optimizer: AdamWConfig = Field(AdamWConfig(), description="AdamW, schedule and clipping")
    steps: int = Field(200, ge=1, description="optimiser steps of one training run")
    batch_size: int = Field(8, ge=1, description="examples of one optimiser step")
    token_budget: int = Field(2048, ge=16, description="most tokens of one micro-batch")
    out: str = Field("runs/search", description="folder of the search; what it holds already is used again")


@dataclass(frozen=True)
class Search:
    """A search with everything loaded."""

    config: SearchConfig
    renderer: Renderer
    parts: Parts
    service: Service

    @property
    def identity(self) -> dict[str, Any]:
        """What every score depends on besides the candidate: base, data and how much of it, batches."""
        config = self.config
        return {
            "base": self.service.host.backbone.fingerprint(),
            "data": self.parts.fingerprints,
            "rows": [config.validation_rows, config.test_rows if config.test_path is None else 0],
            "rendering": config.data.model_dump(mode="json", include={"max_length", "train_on", "chat"}),
            "targets": config.targets.model_dump(mode="json"),
            "optimizer": config.optimizer.model_dump(mode="json", exclude={"lr"}),
            "steps": config.steps,
            "batch_size": config.batch_size,
        }

    def batches(self, seed: int) -> Sampler:
        """The stream of training batches, as indices of `parts.train`."""
        return Sampler(self.parts.train, batch_size=self.config.batch_size, seed=seed)

    def loss(self, adapter: Adapter | None, examples: Sequence[Example]) -> float:
        """Mean −log p of trained tokens; None is the base."""
        results = self.service.engine.forward([Item(example, adapter) for example in examples])
        return sum(r.loss for r in results) / sum(sum(map(abs, example.weights)) for example in examples)

    def probability(self, adapter: Adapter | None, examples: Sequence[Example]) -> float:
        """Mean probability of the tokens that have weight."""
        results = self.service.engine.forward([Item(example, adapter) for example in examples])
        chosen = [
            np.exp(np.asarray(result.logprobs, dtype=np.float64)[np.asarray(example.weights[1:]) != 0])
            for result, example in zip(results, examples, strict=True)
        ]
        return float(np.concatenate(chosen).mean())

    def exact(self, adapter: Adapter | None, examples: Sequence[Example]) -> float:
        """Share of rows that are answered word for word. Raises MethodError where no row asks anything."""
        asked = [q for q in (question(example, self.renderer) for example in examples) if q is not None]
        if not asked:
            raise MethodError(
                "No held-out row has a question and an answer, so none can be answered exactly.",
                hint="Measure `metric=probability` instead.",
            )
        given = answers(SamplingClient(self.service, adapter), self.renderer, asked)
        return sum(q.expected == answer for q, answer in zip(asked, given, strict=True)) / len(asked)


def open_search(config: SearchConfig, say: Callable[[str], None]) -> Search:
    """Load the base and the data. Raises Lorica's errors for whatever does not fit."""
    say("loading model and data")
    backbone = load(config.model, dtype=config.dtype, device=config.device)
    if backbone.tokenizer is None:
        raise MethodError(f"{config.model!r} has no tokenizer, so text cannot be trained on it.")
    renderer = Renderer(backbone.tokenizer, train_on=config.data.train_on, chat=config.data.chat)
    # the same three parts as a comparison of the same files
    fields = {name: getattr(config, name) for name in ("data", "test_path", "validation_rows", "test_rows")}
    parts = read_parts(CompareConfig(methods=("lora",), answer_rows=0, **fields), renderer)
    for sentence in parts.said:
        say(sentence)
    return Search(config, renderer, parts, Service(backbone, token_budget=config.token_budget))


def training(search: Search, client: TrainingClient, batches: Sampler, steps: range) -> Iterator[tuple[int, float]]:
    """Train step by step: yields the number of steps done and the loss of each. A loss or gradient that is not finite
    ends it, with a loss of NaN.
    """
    for step in steps:
        loss = client.forward_backward([search.parts.train[i] for i in next(batches)]).mean
        if not (math.isfinite(loss) and math.isfinite(client.optim_step().grad_norm)):
            yield step + 1, math.nan
            return
        yield step + 1, loss
