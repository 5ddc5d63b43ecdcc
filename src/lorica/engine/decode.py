"""Linear sites while rows are sampled token by token: few rows, the same adapters at every step, no gradients.

In: an executor, the stack of each row. Out: stand-ins for the forwards of its linear modules, to be used step after
step. Maps of one input (q, k and v; gate and up) are one product, and the rows' factors are gathered once. What has no
such form keeps its own forward. Refuses to know caches, sampling and methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorica.adapters.adapter import Adapter
from lorica.core.update import LinearUpdate, Update
from lorica.engine.chain import Walk, outside, walk_of
from lorica.engine.executor import Executor
from lorica.engine.factors import FEW, NOTHING, Folded, GroupFactors, fold
from lorica.engine.fast import bare_norms, gated_blocks
from lorica.engine.groups import Group, Stand, groups_of, hooked
from lorica.engine.joined import JoinedMaps
from lorica.engine.native.kernels import Kernels
from lorica.engine.route import Stack
from lorica.engine.step_blocks import GatedStep, RotaryStep, Turn, norm_step, rotary_parts
from lorica.engine.step_walk import Maps, step_walk

IDLE = 8
"""Updates of so many adapters without rows are kept for the next ones at least."""
IDLE_BYTES = 2**26
"""Those of more adapters are, as long as all of them take no more memory than that."""
Forwards = list[tuple[nn.Module, Any]]


class Updates:
    """The updates of adapters that do not change while they have rows, lowered and folded once.

    Attributes: `memo` is what an executor's is while these rows are computed.
    """

    def __init__(self) -> None:
        self.memo: dict[tuple[str, Adapter], Update] = {}
        self._folds: dict[Stack, dict[tuple[str, torch.dtype], Folded | None]] = {}
        self._stamps: dict[Adapter, tuple[int, int]] = {}
        self._bytes: dict[Adapter, int] = {}

    def use(self, adapters: Iterable[Adapter]) -> None:
        """These have rows now. Forgets what changed since, and who has had none for long."""
        for adapter in adapters:
            before, now = self._stamps.pop(adapter, None), stamp(adapter)
            self._stamps[adapter] = now  # the last in the order
            if before is not None and before != now:
                self._drop({adapter})

    def tidy(self, present: frozenset[Adapter]) -> None:
        """Forget all but these and the last others."""
        idle = [adapter for adapter in reversed(self._stamps) if adapter not in present]
        total, kept = 0, 0
        for adapter in idle:
            total += self._bytes.get(adapter, 0)
            if kept >= IDLE and total > IDLE_BYTES:
                break
            kept += 1
        self.forget(idle[kept:])

    def known(self) -> list[Adapter]:
        """Whose updates are kept."""
        return list(self._stamps)

    def forget(self, adapters: Iterable[Adapter]) -> None:
        gone = set(adapters)
        if gone:
            self._drop(gone)
            for adapter in gone:
                self._stamps.pop(adapter, None)
                self._bytes.pop(adapter, None)

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
            made = fold(linear, executor.backbone.bias(site), dtype, kernels) if linear else NOTHING
            own[site, dtype] = made
            for adapter in acting:
                self._bytes[adapter] = self._bytes.get(adapter, 0) + _bytes(made, updates)
        return own[site, dtype]


def _bytes(folded: Folded | None, updates: Sequence[Update]) -> int:
    """Memory that is kept of a stack's update at a site; about, as an update may be views of its adapter."""
    if folded is None:
        return sum(
            u.delta.numel() * u.delta.element_size()
            for u in updates
            if isinstance(u, LinearUpdate) and u.delta is not None
        )
    parts = (folded.A_RI, folded.B_OR, folded.in_scale_I, folded.out_scale_O, folded.shift_O)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def stamp(adapter: Adapter) -> tuple[int, int]:
    """Another one where an adapter's values are others."""
    return id(adapter.flat), adapter.flat._version


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
    if not _computes_alike(executor):
        return Step([])
    kernels = executor.kernels(backbone.dtype)
    norms = bare_norms(executor, {adapter: None for stack in stacks for adapter in stack})
    stood = ((module, norm_step(norm, kernels)) for module, norm in norms)
    forwards: Forwards = [(module, forward) for module, forward in stood if forward is not None]
    walks = executor.walks(backbone.dtype)
    whole: dict[Maps, JoinedMaps] = {}
    distinct, runs = _runs(stacks, [1] * len(stacks))
    for group in groups_of(executor):
        if not group.free:
            continue
        sites = [m.site for m in group.members]
        maps, slow = _folds(executor, sites, distinct, updates, kernels)
        step = JoinedMaps(group, _gathered(executor, sites, maps, runs, kernels), walks)
        forwards += [(m.module, Stand(step, i)) for i, m in enumerate(group.members) if i not in slow]
        if not slow and not any(hooked(m.module) for m in group.members):
            whole[tuple(m.module for m in group.members)] = step
    forwards += _blocks(executor, whole, {module for module, _ in forwards}, kernels)
    standing = dict(forwards)
    walk = walk_of(executor, standing)
    if walk is None:
        return Step(forwards)
    if walks is not None:
        adapted = {maps: step.adapted for maps, step in whole.items()}
        walk = step_walk(executor, standing, adapted, walks, walk)
    return Step(outside(executor, standing), walk)


