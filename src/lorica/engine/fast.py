"""The engine's packed passes, made fast: maps of one input as one product, single nodes for norms, rotations and gates.

In: an executor under a route. Out: stand-ins for the forwards of its modules, for the time of a `with` that holds the
forward and the backward pass. They equal the modules' own forwards up to rounding; calls of the model itself never meet
them. Refuses to know examples, losses and methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.engine.executor import Executor, Work
from lorica.engine.few_rows import few_rows, pairs_of
from lorica.engine.fused import FusedNorm, Gated, fused_parts
from lorica.engine.fused_norms import AdaptedNorm
from lorica.engine.groups import Group, Shared, Stand, groups_of, hooked, standing_in
from lorica.engine.joined import JoinedMaps
from lorica.engine.linear import FEW, Base, Make, adapted_linear
from lorica.engine.linear_sites import is_sum, parts_of, stacked_linear
from lorica.engine.native.nodes import NativeGate, NativeNorm, NativeTurn
from lorica.engine.native.passes import Passes
from lorica.engine.prepack import FrozenMaps
from lorica.engine.rotary_pass import rotary_nodes, rotary_passes
from lorica.engine.sites import NormForward, is_bare
from lorica.engine.step_blocks import Rotary

KEPT, NATIVE = "fused", "native"


class _Pass(Shared):
    """A group in training passes: one node for all members, or one for each where their inputs are not the same."""

    def __init__(self, executor: Executor, group: Group, passes: Passes | None) -> None:
        super().__init__(group)
        self.executor = executor
        self.passes = passes
        self.sites = [executor.backbone.sites[m.site] for m in group.members]

    def compute(self, x: Tensor) -> list[Tensor]:
        x_NI = x.reshape(-1, x.shape[-1])
        work = [self.executor.work(site, x_NI.shape[0]) for site in self.sites]
        few = self._few([x_NI], work)
        if few is not None:
            ys = [few] if len(self.sites) == 1 else list(few.split(self.group.maps.sizes, dim=1))
        elif len(self.sites) == 1 or any(_needs_a_node(item) for own in work for item in own):
            ys = [self._alone(i, x_NI, own) for i, own in enumerate(work)]
        else:
            parts = [part for i, own in enumerate(work) for item in own for part in parts_of(item, i)]
            y_NO = adapted_linear(x_NI, self._base(), parts, self.executor.compute)
            ys = list(y_NO.split(self.group.maps.sizes, dim=1))
        return [y_NO.view(*x.shape[:-1], y_NO.shape[1]) for y_NO in ys]

    def _few(self, x: Sequence[Tensor], work: list[list[Work]], make: NativeGate | None = None) -> Tensor | None:
        """By kernels for few rows; None where these do not take them."""
        rows = x[0].shape[0]
        if self.passes is None or rows > FEW or self.executor.compute not in (None, torch.float32):
            return None
        pairs = pairs_of(work, self.group.maps.sizes, rows)
        return None if pairs is None else few_rows(x, self._base(), pairs, self.passes, make)

    def _base(self) -> Base:
        maps = self.group.maps
        return Base(maps.forward, maps.back, maps.bias_O, maps.sizes)

    def _alone(self, index: int, x_NI: Tensor, work: list[Work]) -> Tensor:
        maps = (self.group if len(self.sites) == 1 else self.group.alone(index)).maps
        return stacked_linear(x_NI, Base(maps.forward, maps.back, maps.bias_O), work, self.executor.compute)

    def made(self, make: Make, *sources: Tensor) -> Tensor:
        """What the only member makes of `make(*sources)`, of which the sources alone are saved."""
        flat = [s.reshape(-1, s.shape[-1]) for s in sources]
        work = self.executor.work(self.sites[0], flat[0].shape[0])
        few = self._few(flat, [work], make) if isinstance(make, NativeGate) and make.takes(*flat) else None
        if few is not None:
            y_NO = few
        elif not all(is_sum(item) for item in work):
            y_NO = self._alone(0, make(*flat), work)
        else:
            parts = [part for item in work for part in parts_of(item)]
            y_NO = adapted_linear(flat, self._base(), parts, self.executor.compute, make)
        return y_NO.view(*sources[0].shape[:-1], y_NO.shape[1])


def _needs_a_node(item: Work) -> bool:
    """Whether a segment's updates read another input than the other maps, or stand on each other."""
    return not is_sum(item) or any(item.linear(level).in_scale_I is not None for level in range(len(item.updates)))


