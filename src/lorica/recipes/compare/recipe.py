"""A comparison: several methods trained on one base in the same batches, each with the learning rate that suits it.

In: a `CompareConfig`. Out: a `Comparison`. All candidates (method × rate) read the same examples in the same order, in
joint batches; the worse half of each method's rates is given up at each rung; the rate with the best validation loss
wins, and the test part is only measured. Refuses to know terminals: progress goes to an `Observer`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lorica
from lorica.engine.engine import Item
from lorica.recipes.compare.config import CompareConfig, file_name
from lorica.recipes.compare.ready import Ready, prepare
from lorica.recipes.compare.report import Absent, Base, Comparison, Rate, Row, edge_note, reserve, write
from lorica.recipes.compare.train import Candidate, Field, mean
from lorica.recipes.compare.tune import Runs, Tuned, finals, right_answers, tune
from lorica.recipes.observer import Observer


def run(
    config: CompareConfig,
    out: str | Path | None = None,
    observer: Observer | None = None,
    *,
    save_adapters: bool = False,
) -> Comparison:
    """Compare, and write results, table and plot to `out` if it is given (with `save_adapters` the winners too).

    Raises ConfigError, DataError, MissingError, StorageError for what is wrong with the whole; a method that does not
    fit the base is reported in `absent`.
    """
    if out is not None:
        reserve(Path(out))
    began = time.monotonic()
    torch.manual_seed(config.seeds[0])
    ready = prepare(config, observer or Observer())
    seconds = {"preparing": time.monotonic() - began}
    with tempfile.TemporaryDirectory(prefix="lorica-compare-") as folder:
        field = Field(ready.service, config.optimizer, config.steps, together=config.together, folder=Path(folder))
        started = time.monotonic()
        tuned = tune(ready, field)
        seconds["tuning"], started = time.monotonic() - started, time.monotonic()
        winners = {entry: best for entry, (_, best) in tuned.items() if best is not None}
        runs = finals(ready, field, winners)
        seconds["other seeds and answers"] = time.monotonic() - started
        adapters = None if out is None or not save_adapters else Path(out) / "adapters"
        rows = _rows(ready, field, tuned, runs, adapters)
    seconds["total"] = time.monotonic() - began
    found = Comparison(
        config=config.model_dump(mode="json", exclude={"optimizer": {"lr"}}),
        base=_base(ready),
        rows=tuple(sorted(rows, key=lambda row: row.loss)),
        absent=tuple(ready.absent),
        rows_of=ready.parts.counts(),
        said=ready.parts.said,
        environment=_environment(ready),
        seconds={name: round(value, 2) for name, value in seconds.items()},
        path=None if out is None else str(out),
    )
    if out is not None:
        write(found, Path(out))
    return found


def _rows(ready: Ready, field: Field, tuned: Tuned, runs: Runs, adapters: Path | None) -> list[Row]:
    rows = []
    for entry, (group, best) in tuned.items():
        rates = tuple(Rate(c.lr, dict(c.validation), c.test, c.dropped, c.beaten) for c in group)
        if best is None:
            said = "; ".join(f"lr {rate.lr:g}: {rate.dropped}" for rate in rates)
            ready.absent.append(Absent(entry.label, f"No learning rate could be trained to the end ({said})"))
            continue
        own = runs[entry]
        rows.append(
            Row(
                label=entry.label,
                method=entry.method.name,
                settings=entry.method.model_dump(mode="json"),
                targets=ready.targets(entry).model_dump(mode="json"),
                lr=best.lr,
                losses={seed: c.test for seed, (c, _) in own.items() if c.test is not None},
                exact={seed: right for seed, (c, right) in own.items() if c.test is not None},
                costs=ready.costs[entry],
                rates=rates,
                curve=tuple(best.losses),
                notes=tuple(_notes(ready.config, best, group, [c for c, _ in own.values()])),
            )
        )
        if adapters is not None:
            field.bring([best])
            best.live().note(_recipe(ready.config, best, rows[-1]), ready.parts.trained_on(ready.config.data.path))
            best.live().save(adapters / file_name(entry.label))
    return rows


def _recipe(config: CompareConfig, best: Candidate, row: Row) -> dict[str, Any]:
    """What a winner's lineage says of its training."""
    common = config.model_dump(mode="json", include={"model", "quantize", "optimizer", "steps", "batch_size"})
    common["optimizer"]["lr"] = best.lr
    method = {"name": row.method, **row.settings}
    return {"name": "compare", **common, "seed": best.seed, "method": method, "targets": row.targets}


def _notes(config: CompareConfig, best: Candidate, group: Sequence[Candidate], runs: Sequence[Candidate]) -> list[str]:
    edge = edge_note([c.lr for c in group], best.lr)
    failed = [f"Rate {c.lr:g}: {c.dropped}" for c in group if c.dropped]
    seeds = [f"Seed {c.seed}: {c.dropped}" for c in runs if c.dropped]
    return [*([edge] if edge else []), *failed, *seeds]


def _base(ready: Ready) -> Base:
    test = ready.parts.test
    results = ready.service.engine.forward([Item(example, None) for example in test])
    return Base(
        mean(test, [result.loss for result in results]),
        right_answers(ready, None),
        ready.backbone.parameter_count(),
    )


def _environment(ready: Ready) -> dict[str, Any]:
    """What the figures depend on besides the config."""
    clock = "wall time" if torch.cuda.is_available() or torch.get_num_threads() > 1 else "CPU time"
    pairs = ready.config.timing_pairs
    return {
        "lorica": lorica.__version__,
        "torch": torch.__version__.partition("+")[0],
        "threads": torch.get_num_threads(),
        "device": str(ready.backbone.device),
        "dtype": str(next(ready.backbone.module.parameters()).dtype).removeprefix("torch."),
        "base": ready.backbone.fingerprint(),
        "data": ready.parts.fingerprints,
        "timing": f"{clock} of a step, median of {pairs} pairs in turns with LoRA" if pairs else "times not measured",
    }
