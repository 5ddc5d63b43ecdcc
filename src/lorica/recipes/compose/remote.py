"""LoraHub on a server: the same search, whose every candidate the server combines and measures.

In: a client, checkpoints' paths, examples, settings. Out: the composed adapter's path, rows, log.
No base is loaded here. Refuses to know HTTP and engines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorica.client.remote import ServiceClient, prompt_of
from lorica.core.errors import DataError, MergeError
from lorica.core.jsonable import plain
from lorica.data.example import Example
from lorica.recipes.compose.composition import Row
from lorica.recipes.compose.config import ComposeConfig
from lorica.recipes.compose.lorahub import (
    Say,
    best_candidates,
    best_single,
    check_search,
    log_of,
    remarks,
)
from lorica.recipes.compose.search import best_of, evaluate, random_search, search


@dataclass(frozen=True, slots=True)
class Hosted:
    """A composed adapter that a server holds: its path, what it was made of, rows as in `Composition`, notes, log."""

    path: str
    parents: tuple[str, ...]
    alone: dict[str, float]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    log: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; what is not finite is null."""
        found = {"path": self.path, "adapters": self.parents, "alone": self.alone, "notes": self.notes, **self.log}
        made = plain({**found, "rows": [asdict(row) for row in self.rows]})
        assert isinstance(made, dict)
        return made


def hosted_loss(client: ServiceClient, path: str, examples: Sequence[Example]) -> float:
    """`Σ w · −log p / Σ |w|` of examples' answers under a checkpoint, by prefill alone; what is not finite is infinite.

    Raises DataError for an example without a trained token, and for a path that the server refuses.
    """
    sampler = client.create_sampling_client(path).result()
    asked = [sampler.compute_logprobs(prompt_of(example)) for example in examples]
    total = weight = 0.0
    for example, future in zip(examples, asked, strict=True):
        told = [0.0 if found is None else found for found in future.result()]
        total -= math.fsum(w * found for w, found in zip(example.weights, told, strict=True) if w)
        weight += sum(map(abs, example.weights))
    if not weight:
        raise DataError("No token of the examples is trained, so they have no loss.")
    found = total / weight
    return found if math.isfinite(found) else math.inf


def compose_on_server(
    client: ServiceClient,
    paths: Sequence[str],
    examples: Sequence[Example],
    config: ComposeConfig | None = None,
    *,
    name: str,
    test: Sequence[Example] | None = None,
    overwrite: bool = False,
    say: Say | None = None,
) -> Hosted:
    """`lorica.recipes.compose.compose` for checkpoints of one base that a server holds.

    For every weights the server combines the checkpoints into `NAME-search`, which is deleted at the end, and tells the
    examples' log-probabilities under it. Arguments, rows and errors are those of `compose`; DataError and MissingError
    for what the server refuses.
    """
    config, say = config or ComposeConfig(), say or (lambda text: None)
    if len(set(paths)) < len(paths):
        raise MergeError("An adapter is given twice; one weight for each is right.")
    check_search(len(paths), config)
    maker = _Maker(client, config, f"{name}-search")
    ones = [1.0] * len(paths)
    scratch = maker.made(ones, paths, maker.scratch, anew=False)  # what does not fit, or is taken, is told first
    try:
        reserved = None if overwrite else maker.made(ones, paths, name, anew=False)
        try:
            return _searched(maker, paths, examples, test, name, say)
        except BaseException:
            if reserved is not None:
                client.delete(reserved)
            raise
    finally:
        client.delete(scratch)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Asks the server for candidates, one after the other in the place `scratch`."""

    client: ServiceClient
    config: ComposeConfig
    scratch: str

    def made(self, weights: Sequence[float], paths: Sequence[str], name: str, *, anew: bool) -> str:
        """The path of the checkpoints combined with these weights."""
        rule, parameters = self.config.how, self.config.parameters
        return self.client.merge(paths, name, rule, weights=weights, overwrite=anew, **parameters)

    def loss(self, weights: Sequence[float], paths: Sequence[str], examples: Sequence[Example]) -> float:
        """The examples' loss under them."""
        return hosted_loss(self.client, self.made(weights, paths, self.scratch, anew=True), examples)


def _searched(
    maker: _Maker,
    paths: Sequence[str],
    examples: Sequence[Example],
    test: Sequence[Example] | None,
    name: str,
    say: Say,
) -> Hosted:
    config = maker.config
    say(f"scoring {len(paths)} adapters alone")
    alone = [hosted_loss(maker.client, path, examples) for path in paths]
    kept = best_candidates(alone, config.candidates)
    chosen = [paths[n] for n in kept]

    def loss(weights: Sequence[float]) -> float:
        return maker.loss(weights, chosen, examples)

    say(f"searching {len(chosen)} weights, {config.budget} evaluations")
    found = search(loss, len(chosen), config)
    say(f"random search, {config.budget} evaluations")
    drawn = random_search(loss, len(chosen), config)
    others = {
        "zero": found.evaluations[0],
        "uniform": evaluate(loss, [1 / len(chosen)] * len(chosen), config.l1),
        "best single": best_single([alone[n] for n in kept], config.l1),
        "random search": best_of(drawn),
        config.how: found.best,
    }
    path = maker.made(found.best.weights, chosen, name, anew=True)
    rows = [
        Row(label, one.weights, one.loss, one.value, None if test is None else maker.loss(one.weights, chosen, test))
        for label, one in others.items()
    ]
    scores, notes = dict(zip(paths, alone, strict=True)), tuple(remarks(found, rows, config))
    return Hosted(path, tuple(chosen), scores, tuple(rows), notes, log_of(config, found, drawn))
