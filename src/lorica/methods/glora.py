"""GLoRA: weight and bias both scaled and shifted, each by a low-rank pair, a vector, a constant or not at all.

In: a site, its frozen weight and bias, and a choice for the site (`glora_choices`). Out: the update, as cheap as the
choice allows; only a scaling that varies inside a row needs a dense delta. A supernet holds the parameters of every
choice and draws one at each optimiser step. Refuses to know rows, losses and the search (`recipes.glora_search`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from lorica.core.errors import MethodError
from lorica.core.glora_choices import Choice, anywhere, checked_pattern
from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper, PeftNames, Step
from lorica.methods.lora import check_rank, uniform

EVERYTHING = Choice("lora", "lora", "lora", "vector", "vector")
"""The choice whose tensors all others select a part of."""


class GLoRA(Method):
    """Generalised LoRA: `y = x (W₀ + W₀ ∘ Ã + B̃)ᵀ + b₀ + b₀ ∘ D̃ + Ẽ + W₀ C̃` (∘ is elementwise).

    By `choice`, Ã and B̃ are a product `Xd Xu` ([out, r], [r, in]), a column [out] that all inputs share, a constant
    or absent; C̃, [in], is a product ([in, r], [r, 1]), a vector or absent; D̃ and Ẽ are a vector [out], a constant or
    absent. Xd, columns, constants, D̃ and Ẽ start at zero and Xu Xavier-uniform, so step 0 is the base. Ẽ and C̃ give a
    bias to a site that has none, which cannot be merged there; D̃ needs b₀ and owns nothing where there is none. With
    `supernet` a site stores one tensor each for all 432 choices and a new choice is drawn at every optimiser step.
    Parameters: r(in + out) a product, r(in + 1) in C̃, out (in) a vector, 1 a constant. Raises MethodError where the
    rank exceeds a site, a pattern matches none, or nothing is trained. Paper: arXiv 2306.07967.
    """

    name: ClassVar[str] = "glora"
    summary: ClassVar[str] = "weights and biases scaled and shifted, in one of 432 forms a site"
    paper: ClassVar[Paper] = Paper(
        "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", "2023", "2306.07967"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv"})
    peft: ClassVar[PeftNames | None] = PeftNames(
        "GLORA", {t + x: f"glora_{t}.X{x}" for t in "ABCDE" for x in ("", "d", "u")}, {"r": "rank"}, {"bias": "none"}
    )

    rank: int = Field(4, ge=1, description="rank r of every low-rank pair")
    choice: str = Field(
        "lora,lora,none,none,none",
        description="of A, B (lora, vector, constant, none), C (lora, vector, none), D, E (vector, constant, none)",
    )
    choices: tuple[tuple[str, str], ...] = Field(
        (), description="choice by name pattern (as in `rank_pattern`), instead of `choice`; the first that matches"
    )
    supernet: bool = Field(
        False, description="store the parameters of all choices and draw one at every step, to search among them"
    )

    @field_validator("choice")
    @classmethod
    def _written(cls, value: str) -> str:
        return str(Choice.parse(value))

    @field_validator("choices", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        pairs = value.items() if isinstance(value, Mapping) else value
        return tuple((checked_pattern(pattern), str(Choice.parse(choice))) for pattern, choice in pairs)

    def _matching(self, site: Site) -> tuple[str, str] | None:
        return next((pair for pair in self.choices if re.fullmatch(anywhere(pair[0]), site.name)), None)

    def choice_at(self, site: Site) -> Choice:
        """The fixed choice of a site."""
        found = self._matching(site)
        return Choice.parse(self.choice if found is None else found[1])

    def params(self, site: Site) -> dict[str, ParamSpec]:
        shapes = (EVERYTHING if self.supernet else self.choice_at(site)).shapes(site, self.rank)
        if shapes.keys() & {"Ad", "Bd"}:
            check_rank(self.rank, site)
        specs = {name: ParamSpec(shape, group=name[0]) for name, shape in shapes.items()}
        return {**specs, "choice": ParamSpec((5,), trainable=False, changes=True)} if self.supernet else specs

    def global_params(self, sites: Sequence[Site]) -> dict[str, ParamSpec]:
        used = {self._matching(site) for site in sites}
        unused = next((pair for pair in self.choices if pair not in used), None)
        if unused is not None:
            raise MethodError(f"GLoRA's pattern {unused[0]!r} decides at no adapted site, so it would change nothing.")
        if not any(self.params(site) for site in sites):
            raise MethodError(
                "This GLoRA trains nothing: at every site its choice is `none`, or scales an absent bias."
            )
        return {}

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        values = {}
        for name, spec in self.params(site).items():
            if name.endswith("u"):  # Xavier, of a matrix that is [r, in] whatever the kernel
                values[name] = uniform(spec.shape, (6 / (self.rank + math.prod(spec.shape[1:]))) ** 0.5, rng)
        return {**values, "choice": Choice.draw(rng).numbers()} if self.supernet else values

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        if self.supernet:
            p = Choice.at(p["choice"]).select(p)
        bias_O = self._bias(site, p, weight)
        ones = (1, *site.shape[1:])
        factors: tuple[LowRank, ...] = ()
        if "Bd" in p:
            factors = (LowRank(p["Bu"], p["Bd"]),)
        elif "B" in p:  # one column for all inputs is a product with ones
            factors = (LowRank(p["B"].new_ones(ones), p["B"].expand(site.out_features)[:, None]),)
        if "A" in p and not factors:
            return LinearUpdate(out_scale_O=(1 + p["A"]).expand(site.out_features), bias_O=bias_O)
        if "A" in p and p["A"].numel() == 1:
            # beside factors, which see the input before its scale, a constant can still be one
            return LinearUpdate(factors, in_scale_I=(1 + p["A"]).expand(site.in_features), bias_O=bias_O)
        delta: Tensor | None = None
        if "Ad" in p:
            delta = weight.matrix() * (p["Ad"] @ p["Au"].flatten(1)).view(site.shape)
        elif "A" in p:
            delta = weight.matrix() * p["A"].view(-1, *(1,) * len(site.shape[1:]))
        return LinearUpdate(factors, delta, bias_O=bias_O)

    @staticmethod
    def _bias(site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> Tensor | None:
        """`b₀ ∘ D̃ + Ẽ + W₀ C̃`, [out]; None where the choice has none of them."""
        parts: list[Tensor] = []
        b_O = weight.bias() if "D" in p else None
        if b_O is not None:
            parts.append(b_O * p["D"])
        if "E" in p:
            parts.append(p["E"].expand(site.out_features))
        if "C" in p or "Cd" in p:
            c_I = p["C"] if "C" in p else (p["Cd"] @ p["Cu"])[:, 0]
            W_OI = weight.matrix().flatten(1)
            parts.append(W_OI.to(torch.promote_types(W_OI.dtype, c_I.dtype)) @ c_I)
        return sum(parts[1:], parts[0]) if parts else None

    def after_step(self, step: Step) -> None:
        """Draw the next step's choice of every site, uniformly among all 432."""
        for owned in step.sites.values():
            if "choice" in owned.values:
                owned.values["choice"].copy_(Choice.draw(step.rng).numbers())
