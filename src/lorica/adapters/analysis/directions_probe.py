"""Which rank-1 adapters tell two classes of tokens apart: L1 logistic regression on their scalars, repeated.

In: scalars [N, K] of N tokens at K sites, labels. Out: accuracy and coefficients, mean over repeats; over four
contrasts, which sites carry the behaviour in general and which the domain. scikit-learn is imported when it is used.
Refuses to know models and files.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from lorica.core.config import Config
from lorica.core.errors import DataError, MissingError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Role = Literal["general", "domain", "none", "unclear"]
CONTRASTS = (
    "behaviour, outside the domain",
    "behaviour, inside the domain",
    "domain, without the behaviour",
    "domain, with the behaviour",
)
"""The paper's four: misaligned or aligned without and with medicine; medicine or not, aligned and misaligned."""
LIMITS = (
    "A probe says that a site's scalar goes with a class on these tokens, not that it causes it. L1 gives weight to one"
    " of several sites that say the same, so a site without weight may carry it too; silence it and see."
)


class ProbeConfig(Config):
    """How a probe is fitted; the defaults are the paper's (arXiv 2506.11618)."""

    C: float = Field(
        0.01,
        gt=0,
        description="inverse strength of the L1 penalty, beside a SUM over tokens: with few, all weighs zero",
    )
    max_iter: int = Field(1000, ge=1, description="most iterations of liblinear")
    test_share: float = Field(0.2, gt=0, lt=1, description="share of each class that is held out to measure accuracy")
    repeats: int = Field(20, ge=1, description="times that classes are balanced, split and fitted anew")
    seed: int = Field(0, description="of the draws")
    steady: float = Field(
        0.9,
        gt=0.5,
        le=1,
        description="share of repeats in which a coefficient must have one sign for its site to count",
    )


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One contrast. By site: mean and spread of the coefficient (of the standardised scalar), and the share of repeats
    in which it had its commoner sign. `positive` and `negative` are tokens before balancing; `unconverged` counts fits
    that ran out of iterations.
    """

    accuracy: float
    accuracy_spread: float
    coefficients: Mapping[str, float]
    spreads: Mapping[str, float]
    steady: Mapping[str, float]
    positive: int
    negative: int
    repeats: int
    unconverged: int

    def weighs(self, site: str, config: ProbeConfig) -> bool:
        """Whether the site's coefficient has one sign in enough repeats."""
        return self.steady[site] >= config.steady


@dataclass(frozen=True, slots=True)
class ContrastReport:
    """Four probes, and of each site its role and the sign by which its scalar was multiplied: with it, positive speaks
    for the behaviour (where the site does not weigh there, for the domain), whichever sign A and B happen to have.
    """

    contrasts: Mapping[str, ProbeResult]
    roles: Mapping[str, Role]
    signs: Mapping[str, int]


def probe(
    scalars_NK: ArrayLike,
    positive_N: ArrayLike,
    sites: Sequence[str],
    config: ProbeConfig | None = None,
    *,
    groups_N: Sequence[int] | None = None,
) -> ProbeResult:
    """Fit `positive` against the rest on standardised scalars, classes balanced, and measure on held-out tokens.

    With `groups_N` (the answer of each token) whole answers are held out: tokens of one answer resemble each other, and
    an accuracy over split answers is too high. Raises DataError where a class is too small or a value is not finite,
    MissingError without scikit-learn.
    """
    config = config or ProbeConfig()
    x_NK, y_N = np.asarray(scalars_NK, dtype=np.float64), np.asarray(positive_N, dtype=bool)
    if x_NK.ndim != 2 or x_NK.shape != (len(y_N), len(sites)) or not np.isfinite(x_NK).all():
        raise DataError(
            f"A probe reads finite scalars of shape [tokens, sites]; {x_NK.shape} came with {len(y_N)} labels and "
            f"{len(sites)} sites."
        )
    model, units_N = _regression(config), np.arange(len(y_N)) if groups_N is None else np.asarray(groups_N)
    rng = np.random.default_rng(config.seed)
    scores, rows, late = [], [], 0
    for _ in range(config.repeats):
        train_M, test_M = _divided(y_N, units_N, config.test_share, rng)
        mean_K, std_K = x_NK[train_M].mean(0), x_NK[train_M].std(0)
        std_K[std_K == 0] = 1.0  # a scalar that never changes tells nothing, and keeps a coefficient of zero
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*failed to converge.*")  # counted instead
            model.fit((x_NK[train_M] - mean_K) / std_K, y_N[train_M])
        late += int(np.max(model.n_iter_) >= config.max_iter)
        scores.append(float(model.score((x_NK[test_M] - mean_K) / std_K, y_N[test_M])))
        rows.append(model.coef_[0].copy())
    found_PK = np.array(rows)
    signs_K = np.maximum((found_PK > 0).mean(0), (found_PK < 0).mean(0))
    spread = (lambda v: v.std(0, ddof=1)) if config.repeats > 1 else (lambda v: np.zeros(v.shape[1:]))
    return ProbeResult(
        accuracy=float(np.mean(scores)),
        accuracy_spread=float(spread(np.array(scores))),
        coefficients=_by_site(sites, found_PK.mean(0)),
        spreads=_by_site(sites, spread(found_PK)),
        steady=_by_site(sites, signs_K),
        positive=int(y_N.sum()),
        negative=int((~y_N).sum()),
        repeats=config.repeats,
        unconverged=late,
    )


