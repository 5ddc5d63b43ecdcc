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
    sites_are_coupled: ClassVar[bool] = False
    """True where `global_params` depends on which sites are adapted (VeRA, prefix projection)."""

    @abstractmethod
    def params(self, site: Site) -> dict[str, ParamSpec]:
        """Shapes of the tensors owned at one site. Raises MethodError when the config does not fit the site."""

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        """Initial float32 values for `params(site)`, drawn only from `rng` (a CPU generator). A trained tensor that is
        left out starts at zero.
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
