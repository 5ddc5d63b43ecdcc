"""The engine's packed passes, made fast: maps of one input as one product, single nodes for norms and gated blocks.

In: an executor under a route. Out: stand-ins for the forwards of its modules, for the time of a `with` that holds the
forward and the backward pass. They equal the modules' own forwards up to rounding; calls of the model itself never meet
them. Refuses to know examples, losses and methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorica.engine.executor import Executor, Work
from lorica.engine.fused import FusedNorm, Gated, fused_parts
from lorica.engine.groups import Group, Shared, Stand, groups_of, standing_in
from lorica.engine.linear import Base, Make, Part, adapted_linear
from lorica.engine.sites import stacked_linear

KEPT = "fused"


class _Pass(Shared):
    """A group in training passes: one node for all members, or one for each where their inputs are not the same."""

    def __init__(self, executor: Executor, group: Group) -> None:
        super().__init__(group)
        self.executor = executor
        self.sites = [executor.backbone.sites[m.site] for m in group.members]

    def compute(self, x: Tensor) -> list[Tensor]:
        x_NI = x.reshape(-1, x.shape[-1])
        work = [self.executor.work(site, x_NI.shape[0]) for site in self.sites]
        if len(self.sites) == 1 or any(_scales_input_or_stacks(item) for own in work for item in own):
            ys = [self._alone(i, x_NI, own) for i, own in enumerate(work)]
        else:
            y_NO = adapted_linear(x_NI, self._base(), _parts(work), self.executor.compute)
            ys = list(y_NO.split(self.group.maps.sizes, dim=1))
        return [y_NO.view(*x.shape[:-1], y_NO.shape[1]) for y_NO in ys]

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
        if any(len(item.updates) > 1 for item in work):
            y_NO = self._alone(0, make(*flat), work)
        else:
            y_NO = adapted_linear(flat, self._base(), _parts([work]), self.executor.compute, make)
        return y_NO.view(*sources[0].shape[:-1], y_NO.shape[1])


def _scales_input_or_stacks(item: Work) -> bool:
    return len(item.updates) > 1 or item.linear(0).in_scale_I is not None


def _parts(work: list[list[Work]]) -> list[Part]:
    return [
        Part(item.start, item.stop, item.linear(0), item.dropouts[0], index)
        for index, own in enumerate(work)
        for item in own
    ]


class _GatedForward:
    """The forward of a gated block: what `down` reads is made again in backward."""

    def __init__(self, block: Gated, down: _Pass) -> None:
        self.block, self.down = block, down

    def __call__(self, x: Tensor) -> Tensor:
        return self.down.made(self.block.make, self.block.gate(x), self.block.up(x))


class _Kept:
    """The stand-ins that do not depend on the batch, for one set of frozen weights. A copy starts without them."""

    def __init__(self, norms: dict[nn.Module, FusedNorm], blocks: list[Gated]) -> None:
        self.norms, self.blocks = norms, blocks

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


@contextmanager
def fast_modules(executor: Executor) -> Iterator[None]:
    """Inside, the backbone's modules compute packed passes the fast way. Without effect under autocast."""
    if torch.is_autocast_enabled(executor.backbone.device.type):
        yield
        return
    passes = {group.members[0].module: _Pass(executor, group) for group in groups_of(executor)}
    kept = _kept(executor)
    forwards: list[tuple[nn.Module, Any]] = [
        (module, norm) for module, norm in kept.norms.items() if "forward" not in module.__dict__
    ]
    for shared in passes.values():
        forwards += [(m.module, Stand(shared, i)) for i, m in enumerate(shared.group.members)]
    for block in kept.blocks:
        down = passes.get(block.down)
        if down is not None and len(down.sites) == 1:
            forwards.append((block.module, _GatedForward(block, down)))
    with standing_in(forwards):
        yield


def _kept(executor: Executor) -> _Kept:
    backbone = executor.backbone
    kept = backbone.kept.get(KEPT)
    if not isinstance(kept, _Kept):
        with executor.replay(None):
            kept = backbone.kept[KEPT] = _Kept(*fused_parts(backbone))
    return kept
