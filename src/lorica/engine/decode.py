"""Linear sites while rows are sampled token by token: few rows, the same adapters at every step, no gradients.

In: an executor, the stack of each row. Out: stand-ins for the forwards of its linear modules, to be used step after
step. Maps of one input (q, k and v; gate and up) are one product, and the rows' factors are gathered once. What has no
such form keeps its own forward. Refuses to know caches, sampling and methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.core.update import LinearUpdate, Update
from lorica.engine.chain import Walk, outside, walk_of
from lorica.engine.executor import Executor
from lorica.engine.factors import FEW, NOTHING, Folded, GroupFactors, fold
from lorica.engine.fast import bare_norms, gated_blocks
from lorica.engine.groups import Group, Shared, Stand, groups_of, hooked
from lorica.engine.native.kernels import Kernels
from lorica.engine.route import Stack
from lorica.engine.step_blocks import GatedStep, Joined, RotaryStep, Turn, norm_step, rotary_parts

IDLE = 8
"""Updates of so many adapters without rows are kept for the next ones."""
Forwards = list[tuple[nn.Module, Any]]


class Updates:
    """The updates of adapters that do not change while they have rows, lowered and folded once.

    Attributes: `memo` is what an executor's is while these rows are computed.
    """

    def __init__(self) -> None:
        self.memo: dict[tuple[str, Adapter], Update] = {}
        self._folds: dict[Stack, dict[tuple[str, torch.dtype], Folded | None]] = {}
        self._stamps: dict[Adapter, tuple[int, int]] = {}

    def use(self, adapters: Iterable[Adapter]) -> None:
        """These have rows now. Forgets what changed since, and who has had none for long."""
        for adapter in adapters:
            before, now = self._stamps.pop(adapter, None), stamp(adapter)
            self._stamps[adapter] = now  # the last in the order
            if before is not None and before != now:
                self._drop({adapter})

    def tidy(self, present: frozenset[Adapter]) -> None:
        """Forget all but these and the last few others."""
        idle = [adapter for adapter in self._stamps if adapter not in present]
        self.forget(idle[: max(0, len(idle) - IDLE)])

    def known(self) -> list[Adapter]:
        """Whose updates are kept."""
        return list(self._stamps)

    def forget(self, adapters: Iterable[Adapter]) -> None:
        gone = set(adapters)
        if gone:
            self._drop(gone)
            for adapter in gone:
                self._stamps.pop(adapter, None)

    def _drop(self, gone: set[Adapter]) -> None:
        for key in [key for key in self.memo if key[1] in gone]:
            del self.memo[key]
        for stack in [stack for stack in self._folds if not gone.isdisjoint(stack)]:
            del self._folds[stack]

    def folded(
        self, executor: Executor, site: str, stack: Stack, dtype: torch.dtype, kernels: Kernels | None
    ) -> Folded | None:
        """A stack's update at a site; None where it has no folded form."""
        acting = tuple(adapter for adapter in stack if executor.acts(adapter, site))
        own = self._folds.setdefault(acting, {})
        if (site, dtype) not in own:
            updates = [executor.lowered(adapter, site) for adapter in acting]
            linear = [u for u in updates if isinstance(u, LinearUpdate)]
            own[site, dtype] = fold(linear, executor.backbone.bias(site), dtype, kernels) if linear else NOTHING
        return own[site, dtype]


def stamp(adapter: Adapter) -> tuple[int, int]:
    """Another one where an adapter's values are others."""
    return id(adapter.flat), adapter.flat._version


class _Step(Shared):
    """A group while rows are sampled: the base product of all members, and the gathered factors of the rows."""

    def __init__(self, group: Group, factors: GroupFactors | None) -> None:
        super().__init__(group)
        self.factors = factors

    def joined(self, x: Tensor) -> Tensor:
        """The outputs of all members side by side, [N, ΣO]."""
        x_NI = x.reshape(-1, x.shape[-1])
        factors = self.factors
        y_NO = self.group.maps.forward(x_NI if factors is None else factors.scaled(x_NI))
        return y_NO if factors is None else factors.add(x_NI, y_NO)

    def compute(self, x: Tensor) -> list[Tensor]:
        y_NO = self.joined(x)
        y = y_NO.view(*x.shape[:-1], y_NO.shape[1])
        return [y] if len(self.group.maps.sizes) == 1 else list(y.split(self.group.maps.sizes, dim=-1))


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """How modules compute one token of each row. `walk` is a pass through the trunk, None where that is the trunk's own
    with `forwards` standing in.
    """

    forwards: Forwards
    walk: Walk | None = None


