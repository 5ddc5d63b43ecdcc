"""What a method is: config fields, parameter shapes, an init, and a lowering to an update.

In: a site, its frozen weight and a random generator. Out: named tensors, and from them the site's update,
differentiably. A method is stateless and one file. Refuses to know modules, batches, rows, files and optimisers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lorica.core.config import Config
from lorica.core.site import Site, SiteKind
from lorica.core.update import ParamSpec, Update


class BaseWeight(Protocol):
    """A site's frozen weight, as methods may see it."""

    def matrix(self) -> Tensor:
        """The normalised weight (see `Site.shape`), in the base dtype, without gradient, if possible not a copy."""

    def row_square_norm(self) -> Tensor:
        """`‖W₀[j]‖²` over all axes but the first, float32 [out], computed once and kept."""

    def residual(self) -> Tensor | None:
        """`W − Ŵ`, [out, in]: what packing took from the weight, float32 or wider; None where it is there in full.
        Raises MissingError, MismatchError.
        """

    def bias(self) -> Tensor | None:
        """The site's frozen bias b₀, [out], without gradient; None where it has none."""


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method was published."""

    title: str
    venue: str
    arxiv: str


@dataclass(frozen=True, slots=True)
class PeftNames:
    """How PEFT has a method: its type, its tensors (ours → suffix in the file), its config fields (theirs → ours)."""

    peft_type: str
    tensors: Mapping[str, str]
    fields: Mapping[str, str]
    fixed: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SiteStep:
    """One site's tensors at an optimiser step. Writing into `values` and `grads` in place changes the adapter.

    Attributes: `method` is the config resolved for the site; `values` has every tensor, frozen ones too; `grads` those
    of the trained ones.
    """

    site: Site
    method: Method
    values: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class SharedStep:
    """The tensors that an adapter owns once, at an optimiser step; see `SiteStep`."""

    values: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """What a method's step hooks may see and change of one adapter.

    Attributes:
        done: optimiser steps before this one. total: how many are planned, None where nobody said.
        lr, betas, eps, weight_decay: of this step; a group's factor (`Method.group_lr`) is not in `lr`.
        sites: by name, those that own tensors. shared: the tensors that the adapter owns once.
        state: what the method keeps between steps, by names of its own choice; saved with the optimiser.
        rng: a CPU generator whose draws depend on the adapter's seed and on `done` alone.
    """

    done: int
    total: int | None
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    sites: Mapping[str, SiteStep]
    shared: SharedStep
    state: dict[str, Tensor]
    rng: torch.Generator


class Method(Config, ABC):
    """A way to adapt a backbone. Subclasses are final: fields are the config, class variables are the declaration."""

    name: ClassVar[str]
    """Registered name, used by `--method` and in files."""
    summary: ClassVar[str]
    """One line for tables."""
    paper: ClassVar[Paper]
    kinds: ClassVar[frozenset[SiteKind]]
    """Site kinds that the method can adapt."""
    default_targets: ClassVar[str | tuple[str, ...]] = "all-linear"
    """What `default` selects. A tuple names places of several families; those that a backbone lacks are passed over."""
    identity_at_init: ClassVar[str] = "bitwise"
    """Step 0 against the base: 'bitwise', 'rounding' (equal to 1e-12 relative in float64) or 'none'."""
    peft: ClassVar[PeftNames | None] = None
    """The PEFT type that holds the same maths, if there is one."""
    restores_rounding: ClassVar[bool] = False
    """True where the values stand in for what packing took from the base: beside the full weights they are wrong."""
    sites_are_coupled: ClassVar[bool] = False
    """True where `global_params` depends on which sites are adapted (VeRA, prefix projection)."""

    @abstractmethod
    def params(self, site: Site) -> dict[str, ParamSpec]:
        """Shapes of the tensors owned at one site. Raises MethodError when the config does not fit the site."""

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        """Initial float32 values for `params(site)`, drawn only from `rng` (a CPU generator). A tensor that is trained
        or changes starts at zero if it is left out.
        """
        return {}

    @abstractmethod
    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> Update:
        """The site's update as a differentiable function of `p`, which holds `params(site)` and the global tensors."""

    def global_params(self, sites: Sequence[Site]) -> dict[str, ParamSpec]:
        """Tensors owned once per adapter; frozen ones with equal values are shared by all adapters in memory."""
        return {}

    def init_global(self, sites: Sequence[Site], rng: torch.Generator) -> dict[str, Tensor]:
        """Initial float32 values for `global_params(sites)`."""
        return {}

    # -- what happens at an optimiser step; most methods leave it to AdamW alone -----------------------------------

    def group_lr(self) -> Mapping[str, float]:
        """Factors on the learning rate by parameter group (LoRA+); a group that is not named has 1."""
        return {}

    @property
    def plain_steps(self) -> bool:
        """Whether a step is `value − lr · factor · (gradient + decay · value)` (SGD) instead of AdamW's."""
        return False

    @classmethod
    def has_step_hooks(cls) -> bool:
        """Whether the class does anything at a step; for others nothing is gathered."""
        return cls.before_step is not Method.before_step or cls.after_step is not Method.after_step

    def before_step(self, step: Step) -> None:
        """Change gradients in place, after clipping and before the step. Called for the adapter's own method alone."""

    def after_step(self, step: Step) -> None:
        """Change values in place after the step; the gradients that it used are still there."""
