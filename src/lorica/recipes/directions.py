"""Directions from two sides of rows, answers under interventions with their controls, and tables of scalars.

In: a service with adapters, rows whose tokens have parts, directions. Out: directions that say how they were made;
samples by condition; tables. Random directions of equal norm stand beside every intervention without being asked for.
Refuses to know files, judges and terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from lorica.adapters.analysis.directions import Directions, mean_difference, random_like
from lorica.adapters.analysis.directions_scalars import ScalarTable, TokenLine
from lorica.adapters.targets import layer_numbers
from lorica.client.local import Service
from lorica.core.config import Config
from lorica.core.errors import DataError
from lorica.data.render import Renderer
from lorica.data.token_parts import Parted, Which
from lorica.engine.host import Host, RowSpec, TargetSpec
from lorica.engine.interventions import adapter_steer, adapter_turn, adapter_zero, project_out, steer
from lorica.engine.recording import Seen, record_means, record_scalars
from lorica.engine.sample import Sample
from lorica.sampling.params import SamplingParams

LIMITS = (
    "A difference of means says where two sides differ on these rows, in whatever they differ in: topic and length "
    "count too. It proves no cause; compare with the random directions, on answers that it was not made from."
)
SCALAR_LIMITS = (
    "The sign of c is that of A and B together: compare tokens at a site, not the signs of sites. A large c says what "
    "the adapter writes, not what the layers behind it make of that."
)
PLAIN = "as it is"
"""The condition without an intervention."""


class DirectionSettings(Config):
    """Which tokens a mean is over, and at which blocks."""

    tokens: Which = Field("answer", description="the tokens that count: `question`, `answer` or `all`")
    header_in_answer: bool = Field(
        True, description="whether the header of the assistant's turn counts as answer, as it does in the paper's code"
    )
    layers: str | None = Field(None, description="blocks such as `0-3,7`; without, all")


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a difference: rows, and the adapter (or stack, or None for the base) that reads them."""

    name: str
    rows: Sequence[Parted]
    adapter: RowSpec = None


def extract(service: Service, first: Side, second: Side, settings: DirectionSettings | None = None) -> Directions:
    """`v_l = mean(h_l | first) − mean(h_l | second)` at block outputs, over tokens, not over rows.

    Two classes of answers read by one model, the same rows read by two models, or both: the sides say. Raises DataError
    for a side without rows or a row without such tokens, TargetError for layers that are not there. Paper: arXiv
    2506.11618.
    """
    settings, host = settings or DirectionSettings(), service.host
    layers = None if settings.layers is None else layer_numbers(settings.layers, host.backbone.blocks)
    means, told = [], []
    for side in (first, second):
        if not side.rows:
            raise DataError(f"There are no rows of {side.name!r}, so there is no mean.")
        masks = [row.mask(settings.tokens, header_in_answer=settings.header_in_answer) for row in side.rows]
        seen = [Seen(row.tokens, mask, side.adapter) for row, mask in zip(side.rows, masks, strict=True)]
        means.append(record_means(host, seen, layers))
        count = sum(sum(mask) for mask in masks)
        told.append({"name": side.name, "adapter": _names(host, side.adapter), "rows": len(side.rows), "tokens": count})
    about = {
        "how": "difference of token-weighted means of block outputs, first minus second",
        "base": {"name": host.backbone.name, "fingerprint": host.backbone.fingerprint()},
        "settings": settings.model_dump(mode="json"),
        "sides": told,
        "limits": LIMITS,
    }
    return mean_difference(means[0], means[1], about)


def _names(host: Host, spec: RowSpec) -> list[str]:
    return [adapter.name for adapter in host.stacks([spec])[0]]


# -- interventions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Condition:
    """One way to run a host: what it is called, and the context to run it in. `control` marks random directions."""

    name: str
    enter: Callable[[Host], AbstractContextManager[None]] = field(repr=False)
    control: bool = False