class _GatedForward:
    """The forward of a gated block: what `down` reads is made again in backward."""

    def __init__(self, block: Gated, down: _Pass | JoinedMaps, make: Make) -> None:
        self.block, self.down, self.make = block, down, make

    def __call__(self, x: Tensor) -> Tensor:
        return self.down.made(self.make, self.block.gate(x), self.block.up(x))


@contextmanager
def fast_modules(executor: Executor, known: Mapping[Group, JoinedMaps] = MappingProxyType({})) -> Iterator[None]:
    """Inside, the backbone's modules compute packed passes the fast way. Without effect under autocast. `known` are
    groups whose updates are known beforehand; what they compute has no gradients.
    """
    if torch.is_autocast_enabled(executor.backbone.device.type):
        yield
        return
    kernels = executor.passes(executor.backbone.dtype)
    free = (g for g in groups_of(executor) if g.free)
    passes = {g.members[0].module: known.get(g) or _Pass(executor, g, kernels) for g in free}
    norms, blocks = _fused(executor)
    native = _native(executor, kernels)
    route = executor.live_route()
    touched = () if route is None else route.adapters()
    bare = [(m, norm) for m, norm in norms.items() if is_bare(m, touched)]
    forwards: list[tuple[nn.Module, Any]] = [(m, native.norms.get(m, norm)) for m, norm in bare]
    adapted = ((m, m.__dict__["forward"], norm) for m, norm in norms.items() if not is_bare(m, touched))
    forwards += [(m, AdaptedNorm(own, norm)) for m, own, norm in adapted if _is_alone(own)]
    for shared in passes.values():
        forwards += [(m.module, Stand(shared, i)) for i, m in enumerate(shared.group.members)]
    for block in blocks:
        down = passes.get(block.down)
        bare_block = "forward" not in block.module.__dict__ and not hooked(block.down)
        if down is not None and len(down.group.members) == 1 and bare_block:
            forwards.append((block.module, _GatedForward(block, down, native.gates.get(block.module, block.make))))
    forwards += rotary_passes(native.turns, {module for module, _ in bare})
    with standing_in(forwards):
        yield


def _fused(executor: Executor) -> tuple[dict[nn.Module, FusedNorm], list[Gated]]:
    """Stand-ins that do not depend on the batch, kept until the weights change."""
    kept = executor.backbone.kept
    if KEPT not in kept:
        with executor.replay(None):
            kept[KEPT] = fused_parts(executor.backbone)
    found: tuple[dict[nn.Module, FusedNorm], list[Gated]] = kept[KEPT]
    return found


@dataclass(frozen=True, slots=True)
class _Native:
    """The stand-ins of modules by kernels in C."""

    norms: dict[nn.Module, NativeNorm] = field(default_factory=dict)
    gates: dict[nn.Module, NativeGate] = field(default_factory=dict)
    turns: dict[Rotary, NativeTurn] = field(default_factory=dict)


def _native(executor: Executor, passes: Passes | None) -> _Native:
    """Those of this backbone, where there are some."""
    kept = executor.backbone.kept
    if passes is None:
        return _Native()
    if NATIVE not in kept:
        norms, blocks = _fused(executor)
        own = ((module, NativeNorm.of(norm, passes)) for module, norm in norms.items())
        gates = ((block.module, NativeGate.of(block, passes)) for block in blocks)
        kept[NATIVE] = _Native(
            {m: n for m, n in own if n is not None},
            {m: g for m, g in gates if g is not None},
            rotary_nodes(executor, passes),
        )
    found: _Native = kept[NATIVE]
    return found


def gated_blocks(executor: Executor) -> list[Gated]:
    """The gated blocks of known form."""
    return _fused(executor)[1]


def bare_norms(executor: Executor, adapters: Iterable[Adapter]) -> list[tuple[nn.Module, FusedNorm]]:
    """The norms of known form that none of these adapters changes."""
    touched = list(adapters)
    return [(module, norm) for module, norm in _fused(executor)[0].items() if is_bare(module, touched)]


def _is_alone(forward: object) -> TypeGuard[NormForward]:
    """Whether a norm's forward is ours, with nobody else's below it."""
    return isinstance(forward, NormForward) and forward.previous is None


def frozen_maps(executor: Executor, module: nn.Module) -> FrozenMaps | None:
    """The products of a linear module that shares its input with no other; None where it is more than its product."""
    if hooked(module):
        return None
    groups = (g for g in groups_of(executor) if len(g.members) == 1 and g.members[0].module is module and g.free)
    return next((group.maps for group in groups), None)