def _blocks(
    executor: Executor, whole: Mapping[Maps, JoinedMaps], plain: set[nn.Module], kernels: Kernels | None
) -> Forwards:
    """Stand-ins for blocks all of whose maps are joined, and whose norms are `plain`: no adapter changes them."""
    turn = Turn()
    forwards: Forwards = []
    for rotary in rotary_parts(executor).values():
        maps, out = whole.get(rotary.maps), whole.get((rotary.out,))
        bare = "forward" not in rotary.module.__dict__ and plain.issuperset(rotary.norms)
        if maps is not None and out is not None and bare and not any(hooked(norm) for norm in rotary.norms):
            forwards.append((rotary.module, RotaryStep(rotary, maps.joined, out.joined, turn, kernels)))
    for block in gated_blocks(executor):
        both, down = whole.get((block.gate, block.up)), whole.get((block.down,))
        if both is not None and down is not None and "forward" not in block.module.__dict__:
            forwards.append((block.module, GatedStep(block, both.joined, down.joined, kernels)))
    return forwards


def prompt_maps(
    executor: Executor,
    stacks: Sequence[Stack],
    lengths: Sequence[int],
    updates: Updates,
    alone: nn.Module | None = None,
) -> dict[Group, JoinedMaps]:
    """For prompts in a packed pass, each of one stack: groups with low-rank updates alone. There are none without
    kernels that read factors where they lie. Below `alone` there is one token of each.
    """
    below = set() if alone is None else set(alone.modules())
    inside = [group for group in groups_of(executor) if _in_trunk(executor, group)]
    ends = [group for group in inside if group.members[0].module in below]
    whole = [group for group in inside if group not in ends]
    found = _low_rank_maps(executor, whole, stacks, lengths, updates)
    return found | _low_rank_maps(executor, ends, stacks, [1] * len(stacks), updates)


def head_maps(executor: Executor, stacks: Sequence[Stack], updates: Updates) -> Forwards:
    """Stand-ins for what is behind the trunk, for one hidden state of each row; there are none for other updates."""
    behind = [group for group in groups_of(executor) if not _in_trunk(executor, group)]
    found = _low_rank_maps(executor, behind, stacks, [1] * len(stacks), updates)
    return [(m.module, Stand(maps, i)) for group, maps in found.items() for i, m in enumerate(group.members)]


def _in_trunk(executor: Executor, group: Group) -> bool:
    """Whether a group's maps are in the trunk: a causal language model's head is not."""
    return group.members[0].module is not executor.backbone.head


def _low_rank_maps(
    executor: Executor, groups: Sequence[Group], stacks: Sequence[Stack], lengths: Sequence[int], updates: Updates
) -> dict[Group, JoinedMaps]:
    kernels = executor.kernels(executor.backbone.dtype)
    if kernels is None or not _computes_alike(executor):
        return {}
    distinct, runs = _runs(stacks, lengths)
    found = {}
    for group in groups:
        sites = [m.site for m in group.members]
        maps, slow = _folds(executor, sites, distinct, updates, kernels)
        if not group.free or slow or not all(f.bare for column in maps for f in column):
            continue
        factors = _gathered(executor, sites, maps, runs, kernels)
        if factors is None or factors.only_low is not None:
            found[group] = JoinedMaps(group, factors)
    return found


def _computes_alike(executor: Executor) -> bool:
    """Whether adapters compute in the backbone's dtype, or wider within the kernels."""
    dtype = executor.backbone.dtype  # the adapters of float16 compute in float32
    plain = executor.compute in (None, dtype) and not torch.is_autocast_enabled(executor.backbone.device.type)
    return plain and dtype != torch.float16


def _runs(stacks: Sequence[Stack], lengths: Sequence[int]) -> tuple[list[Stack], list[tuple[int, int]]]:
    """Neighbours of one stack together, and their positions `[start, stop)`."""
    distinct: list[Stack] = []
    runs: list[tuple[int, int]] = []
    at = 0
    for stack, length in zip(stacks, lengths, strict=True):
        if distinct and distinct[-1] == stack:
            runs[-1] = (runs[-1][0], at + length)
        else:
            distinct.append(stack)
            runs.append((at, at + length))
        at += length
    return distinct, runs


def _folds(
    executor: Executor, sites: Sequence[str], distinct: Sequence[Stack], updates: Updates, kernels: Kernels | None
) -> tuple[list[list[Folded]], frozenset[int]]:
    """What each stack does at maps of one input, and which of the maps must go the general way."""
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
    return maps, frozenset(slow)


def _gathered(
    executor: Executor,
    sites: Sequence[str],
    maps: Sequence[Sequence[Folded]],
    runs: Sequence[tuple[int, int]],
    kernels: Kernels | None,
) -> GroupFactors | None:
    """The factors of all rows at maps of one input; None where no stack has any."""
    if all(f is NOTHING for column in maps for f in column):
        return None
    weights = [executor.backbone.weight(site) for site in sites]
    kernels = kernels if kernels is not None and kernels.dtype == weights[0].dtype else None
    return GroupFactors(maps, [w.shape[0] for w in weights], runs, runs[-1][1], kernels)
