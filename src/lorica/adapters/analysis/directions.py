"""Directions of hidden states: the difference between two means, how alike two sets are, and what is done with one.

In: hidden states, token by token, and which tokens count. Out: running sums in float64, a vector for each layer,
cosines, changed states. A mean is over tokens, so a long answer weighs more than a short one. Refuses to know models,
text and files. D width, N tokens.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorica.core.errors import DataError, MethodError, MismatchError


class RunningMean:
    """`Σ h / N` over tokens, in as many parts as it takes: sums are float64, so that parts change nothing.

    Attributes: `total_D` is the sum, `count` the tokens in it.
    """

    def __init__(self, width: int) -> None:
        self.total_D = torch.zeros(width, dtype=torch.float64)
        self.count = 0

    def add(self, h_ND: Tensor, mask_N: Tensor | None = None) -> RunningMean:
        """Count the rows of h, or those that the mask names. Raises MethodError for values that are not finite."""
        kept_ND = h_ND.detach() if mask_N is None else h_ND.detach()[mask_N.to(h_ND.device)]
        total_D = kept_ND.to(torch.float64).sum(0).cpu()
        if not torch.isfinite(total_D).all():
            raise MethodError("A hidden state holds NaN or infinity, so there is no mean.")
        self.total_D += total_D
        self.count += kept_ND.shape[0]
        return self

    def __add__(self, other: RunningMean) -> RunningMean:
        """The mean over the tokens of both: shards are joined so, in any order."""
        joined = RunningMean(len(self.total_D))
        joined.total_D, joined.count = self.total_D + other.total_D, self.count + other.count
        return joined

    @property
    def mean(self) -> Tensor:
        """[D], float64. Raises DataError where no token was counted."""
        if not self.count:
            raise DataError("No token was counted, so there is no mean.")
        return self.total_D / self.count


NARROW = 1e-3
"""A random vector with less than that across another one is drawn again: its direction would be rounding."""
Means = Mapping[int, RunningMean]
"""Layer → the mean of that block's output."""


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """A vector for each layer, `vectors[layer]` [D] in float64, and in `about` plain values that say how they were
    made.
    """

    vectors: Mapping[int, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [n for n, v in self.vectors.items() if v.ndim != 1 or not torch.isfinite(v).all()]
        if not self.vectors or wrong:
            where = f"that of layer {wrong[0]} is none" if wrong else "there is none"
            raise MethodError(f"Directions are vectors of finite values, one a layer, and {where}.")

    @property
    def layers(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted(self.vectors))

    @property
    def base(self) -> str:
        """Fingerprint of the backbone whose states they are of; empty where nobody said."""
        return str(self.about.get("base", {}).get("fingerprint", ""))

    def norms(self) -> dict[int, float]:
        """Layer → ‖v‖."""
        return {layer: float(self.vectors[layer].norm()) for layer in self.layers}

    def unit(self, layer: int) -> Tensor:
        """`v / ‖v‖`. Raises MethodError for a layer that is not there or whose vector is zero."""
        self._check((layer,))
        norm = self.vectors[layer].norm()
        if not norm:
            raise MethodError(f"The direction of layer {layer} is zero, so it points nowhere.")
        unit_D: Tensor = self.vectors[layer] / norm
        return unit_D

    def only(self, layers: Collection[int]) -> Directions:
        """These layers alone. Raises MethodError for one that is not there."""
        self._check(layers)
        return Directions({layer: self.vectors[layer] for layer in sorted(layers)}, self.about)

    def _check(self, layers: Iterable[int]) -> None:
        absent = [layer for layer in layers if layer not in self.vectors]
        if absent:
            raise MethodError(
                f"There is no direction of layer {absent[0]}; the layers are {', '.join(map(str, self.layers))}."
            )


def mean_difference(first: Means, second: Means, about: Mapping[str, Any] | None = None) -> Directions:
    """`v_l = mean(h_l | first) − mean(h_l | second)`, layer by layer.

    Antisymmetric in the two, and zero where they are equal. Raises MismatchError for other layers, DataError where one
    side has no token. Paper: arXiv 2506.11618.
    """
    if set(first) != set(second):
        raise MismatchError(f"The first means are of layers {sorted(first)}, the second of {sorted(second)}.")
    return Directions({layer: first[layer].mean - second[layer].mean for layer in sorted(first)}, about or {})


def cosines(stores: Sequence[Directions]) -> dict[int, Tensor]:
    """Layer → the cosines of all pairs of stores, [S, S], at the layers that all have.

    Raises MismatchError where they are of different bases, share no layer or differ in width, MethodError for a vector
    that is zero.
    """
    bases = sorted({store.base for store in stores if store.base})
    if len(bases) > 1:
        raise MismatchError(f"These directions are of states of different bases: {', '.join(bases)}.")
    shared = sorted(set.intersection(*(set(store.vectors) for store in stores))) if stores else []
    if not shared:
        raise MismatchError("These directions have no layer in common, so nothing can be compared.")
    found = {}
    for layer in shared:
        widths = {len(store.vectors[layer]) for store in stores}
        if len(widths) > 1:
            raise MismatchError(f"The directions of layer {layer} have widths {sorted(widths)}; one width is right.")
        units_SD = torch.stack([store.unit(layer) for store in stores])
        found[layer] = (units_SD @ units_SD.T).clamp(-1.0, 1.0)
    return found


def steered(h: Tensor, v_D: Tensor, kappa: float) -> Tensor:
    """`h + κ v`, in h's dtype."""
    wide = _wide(h)
    return (h.to(wide) + kappa * v_D.to(h.device, wide)).to(h.dtype)


def projected_out(h: Tensor, unit_D: Tensor) -> Tensor:
    """`h − (h·v̂) v̂`, in h's dtype; computed in float32 at least. Idempotent, and what is orthogonal to v̂ stays."""
    wide = _wide(h)
    unit_D = unit_D.to(h.device, wide)
    h_wide = h.to(wide)
    found: Tensor = (h_wide - (h_wide @ unit_D)[..., None] * unit_D).to(h.dtype)
    return found


def turned(x: Tensor, epsilon: float, rng: torch.Generator) -> Tensor:
    """`√(1 − ε²) x + ε y` along the last axis, y random, orthogonal to x and as long: the norm stays, the direction
    goes.

    ε = 0 is x itself, ε = 1 a random vector of equal norm. Raises MethodError unless 0 ≤ ε ≤ 1, or where the last axis
    has one element, which nothing is orthogonal to.
    """
    if not 0 <= epsilon <= 1:
        raise MethodError(f"epsilon is {epsilon}; 0 (nothing) to 1 (a random direction) is right.")
    if x.shape[-1] < 2:
        raise MethodError("A vector of one element has no orthogonal one.")
    wide = torch.promote_types(x.dtype, torch.float64)
    x_wide = x.detach().to("cpu", wide)
    norm: Tensor = x_wide.norm(dim=-1, keepdim=True)
    unit = x_wide / norm.clamp_min(torch.finfo(wide).tiny)
    y = _across(unit, rng)
    while (y.norm(dim=-1) < NARROW).any():  # x was drawn from this very generator, or the axis has few elements
        y = _across(unit, rng)
    y = y / y.norm(dim=-1, keepdim=True) * norm
    found: Tensor = math.sqrt(1 - epsilon**2) * x_wide + epsilon * y
    return found.to(x.device, x.dtype)


def _across(unit: Tensor, rng: torch.Generator) -> Tensor:
    """A random vector's part that is orthogonal to a unit vector."""
    y: Tensor = torch.randn(unit.shape, generator=rng, dtype=unit.dtype)
    return y - (y * unit).sum(-1, keepdim=True) * unit


def random_like(directions: Directions, seed: int = 0) -> Directions:
    """A random direction of equal norm at every layer: the control of every effect that a direction has.

    A layer's depends on (seed, layer) alone.
    """
    found = {}
    for layer in directions.layers:
        rng = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{layer}".encode()))
        drawn_D = torch.randn(directions.vectors[layer].shape, generator=rng, dtype=torch.float64)
        found[layer] = drawn_D / drawn_D.norm() * directions.vectors[layer].norm()
    return Directions(found, {**directions.about, "random": seed})


def _wide(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)