def contrasts(
    scalars_NK: ArrayLike,
    behaviour_N: ArrayLike,
    domain_N: ArrayLike,
    sites: Sequence[str],
    config: ProbeConfig | None = None,
    *,
    groups_N: Sequence[int] | None = None,
) -> ContrastReport:
    """The four contrasts of `CONTRASTS`, and from them each site's role: `general` where it weighs in both of the first
    two, `domain` where it weighs in both of the last two and in none of the first, `none` where it weighs in none,
    else `unclear`. Raises what `probe` raises, naming the contrast.
    """
    config = config or ProbeConfig()
    x_NK = np.asarray(scalars_NK, dtype=np.float64)
    behaviour, domain = np.asarray(behaviour_N, dtype=bool), np.asarray(domain_N, dtype=bool)
    plan = ((~domain, behaviour), (domain, behaviour), (~behaviour, domain), (behaviour, domain))
    found: dict[str, ProbeResult] = {}
    for name, (within, label) in zip(CONTRASTS, plan, strict=True):
        groups = None if groups_N is None else np.asarray(groups_N)[within].tolist()
        try:
            found[name] = probe(x_NK[within], label[within], sites, config, groups_N=groups)
        except DataError as error:
            raise DataError(f"Contrast {name!r}: {error.message}", hint=error.hint) from None
    first, second = CONTRASTS[:2], CONTRASTS[2:]
    signs = {}
    for s in sites:
        pair = first if any(found[name].weighs(s, config) for name in first) else second
        signs[s] = -1 if sum(found[name].coefficients[s] for name in pair) < 0 else 1
    roles = {s: _role([[found[n].weighs(s, config) for n in pair] for pair in (first, second)]) for s in sites}
    oriented = {
        name: replace(own, coefficients={s: signs[s] * value for s, value in own.coefficients.items()})
        for name, own in found.items()
    }
    return ContrastReport(oriented, roles, signs)


def _role(weighs: Sequence[Sequence[bool]]) -> Role:
    general, domain = weighs
    if all(general):
        return "general"
    if not any((*general, *domain)):
        return "none"
    return "domain" if all(domain) and not any(general) else "unclear"


def _regression(config: ProbeConfig) -> Any:
    try:
        kind = importlib.import_module("sklearn.linear_model").LogisticRegression
    except ImportError:
        raise MissingError(
            "Probes are fitted by scikit-learn, which is not installed.", hint="pip install 'lorica[papers]'"
        ) from None
    settings = {"C": config.C, "solver": "liblinear", "max_iter": config.max_iter, "random_state": config.seed}
    # the word for L1 changed in scikit-learn 1.8
    old = inspect.signature(kind).parameters["penalty"].default != "deprecated"
    return kind(**settings, **({"penalty": "l1"} if old else {"l1_ratio": 1.0}))


def _divided(y_N: Bools, units_N: NDArray[Any], share: float, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Indices to fit and to measure on: of each class, some units are held out, then both parts are balanced."""
    parts: list[list[NDArray[np.int64]]] = [[], []]
    for label in (False, True):
        own = np.flatnonzero(y_N == label)
        units = rng.permutation(np.unique(units_N[own]))
        held = max(1, round(share * len(units)))
        if len(units) <= held:
            raise DataError(
                f"The class {'positive' if label else 'negative'!r} has {len(units)} answers or tokens to divide; at "
                "least two are needed, one to fit and one to measure."
            )
        test = np.isin(units_N[own], units[:held])
        parts[0].append(own[~test])
        parts[1].append(own[test])
    found = []
    for classes in parts:
        count = min(map(len, classes))
        found.append(np.concatenate([rng.choice(own, count, replace=False) for own in classes]))
    return found


def _by_site(sites: Sequence[str], values_K: Floats) -> dict[str, float]:
    return {site: float(value) for site, value in zip(sites, values_K, strict=True)}
