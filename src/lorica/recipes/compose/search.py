"""Gradient-free search over a box of weights, and random search of the same budget.

In: a loss of weights, how many weights, settings. Out: every evaluation in order, and the optimiser's name and version.
Deterministic for a seed. Refuses to know adapters, examples and what the loss is.
"""

from __future__ import annotations

import importlib
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorica.core.errors import ConfigError, MethodError, MissingError, did_you_mean
from lorica.recipes.compose.config import ComposeConfig

Loss = Callable[[Sequence[float]], float]
NOISE = "COBYLA: "
"""How scipy's remarks on settings begin that nevergrad makes, and nobody can change."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Weights, their loss, and `value = loss + l1 · mean|w|`, which is what is minimised."""

    weights: tuple[float, ...]
    loss: float
    value: float


@dataclass(frozen=True, slots=True)
class Found:
    """A search: its evaluations in order, who chose them, and what the optimiser remarked."""

    evaluations: tuple[Evaluation, ...]
    optimizer: str
    version: str
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Evaluation:
        return best_of(self.evaluations)


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The first one of the smallest value."""
    return min(evaluations, key=lambda one: one.value)


def evaluate(loss: Loss, weights: Sequence[float], l1: float) -> Evaluation:
    """`J(w) = loss(w) + l1 · (1/N) Σ|w_n|`; a loss that is not finite counts as infinite."""
    given = tuple(float(w) for w in weights)
    found = float(loss(given))
    found = found if math.isfinite(found) else math.inf
    return Evaluation(given, found, found + l1 * sum(map(abs, given)) / len(given))


def search(loss: Loss, count: int, config: ComposeConfig) -> Found:
    """Minimise J over [−bound, bound]^count: `budget` evaluations, the first of which is at zero.

    What is best is the best of all evaluations, so it is never worse than zero; nevergrad's own recommendation may be a
    point that was not evaluated. Raises MissingError without nevergrad or what an optimiser needs; ConfigError for an
    optimiser that is unknown or chooses another one; MethodError where the loss at zero is not finite.
    """
    nevergrad = _nevergrad()
    name = optimizer_name(config.optimizer)
    notes: dict[str, None] = {}
    with _ready(nevergrad, name, count, config, notes) as (optimizer, candidate):
        done: list[Evaluation] = []
        while True:
            done.append(evaluate(loss, candidate.value.tolist(), config.l1))
            if not math.isfinite(done[0].value):
                raise MethodError("The objective is not finite at weights of zero, where no adapter acts.")
            if len(done) == config.budget:
                return Found(tuple(done), name, nevergrad.__version__, tuple(notes))
            finite = [one.value for one in done if math.isfinite(one.value)]
            # an optimiser that fits models to values is told a number instead of infinity: worse than all others
            told = done[-1].value if math.isfinite(done[-1].value) else 2 * max(finite) - min(finite) + 1
            with _contained(notes):
                optimizer.tell(candidate, told)
                candidate = optimizer.ask()


def random_search(loss: Loss, count: int, config: ComposeConfig) -> tuple[Evaluation, ...]:
    """`budget` evaluations of weights drawn uniformly from the box."""
    rng = random.Random(f"lorica compose {config.seed}")
    draws = ([rng.uniform(-config.bound, config.bound) for _ in range(count)] for _ in range(config.budget))
    return tuple(evaluate(loss, weights, config.l1) for weights in draws)


def optimizer_name(name: str) -> str:
    """The registered name of an optimiser, whatever the case it is written in.

    Raises ConfigError for an unknown one, and for those that choose another optimiser by budget, dimension and version.
    """
    nevergrad = _nevergrad()
    registry: dict[str, Any] = nevergrad.optimizers.registry
    same = [known for known in registry if known.lower() == name.lower()]
    found = name if name in same else (same[0] if len(same) == 1 else None)
    if found is None:
        near = did_you_mean(name, same or registry)
        raise ConfigError(f"nevergrad has no optimiser {name!r}.{near}")
    chooser = importlib.import_module("nevergrad.optimization.optimizerlib").NGOptBase
    if isinstance(registry[found], type) and issubclass(registry[found], chooser):
        raise ConfigError(
            f"{found} chooses another optimiser by budget, number of adapters and version of nevergrad, so a result "
            "would not say what found it.",
            hint="Name one, e.g. `Cobyla`, which is what NGOpt takes for few evaluations.",
        )
    return found


def _nevergrad() -> Any:
    try:
        return importlib.import_module("nevergrad")
    except ImportError:
        raise MissingError(
            "Weights are searched by nevergrad, which is not installed.", hint="pip install 'lorica[compose]'"
        ) from None


@contextmanager
def _ready(
    nevergrad: Any, name: str, count: int, config: ComposeConfig, notes: dict[str, None]
) -> Iterator[tuple[Any, Any]]:
    """An optimiser and its first candidate, zero; its thread, if it has one, is ended."""
    optimizer, candidate = _first(nevergrad, name, count, config, notes, suggested=False)
    if any(candidate.value):
        _stop(optimizer)
        optimizer, candidate = _first(nevergrad, name, count, config, notes, suggested=True)
    try:
        yield optimizer, candidate
    finally:
        _stop(optimizer)


def _first(
    nevergrad: Any, name: str, count: int, config: ComposeConfig, notes: dict[str, None], *, suggested: bool
) -> tuple[Any, Any]:
    with _contained(notes):
        space = nevergrad.p.Array(init=[0.0] * count, lower=[-config.bound] * count, upper=[config.bound] * count)
        space.random_state = np.random.RandomState(config.seed)
        try:
            optimizer = nevergrad.optimizers.registry[name](parametrization=space, budget=config.budget, num_workers=1)
            if suggested:
                optimizer.suggest([0.0] * count)
            return optimizer, optimizer.ask()
        except ImportError as error:
            raise MissingError(
                f"nevergrad's optimiser {name} needs a package that is not installed: {error.name}.",
                hint="`Cobyla` and `OnePlusOne` need no other.",
            ) from None


@contextmanager
def _contained(notes: dict[str, None]) -> Iterator[None]:
    """Inside, warnings become notes, each once, and draws from numpy's global state are taken back."""
    before = np.random.get_state()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        np.random.set_state(before)
    notes.update({str(one.message): None for one in caught if not str(one.message).startswith(NOISE)})


def _stop(optimizer: Any) -> None:
    """End the thread of an optimiser that runs a library's own loop; unstopped, Python would wait for it at exit."""
    thread = getattr(optimizer, "_messaging_thread", None)
    if thread is not None:
        thread.stop()
