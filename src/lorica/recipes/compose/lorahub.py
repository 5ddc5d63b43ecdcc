"""LoraHub: a weight for each of several adapters, searched without gradients on a few examples.

In: adapters over one host, an objective, settings. Out: their composition, beside what it must be compared with: no
adapter, equal weights, the best adapter alone, random search. Refuses to know data, files and where the objective
comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lorica.adapters.adapter import Adapter
from lorica.adapters.lineage import Data
from lorica.adapters.merging.combine import combine
from lorica.adapters.merging.provenance import origins_of
from lorica.core.errors import ConfigError, MergeError
from lorica.engine.host import Host
from lorica.recipes.compose.composer import Composer, composer, resident
from lorica.recipes.compose.composition import Composition, Row, acting_notes, sign
from lorica.recipes.compose.config import ComposeConfig
from lorica.recipes.compose.fewshot import Objective
from lorica.recipes.compose.search import Evaluation, Found, best_of, evaluate, optimizer_name, random_search, search

Say = Callable[[str], None]


def compose(
    host: Host,
    parents: Sequence[Adapter],
    objective: Objective,
    config: ComposeConfig | None = None,
    *,
    test: Objective | None = None,
    name: str = "composed",
    data: Data | None = None,
    say: Say | None = None,
) -> Composition:
    """Minimise `J(w) = objective(adapter of w) + l1 · (1/N) Σ|w_n|` over `w ∈ [−bound, bound]^N`, beginning at zero.

    By default the adapter of w is `ΔW = s (Σ w_n B_n)(Σ w_n A_n)` at every site, the same w everywhere; another rule of
    merging may be named. The result is the best of all evaluations. The objective is asked for every parent alone, for
    equal weights, `budget` times by the search and `budget` times by random search, and once for the result.

    Args:
        host: where the parents' base is; the result becomes resident in it.
        parents: adapters of this base. The candidates that score best alone are kept where `config.candidates` says so.
        objective: of a resident adapter; smaller is better. One adapter object may be asked with other values later.
        config: see `ComposeConfig`.
        test: measured for every row of the report at the end, and chosen by nowhere.
        name: of the result. data: what the objective is computed on, for the lineage. say: told what is being done.

    Raises: MergeError where the rule cannot combine the parents (ranks that differ, dense changes); MissingError
    without nevergrad; ConfigError, MismatchError, RouteError for what does not fit. Paper: arXiv 2307.13269.
    """
    config, say = config or ComposeConfig(), say or (lambda text: None)
    _check(parents, config)
    rule, origins = config.rule(), origins_of(parents, host.backbone, None)
    combine(parents, host.backbone, rule, name=name, origins=origins)  # what does not fit is said before all asking
    with resident(host, parents):
        say(f"scoring {len(parents)} adapters alone")
        alone = [_finite(objective(parent)) for parent in parents]
        kept = best_candidates(alone, config.candidates)
        chosen, known = [parents[n] for n in kept], [origins[n] for n in kept]
        with composer(host, chosen, rule, name, known) as maker:
            found, drawn, others = _searched(maker, objective, config, say)
            single = best_single([alone[n] for n in kept], config.l1)
            rows = [_row(label, one, test, maker.at(one.weights)) for label, one in others.items()]
            rows.insert(2, _row("best single", single, test, chosen[single.weights.index(1.0)]))
        best = found.best
        made, report = combine(chosen, host.backbone, rule, best.weights, name=name, origins=known)
        host.put(made)
        result = evaluate(lambda weights: objective(made), best.weights, config.l1)
        rows.append(_row(rule.name, result, test, made))
    log = log_of(config, found, drawn, data)
    sign(made, {"search": {**log["settings"], "optimizer": log["optimizer"]}}, data)
    names = tuple(parent.name for parent in chosen)
    scores = {parent.name: score for parent, score in zip(parents, alone, strict=True)}
    notes = (*acting_notes(chosen), *remarks(found, rows, config))
    return Composition(made, report, names, scores, tuple(rows), notes, log)


def _searched(
    maker: Composer, objective: Objective, config: ComposeConfig, say: Say
) -> tuple[Found, tuple[Evaluation, ...], dict[str, Evaluation]]:
    """The search, random search, and what is to be compared: zero, equal weights, the best of random search."""
    count = len(maker.parents)

    def loss(weights: Sequence[float]) -> float:
        return objective(maker.at(weights))

    say(f"searching {count} weights, {config.budget} evaluations")
    found = search(loss, count, config)
    say(f"random search, {config.budget} evaluations")
    drawn = random_search(loss, count, config)
    uniform = evaluate(loss, [1 / count] * count, config.l1)
    return found, drawn, {"zero": found.evaluations[0], "uniform": uniform, "random search": best_of(drawn)}


def _check(parents: Sequence[Adapter], config: ComposeConfig) -> None:
    """What can be known before anything is computed."""
    if not parents:
        raise MergeError("There is no adapter to compose.")
    if len({parent.name for parent in parents}) < len(parents) or len(set(map(id, parents))) < len(parents):
        raise MergeError("An adapter is given twice; one weight for each is right.")
    check_search(len(parents), config)


def check_search(count: int, config: ComposeConfig) -> None:
    """Raises ConfigError where more candidates are to be kept than there are, and for an optimiser that is unknown."""
    if config.candidates is not None and config.candidates > count:
        raise ConfigError(f"{config.candidates} candidates are to be kept of {count} adapters.")
    optimizer_name(config.optimizer)


def _finite(loss: float) -> float:
    return float(loss) if math.isfinite(loss) else math.inf


def best_candidates(alone: Sequence[float], most: int | None) -> list[int]:
    """The adapters that score best alone, in their order; of equals the earlier ones."""
    return sorted(sorted(range(len(alone)), key=lambda n: alone[n])[:most])


def best_single(alone: Sequence[float], l1: float) -> Evaluation:
    """The best adapter alone as an evaluation: weight 1 for it, 0 for the others."""
    best = min(range(len(alone)), key=lambda n: alone[n])
    weights = tuple(float(n == best) for n in range(len(alone)))
    return Evaluation(weights, alone[best], alone[best] + l1 / len(alone))


def _row(name: str, found: Evaluation, test: Objective | None, adapter: Adapter) -> Row:
    return Row(name, found.weights, found.loss, found.value, None if test is None else float(test(adapter)))


def log_of(
    config: ComposeConfig, found: Found, drawn: Sequence[Evaluation], data: Data | None = None
) -> dict[str, Any]:
    """Settings, seed, optimiser and every evaluation."""
    return {
        "settings": config.model_dump(mode="json"),
        "optimizer": {"name": found.optimizer, "nevergrad": found.version, "seed": config.seed},
        "data": None if data is None else asdict(data),
        "evaluations": [asdict(one) for one in found.evaluations],
        "random": [asdict(one) for one in drawn],
    }


def remarks(found: Found, rows: Sequence[Row], config: ComposeConfig) -> list[str]:
    """What a reader of the result should know."""
    said, count = [f"nevergrad: {note}" for note in found.notes], len(found.best.weights)
    if found.optimizer == "Cobyla" and config.budget <= count + 1:
        said.append(
            f"Cobyla's first simplex takes {count + 1} evaluations, so a budget of {config.budget} only tried adapters "
            "one by one."
        )
    outer = sum(abs(w) > 0.99 * config.bound for w in found.best.weights)
    if outer:
        said.append(f"{outer} of {count} weights are at the bound of ±{config.bound:g}, and might go on beyond it.")
    lost = sum(not math.isfinite(one.loss) for one in found.evaluations)
    if lost:
        said.append(f"{lost} of {len(found.evaluations)} evaluations were not finite; they counted as worst.")
    better = [row for row in rows[:-1] if row.loss < rows[-1].loss]
    if better:
        best = min(better, key=lambda row: row.loss)
        said.append(f"{best.name} has a lower loss ({best.loss:.4f}) than what the search found ({rows[-1].loss:.4f}).")
    return said
