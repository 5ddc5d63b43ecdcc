"""An adapter: one trained instance of a method over the sites of one backbone.

In: a layout, a seed and the frozen weights. Out: named tensors (views of one flat row), updates per site, gradients.
Refuses to know rows, batches, optimisers and file formats.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapters.layout import GLOBAL, Layout, Place
from lorica.core.errors import FormatError
from lorica.core.shared import Shared, share
from lorica.core.update import Update
from lorica.methods.base import BaseWeight, Method

WeightOf = Callable[[str], BaseWeight]


@dataclass(frozen=True, slots=True)
class Mark:
    """What training passes change, to go back to: a gradient row, None where it is zero, and the count of passes."""

    grad: Tensor | None
    forwards: int


class Adapter:
    """Method, config, tensors per site and provenance.

    Attributes:
        name: how rows, files and users call it.
        layout: where its tensors live; shared by adapters of equal method and sites.
        flat: trained values, one float row; `grad` is the gradient row, made on first use.
        seed: the seed of its initial values and of its dropout masks.
        base: fingerprint of the backbone it was made for.
        meta: provenance that travels with the adapter's files.
        folder: where it was read from or last written to, which it may no longer equal; empty where there is none.
        held: it acts and is not trained: no gradient is formed, no dropout drawn and no pass counted, so that nothing
            of it changes while another adapter is trained on top of it.
        forwards: number of forward passes in training; dropout masks are a function of (seed, forwards, site).
        generation: another number whenever a tensor is another one, not the same with other values.
    """

    def __init__(
        self, name: str, layout: Layout, *, seed: int = 0, base: str = "", dtype: torch.dtype = torch.float32
    ) -> None:
        self.name = name
        self.layout = layout
        self.seed = seed
        self.base = base
        self.meta: dict[str, Any] = {}
        self.folder = ""
        self.held = False
        self.forwards = 0
        self.generation = 0
        self.flat: Tensor = torch.zeros(layout.size, dtype=dtype)
        self.frozen: dict[str, dict[str, Tensor]] = {}
        self._kept: list[Shared] = []
        self._grad: Tensor | None = None
        self._zeroed = -1
        self._leaves: dict[str, dict[str, Tensor]] = {}

    @property
    def method(self) -> Method:
        return self.layout.method

    @property
    def mark(self) -> tuple[int, ...]:
        """Another one whenever `generation` is, and whenever a tensor that it shares with others was written to."""
        return (self.generation, *(shared.version for shared in self._kept))

    @property
    def grad(self) -> Tensor:
        """The gradient row; leaves accumulate into it in place."""
        if self._grad is None:
            self._grad = torch.zeros_like(self.flat)
            self._zeroed = self._grad._version
        return self._grad

    def initialise(self, weight_of: WeightOf) -> Adapter:
        """Fill every tensor with the method's initial values. A site's values depend on (seed, site name) alone."""
        layout = self.layout
        if GLOBAL in layout.specs:
            self._put(GLOBAL, layout.method.init_global(layout.own_sites(), self.rng(GLOBAL)))
        for name, site in layout.sites.items():
            if name in layout.specs:
                self._put(name, layout.methods[name].init(site, weight_of(name), self.rng(name)))
        for name, param in layout.changing:
            if param not in self.frozen.get(name, {}):
                self.set(name, param, torch.zeros(layout.specs[name][param].shape))
        return self

    def rng(self, site: str) -> torch.Generator:
        """The generator of a site's initial values."""
        # torch's CPU generator reads the low 32 bits of a seed alone
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{site}".encode()))

    def _put(self, site: str, values: Mapping[str, Tensor]) -> None:
        for param, value in values.items():
            self.set(site, param, value)

    def set(self, site: str, param: str, value: Tensor) -> None:
        """Overwrite one tensor. Raises FormatError on a wrong shape."""
        spec = self.layout.specs[site][param]
        if tuple(value.shape) != spec.shape:
            raise FormatError(
                f"Tensor {param!r} of site {site!r} has shape {tuple(value.shape)}; {spec.shape} is right."
            )
        if spec.trainable:
            place = self.layout.places[site][param]
            self.flat[place.offset : place.offset + place.size] = value.detach().reshape(-1).to(self.flat)
            return
        self.generation += 1
        if spec.changes:
            self.frozen.setdefault(site, {})[param] = value.detach().to(self.flat.device, torch.float32, copy=True)
        elif site == GLOBAL:
            self._share(param, value)
        else:
            self.frozen.setdefault(site, {})[param] = value.detach().to(self.flat).contiguous()
        if site in self._leaves:
            self._leaves[site][param] = self.frozen[site][param]

    def changing(self) -> dict[str, Tensor]:
        """The tensors that step hooks write, by `site/param`: themselves, not copies."""
        return {f"{site}/{param}": self.frozen[site][param] for site, param in self.layout.changing}

    def _share(self, param: str, value: Tensor) -> None:
        """Keep one copy of equal frozen global tensors, whoever made them."""
        shared = share(param, value.detach().to(self.flat))
        self.frozen.setdefault(GLOBAL, {})[param] = shared.tensor
        self._kept.append(shared)

    def tensors(self, site: str) -> dict[str, Tensor]:
        """The tensors of one site: trained leaves (views of `flat`, gradients into `grad`) and frozen ones."""
        if site not in self._leaves:
            self._leaves[site] = {
                param: self._leaf(site, param) if spec.trainable else self.frozen[site][param]
                for param, spec in self.layout.specs.get(site, {}).items()
            }
        return self._leaves[site]

    def values(self, site: str) -> dict[str, Tensor]:
        """The tensors of one site without leaves: an adapter that only serves has no gradient row."""
        places = self.layout.places.get(site, {})
        views = {p: self.flat[at.offset : at.offset + at.size].view(at.shape) for p, at in places.items()}
        return {**self.frozen.get(site, {}), **views}

    def _leaf(self, site: str, param: str) -> Tensor:
        place = self.layout.places[site][param]
        span = slice(place.offset, place.offset + place.size)
        leaf = self.flat[span].view(place.shape).detach().requires_grad_(True)
        leaf.grad = self.grad[span].view(place.shape)
        return leaf

    def update(self, site: str, weight: BaseWeight) -> Update:
        """The site's update, differentiable with respect to this adapter's leaves while gradients are on, and never
        where it is `held`.
        """
        tensors = self.values if self.held or not torch.is_grad_enabled() else self.tensors
        own = tensors(site)
        params = {**tensors(GLOBAL), **own} if GLOBAL in self.layout.specs else own
        return self.layout.methods[site].lower(self.layout.sites[site], params, weight)

    def named_tensors(self, *, trainable_only: bool = False) -> Iterator[tuple[str, str, Tensor]]:
        """(site, param, tensor) for every tensor; global tensors have the site name `''`."""
        for site, owned in self.layout.specs.items():
            for param, spec in owned.items():
                if spec.trainable or not trainable_only:
                    yield site, param, self.tensors(site)[param]

    def parameters(self) -> list[Tensor]:
        """The trained leaves."""
        return [tensor for _, _, tensor in self.named_tensors(trainable_only=True)]

    def gradients(self, site: str) -> dict[str, Tensor]:
        """Views of the gradient row, of one site's trained tensors; call `collect_grad` before."""
        places = self.layout.places.get(site, {})
        return {p: self.grad[at.offset : at.offset + at.size].view(at.shape) for p, at in places.items()}

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Torch param groups: one flat tensor for each (group, decay); call `collect_grad` before a step."""
        groups = []
        for group in self.layout.groups:
            values = nn.Parameter(self.flat[group.start : group.stop])
            values.grad = self.grad[group.start : group.stop]
            groups.append({"params": [values], "name": group.name, "decay": group.decay})
        return groups

    def collect_grad(self) -> Tensor:
        """The gradient row, after copying in gradients that a foreign optimiser detached from it (`zero_grad`)."""
        for leaf, place in self._trained():
            home = self.grad[place.offset : place.offset + place.size].view(place.shape)
            if leaf.grad is None:
                home.zero_()
            elif leaf.grad.data_ptr() != home.data_ptr():
                home.copy_(leaf.grad)
            leaf.grad = home
        return self.grad

    @property
    def gathers(self) -> bool:
        """Whether every leaf's gradient is its part of the gradient row: a foreign optimiser may have detached it."""
        start, size = self.grad.data_ptr(), self.grad.itemsize
        return all(
            leaf.grad is not None and leaf.grad.data_ptr() == start + size * place.offset
            for leaf, place in self._trained()
        )

    def _trained(self) -> Iterator[tuple[Tensor, Place]]:
        """The leaves that are trained, each with its place in the rows."""
        for site, owned in self._leaves.items():
            places = self.layout.places.get(site, {})
            yield from ((leaf, places[param]) for param, leaf in owned.items() if param in places)

    def zero_grad(self) -> None:
        """Zero the gradient row in place."""
        self._zeroed = self.grad.zero_()._version

    def grad_written(self) -> None:
        """Note that the gradient row was written to. Torch counts its own writes, but not those of a recording."""
        self._zeroed = -1

    def remember(self) -> Mark:
        """The state before a pass. The row of a step's first pass is zero and is not copied."""
        zero = self.grad._version == self._zeroed
        return Mark(None if zero else self.grad.clone(), self.forwards)

    def restore(self, mark: Mark) -> None:
        """Back to a mark."""
        if mark.grad is None:
            self.zero_grad()
        else:
            self.grad.copy_(mark.grad)
        self.forwards = mark.forwards

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Adapter:
        """Move or cast every tensor; leaves are made anew, and an optimiser that was made before must be too."""
        flat = self.flat.to(device=device, dtype=dtype)
        if flat is self.flat:  # nothing moves: an optimiser that was made before still holds the right rows
            return self
        self.flat = flat
        frozen, self.frozen, self._kept = self.frozen, {}, []
        self._grad, self._leaves = None, {}
        self.generation += 1
        for site, owned in frozen.items():
            self._put(site, owned)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leaves are views: a copy makes its own."""
        return {**self.__dict__, "_leaves": {}, "_grad": None}