def step_of(executor: Executor, stacks: Sequence[Stack], updates: Updates) -> Step:
    """Stand-ins that expect one token of each of these rows; neighbours of one stack share. Linear modules have some,
    norms, and blocks of known form.
    """
    backbone = executor.backbone
    if executor.compute not in (None, backbone.dtype) or torch.is_autocast_enabled(backbone.device.type):
        return Step([])
    if backbone.dtype == torch.float16:  # its adapters compute in float32
        return Step([])
    kernels = executor.kernels(backbone.dtype)
    norms = bare_norms(executor, {adapter: None for stack in stacks for adapter in stack})
    stood = ((module, norm_step(norm, kernels)) for module, norm in norms)
    forwards: Forwards = [(module, forward) for module, forward in stood if forward is not None]
    whole: dict[tuple[nn.Module, ...], Joined] = {}
    for group in groups_of(executor):
        if not group.free:
            continue
        factors, slow = _factors(executor, [m.site for m in group.members], stacks, updates, kernels)
        step = _Step(group, factors)
        forwards += [(m.module, Stand(step, i)) for i, m in enumerate(group.members) if i not in slow]
        if not slow and not any(hooked(m.module) for m in group.members):
            whole[tuple(m.module for m in group.members)] = step.joined
    forwards += _blocks(executor, whole, {module for module, _ in forwards}, kernels)
    standing = dict(forwards)
    walk = walk_of(executor, standing)
    return Step(forwards if walk is None else outside(executor, standing), walk)


def _blocks(
    executor: Executor, whole: dict[tuple[nn.Module, ...], Joined], plain: set[nn.Module], kernels: Kernels | None
) -> Forwards:
    """Stand-ins for blocks all of whose maps are joined, and whose norms are `plain`: no adapter changes them."""
    turn = Turn()
    forwards: Forwards = []
    for rotary in rotary_parts(executor).values():
        maps, out = whole.get(rotary.maps), whole.get((rotary.out,))
        bare = "forward" not in rotary.module.__dict__ and plain.issuperset(rotary.norms)
        if maps is not None and out is not None and bare and not any(hooked(norm) for norm in rotary.norms):
            forwards.append((rotary.module, RotaryStep(rotary, maps, out, turn, kernels)))
    for block in gated_blocks(executor):
        both, down = whole.get((block.gate, block.up)), whole.get((block.down,))
        if both is not None and down is not None and "forward" not in block.module.__dict__:
            forwards.append((block.module, GatedStep(block, both, down, kernels)))
    return forwards


def _factors(
    executor: Executor, sites: Sequence[str], stacks: Sequence[Stack], updates: Updates, kernels: Kernels | None
) -> tuple[GroupFactors | None, frozenset[int]]:
    """The factors of the rows' stacks at maps of one input, and which of the maps must go the general way."""
    runs: list[tuple[int, int]] = []
    distinct: list[Stack] = []
    for row, stack in enumerate(stacks):
        if distinct and distinct[-1] == stack:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            distinct.append(stack)
            runs.append((row, row + 1))
    weight = executor.backbone.weight(sites[0])
    kernels = kernels if kernels is not None and kernels.dtype == weight.dtype else None
    few = len(distinct) <= FEW and weight.device.type == "cpu" and kernels is None
    dtype = torch.promote_types(weight.dtype, torch.float32) if few else weight.dtype
    slow: set[int] = set()
    maps: list[list[Folded]] = []
    for i, site in enumerate(sites):
        column = [updates.folded(executor, site, stack, dtype, kernels) for stack in distinct]
        whole = [f for f in column if f is not None]
        # the other maps of a group read the input unscaled
        if len(whole) < len(column) or (len(sites) > 1 and any(f.in_scale_I is not None for f in whole)):
            slow.add(i)
            whole = [NOTHING] * len(distinct)
        maps.append(whole)
    if all(f is NOTHING for column in maps for f in column):
        return None, frozenset(slow)
    sizes = [executor.backbone.weight(site).shape[0] for site in sites]
    return GroupFactors(maps, sizes, runs, len(stacks), kernels), frozenset(slow)