def conditions(
    directions: Directions,
    *,
    kappas: Sequence[float] = (),
    ablate: bool = False,
    layers: Collection[int] | None = None,
    controls: int = 3,
    seed: int = 0,
) -> list[Condition]:
    """The model as it is, then each intervention with `controls` random directions of equal norm after it.

    Random direction i is drawn by (seed + i). Raises MethodError for a layer without a direction.
    """
    chosen = directions if layers is None else directions.only(layers)
    kinds: list[tuple[str, Callable[[Host, Directions], AbstractContextManager[None]]]] = []
    if ablate:
        kinds.append(("ablate", project_out))
    kinds += [(f"steer {kappa:+g}", _steering(kappa)) for kappa in kappas]
    found = [Condition(PLAIN, lambda host: nullcontext())]
    for name, make in kinds:
        found.append(Condition(name, _entering(make, chosen)))
        found += [
            Condition(f"{name}, random {i}", _entering(make, random_like(chosen, seed + i)), control=True)
            for i in range(controls)
        ]
    return found


def adapter_conditions(
    adapter: str, *, kappas: Sequence[float] = (), targets: TargetSpec = None, controls: int = 3, seed: int = 0
) -> list[Condition]:
    """The model as it is, then with a rank-1 adapter silent at these sites, with `controls` random adapters of equal
    norm in its place, and with `κ B/‖B‖` written everywhere. Random adapter i is drawn by (seed + i).
    """

    def turned(number: int) -> Callable[[Host], AbstractContextManager[None]]:
        return lambda host: adapter_turn(host, adapter, seed=seed + number, targets=targets)

    def written(kappa: float) -> Callable[[Host], AbstractContextManager[None]]:
        return lambda host: adapter_steer(host, adapter, kappa, targets=targets)

    found = [Condition(PLAIN, lambda host: nullcontext())]
    found.append(Condition("silent", lambda host: adapter_zero(host, adapter, targets=targets)))
    found += [Condition(f"random adapter {i}", turned(i), control=True) for i in range(controls)]
    return [*found, *(Condition(f"writes {kappa:+g}", written(kappa)) for kappa in kappas)]


def _steering(kappa: float) -> Callable[[Host, Directions], AbstractContextManager[None]]:
    return lambda host, directions: steer(host, directions, kappa)


def _entering(
    make: Callable[[Host, Directions], AbstractContextManager[None]], directions: Directions
) -> Callable[[Host], AbstractContextManager[None]]:
    return lambda host: make(host, directions)


def sample_under(
    service: Service,
    adapter: RowSpec,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    chosen: Sequence[Condition],
) -> dict[str, list[Sample]]:
    """The answers to the same prompts, drawn from the same seeds, in every condition."""
    client, found = service.sampling_client(adapter), {}
    for condition in chosen:
        with condition.enter(service.host):
            found[condition.name] = client.sample(prompts, params)
    return found


# -- scalars -----------------------------------------------------------------------------------------------------------


def scalar_table(
    service: Service,
    renderer: Renderer,
    rows: Sequence[Parted],
    adapter: str,
    *,
    labels: Sequence[Mapping[str, str]] | None = None,
    targets: TargetSpec = None,
) -> ScalarTable:
    """`c` of a rank-1 adapter at every token of the rows, which it reads itself, with the token's text and part.

    Raises MethodError where the adapter is not of rank 1. Paper: arXiv 2506.11618.
    """
    told = [{}] * len(rows) if labels is None else labels
    seen = [Seen(row.tokens, [True] * len(row.tokens), adapter) for row in rows]
    sites, found = record_scalars(service.host, seen, adapter, targets=targets)
    lines = []
    for number, (row, label, scalars_TK) in enumerate(zip(rows, told, found, strict=True)):
        for place, (token, part, values) in enumerate(zip(row.tokens, row.parts, scalars_TK.tolist(), strict=True)):
            text = str(renderer.tokenizer.decode([token], skip_special_tokens=False))
            lines.append(TokenLine(number, place, token, text, part, label, tuple(values)))
    backbone = service.host.backbone
    about: dict[str, Any] = {
        "how": "c = s (A·h) ‖B‖ of each token",
        "base": {"name": backbone.name, "fingerprint": backbone.fingerprint()},
        "adapter": adapter,
        "limits": SCALAR_LIMITS,
    }
    return ScalarTable(sites, tuple(lines), about)
