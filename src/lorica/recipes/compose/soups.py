"""LoRA-Soups: a weight for each of several adapters at every site, learnt by gradients on examples.

In: adapters over one service, examples, settings. Out: their composition as a plain adapter, beside no adapter, equal
weights and the best adapter alone. Refuses to know files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lorica.adapters.adapter import Adapter
from lorica.adapters.lineage import Data, Parent
from lorica.adapters.merging import make_merging
from lorica.adapters.merging.combine import combine
from lorica.adapters.parents import lineage_of
from lorica.adapters.soups import learnt_weights, soup_of
from lorica.client.local import Service, TrainingClient
from lorica.core.errors import MethodError
from lorica.data.example import Example
from lorica.data.packing import Sampler
from lorica.engine.host import Host
from lorica.recipes.compose.composer import composer, resident
from lorica.recipes.compose.composition import Composition, Row, acting_notes, sign
from lorica.recipes.compose.config import SoupsConfig
from lorica.recipes.compose.fewshot import Objective, loss_on
from lorica.training.optimizer import AdamWConfig

HOW = "lora_soups"
"""What the result's row and its log are called: the method that learns."""
Say = Callable[[str], None]


def learn_soup(
    service: Service,
    parents: Sequence[Adapter],
    examples: Sequence[Example],
    config: SoupsConfig | None = None,
    *,
    test: Objective | None = None,
    name: str = "composed",
    data: Data | None = None,
    say: Say | None = None,
) -> Composition:
    """Learn ω in `y = x W₀ᵀ + Σ_n ω_{l,n} s_n x A_nᵀ B_nᵀ`, N numbers at every site l, on the mean loss of examples.

    The factors stay frozen. The result holds them side by side, with their weights (the rule `cat`), and becomes
    resident; as any adapter it can be saved, merged and read by PEFT. Ranks and sites of the parents may differ. To
    train a soup with other losses, beside other tenants or on a server, take `adapters.soups.soup_of`.

    Args:
        service: where the parents' base is.
        parents: adapters whose changes are products of factors.
        examples: what ω is learnt on; the loss of all of them is what the report's rows compare.
        config: see `SoupsConfig`. test, name, data, say: as in `compose`.

    Raises: MergeError for a parent that is dense or has a bias; MethodError where the loss is not finite; DataError
    without a trained token; MismatchError, RouteError for what does not fit. Paper: arXiv 2410.13025.
    """
    config, say, host = config or SoupsConfig(), say or (lambda text: None), service.host
    objective, cat = loss_on(service, examples, "examples"), make_merging("cat")
    with resident(host, parents):
        soup = soup_of(
            parents, host.backbone, weighting=config.weighting, spread=config.spread, name=name, seed=config.seed
        )
        origins = lineage_of(soup).of("merged-from")
        say(f"scoring {len(parents)} adapters alone")
        alone = [objective(parent) for parent in parents]
        rows = _compared(host, parents, alone, objective, test, name, origins)
        losses = _train(service, soup, examples, config, say)
        learnt = learnt_weights(soup)
        made, report = combine(
            parents, host.backbone, cat, learnt, name=name, origins=lineage_of(soup).of("merged-from")
        )
        host.put(made)
        rows.append(_row(HOW, made, objective, test, None))
    settings = config.model_dump(mode="json")
    sign(made, {"learnt": {"how": HOW, **settings}}, data)
    log: dict[str, Any] = {
        "settings": {"how": HOW, **settings},
        "data": None if data is None else asdict(data),
        "losses": losses,
        "weights": learnt,
    }
    scores = {parent.name: score for parent, score in zip(parents, alone, strict=True)}
    names = tuple(parent.name for parent in parents)
    return Composition(made, report, names, scores, tuple(rows), acting_notes(parents), log)


def _compared(
    host: Host,
    parents: Sequence[Adapter],
    alone: Sequence[float],
    objective: Objective,
    test: Objective | None,
    name: str,
    origins: Sequence[Parent],
) -> list[Row]:
    """No adapter, equal weights at every site, the best adapter alone."""
    count = len(parents)
    best = min(range(count), key=lambda n: alone[n])
    with composer(host, parents, make_merging("cat"), name, origins) as maker:
        rows = [
            _row(label, maker.at(weights), objective, test, weights)
            for label, weights in (("zero", [0.0] * count), ("uniform", [1 / count] * count))
        ]
    one_hot = [float(n == best) for n in range(count)]
    return [*rows, _row("best single", parents[best], objective, test, one_hot)]


def _row(
    name: str, adapter: Adapter, objective: Objective, test: Objective | None, weights: Sequence[float] | None
) -> Row:
    tested = None if test is None else float(test(adapter))
    return Row(name, None if weights is None else tuple(weights), float(objective(adapter)), None, tested)


def _train(service: Service, soup: Adapter, examples: Sequence[Example], config: SoupsConfig, say: Say) -> list[float]:
    """Train ω, and return the loss of every step; afterwards the soup is no longer resident.

    Raises MethodError where a loss or gradient is not finite.
    """
    batches = Sampler(examples, batch_size=config.batch_size, seed=config.seed)
    say(f"learning {soup.layout.trainable_count():,} weights at {len(soup.layout.sites)} sites, {config.steps} steps")
    client = TrainingClient(service, service.host.put(soup), AdamWConfig(lr=config.lr, clip=None), steps=config.steps)
    losses: list[float] = []
    try:
        for step in range(config.steps):
            losses.append(client.forward_backward([examples[i] for i in next(batches)]).mean)
            if not (math.isfinite(losses[-1]) and math.isfinite(client.optim_step().grad_norm)):
                raise MethodError(
                    f"The loss of step {step + 1} is not finite, so no weights were learnt.",
                    hint="Lower the learning rate (`--lr`).",
                )
    finally:
        service.host.delete(soup.name)
    return losses
