"""The intrinsic dimension of a data set for a base: `d90` on real data, each run of it kept and used again.

In: an `IntrinsicSearchConfig`. Out: a report. Every run is kept by its settings, so that another grid, threshold or
start reuses what it can. The metric is of the validation part; the test part is measured once, at d90. Refuses to know
terminals: progress goes to an `Observer`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from lorica.adapters.targets import Targets
from lorica.core.storage import storage, write_file
from lorica.methods import Method
from lorica.methods.delta import Delta
from lorica.methods.intrinsic import Intrinsic
from lorica.recipes.compare.report import finite
from lorica.recipes.d90 import GridConfig, Tuned, search_d90
from lorica.recipes.ledger import Ledger
from lorica.recipes.observer import Observer
from lorica.recipes.searching import Search, SearchConfig, open_search, training

REPORT = "d90.json"


class IntrinsicSearchConfig(SearchConfig):
    """One measurement of an intrinsic dimension."""

    targets: Targets = Field(Targets(include=("all",)), description="which sites move, in full fine-tuning too")
    structured: bool = Field(False, description="SAID, with a trained factor for each tensor; else DID")
    metric: Literal["exact", "probability"] = Field(
        "exact", description="share of rows answered word for word, or mean probability of the right tokens"
    )
    grid: GridConfig = Field(GridConfig(), description="dimensions, learning rates, seeds and threshold")
    out: str = Field("runs/d90", description="folder of the search; what it holds already is used again")


@dataclass(frozen=True, slots=True)
class Report:
    """What a search found. `trained` are the parameters of full fine-tuning; `test` is the metric of the test part at
    d90, with its best learning rate and the first seed, None where there is no d90.
    """

    path: str
    d90: int | None
    metric: str
    target: float
    trained: int
    full: Tuned
    rows: tuple[Tuned, ...]
    test: float | None
    computed: int
    reused: int


def run(config: IntrinsicSearchConfig, observer: Observer | None = None) -> Report:
    """Search, keeping every run in `out`/runs.jsonl."""
    observer = observer or Observer()
    search = open_search(config, observer.say)
    out, trial = Path(config.out), _Trials(search, config)
    ledger, host = Ledger(out / "runs.jsonl"), search.service.host
    host.layout(trial.method(config.grid.smallest, 0), config.targets)  # what does not fit is told before training

    def train(dimension: int | None, lr: float, seed: int) -> float:
        return ledger.value(
            {
                **search.identity,
                "method": trial.method(dimension, seed).model_dump(mode="json"),
                "metric": config.metric,
                "lr": lr,
                "seed": seed,
            },
            lambda: trial.run(dimension, lr, seed, test=False),
        )

    def told(row: Tuned) -> None:
        what = "full fine-tuning" if row.dimension is None else f"d = {row.dimension:,}"
        observer.say(f"{what}: {config.metric} {row.metric:.4f} at learning rate {row.lr:g}")

    found = search_d90(train, config.grid, told)
    at = next((row for row in found.rows if row.dimension == found.d90), None)
    report = Report(
        path=str(out),
        d90=found.d90,
        metric=config.metric,
        target=found.target,
        trained=host.layout(trial.method(None, 0), config.targets).trainable_count(),
        full=found.full,
        rows=found.rows,
        test=None if at is None else trial.run(at.dimension, at.lr, config.grid.seeds[0], test=True),
        computed=ledger.computed,
        reused=ledger.reused,
    )
    with storage(out):
        write_file(out / REPORT, json.dumps(finite(asdict(report)), indent=1, allow_nan=False).encode())
    return report


class _Trials:
    """Training runs of one search."""

    def __init__(self, search: Search, config: IntrinsicSearchConfig) -> None:
        self.search, self.config = search, config

    def method(self, dimension: int | None, seed: int) -> Method:
        """Full fine-tuning, or a subspace of its own for each seed."""
        if dimension is None:
            return Delta(bias=True)
        return Intrinsic(dimension=dimension, structured=self.config.structured, projection_key=seed)

    def run(self, dimension: int | None, lr: float, seed: int, *, test: bool) -> float:
        """Train one adapter and measure it; −∞ where its loss or gradient was not finite."""
        search, config = self.search, self.config
        client = search.service.training_client(
            self.method(dimension, seed),
            config.targets,
            name="trial",
            seed=seed,
            optimizer=config.optimizer.replace(lr=lr),
            steps=config.steps,
        )
        try:
            for _, loss in training(search, client, search.batches(seed), range(config.steps)):
                if not math.isfinite(loss):
                    return -math.inf
            measure = search.exact if config.metric == "exact" else search.probability
            return measure(client.adapter, search.parts.test if test else search.parts.validation)
        finally:
            search.service.host.delete("trial")
