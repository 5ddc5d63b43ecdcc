"""The few examples that weights are found by, and their loss as an objective.

In: a data file, a renderer; or a service with examples. Out: examples with where they came from, and a function that
gives an adapter's loss. Refuses to know searches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorica.adapters.adapter import Adapter
from lorica.adapters.lineage import Data
from lorica.client.local import Service
from lorica.core.errors import DataError
from lorica.data.example import Example, truncate
from lorica.data.records import load_records
from lorica.data.render import Renderer
from lorica.recipes.forgetting import mean_loss

Objective = Callable[[Adapter], float]
"""What is minimised: a number for a resident adapter, smaller is better. For an accuracy, return its negative."""


@dataclass(frozen=True, slots=True)
class FewShot:
    """Chosen rows: as examples, which they were, the file for the lineage, and what a length limit cost."""

    examples: tuple[Example, ...]
    where: tuple[str, ...]
    data: Data
    said: tuple[str, ...] = ()


def few_shot(path: str | Path, renderer: Renderer, count: int | None, *, seed: int = 0, max_length: int) -> FewShot:
    """`count` rows of a data file in an order that `seed` decides; None is all rows, in the file's order.

    Raises MissingError, DataError for the file, and DataError where it has fewer rows.
    """
    dataset = load_records(path)
    chosen = list(dataset.records)
    if count is not None:
        if count > len(chosen):
            raise DataError(
                f"{path} has {len(chosen)} rows, and {count} examples were asked for.",
                hint=f"`--examples {len(chosen)}` takes them all.",
            )
        random.Random(f"lorica few {seed}").shuffle(chosen)
        chosen = chosen[:count]
    kept, report = truncate([renderer.example(record) for record in chosen], max_length)
    said = (f"{path}: {report.sentence()}",) if report.count else ()
    data = Data(dataset.path, dataset.fingerprint, len(kept))
    return FewShot(tuple(kept), tuple(example.where for example in kept), data, said)


def loss_on(service: Service, examples: Sequence[Example], name: str = "few examples") -> Objective:
    """The mean `−log p` of all the answers' tokens, whatever the batches: `Σ w · −log p / Σ |w|`.

    Raises DataError where no token is trained.
    """
    return lambda adapter: mean_loss(service, adapter, examples, name)
