"""Linear sites while rows are sampled token by token: few rows, the same adapters at every step, no gradients.

In: an executor, the stack of each row. Out: stand-ins for the forwards of its linear modules, to be used step after
step. Maps of one input (q, k and v; gate and up) are one product, and the rows' factors are gathered once. What has no
such form keeps its own forward. Refuses to know caches, sampling and methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorica.engine.chain import Walk, outside, walk_of
from lorica.engine.executor import Executor
from lorica.engine.factors import FEW, NOTHING, Folded, GroupFactors, gather
from lorica.engine.fast import bare_norms, gated_blocks
from lorica.engine.groups import Group, Stand, groups_of, hooked
from lorica.engine.joined import JoinedMaps
from lorica.engine.native.kernels import Kernels, LowRank, RowMaps
from lorica.engine.route import Stack
from lorica.engine.step_blocks import GatedStep, RotaryStep, Turn, norm_step, rotary_parts
from lorica.engine.step_walk import Maps, StepWalk, step_walk
from lorica.engine.updates import Updates

Forwards = list[tuple[nn.Module, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """How modules compute one token of each row. `walk` is a pass through the trunk, None where that is the trunk's own
    with `forwards` standing in.
    """

    forwards: Forwards
    walk: Walk | None = None

    @property
    def sampler(self) -> StepWalk | None:
        """The walk, where it may sample too."""
        return self.walk if isinstance(self.walk, StepWalk) else None


def step_of(executor: Executor, stacks: Sequence[Stack], updates: Updates) -> Step:
    """Stand-ins that expect one token of each of these rows; neighbours of one stack share. Linear modules have some,
    norms, and blocks of known form.
    """
    backbone = executor.backbone
    if not _computes_alike(executor):
        return Step([])
    kernels = executor.kernels(backbone.dtype)
    adapters = list(dict.fromkeys(adapter for stack in stacks for adapter in stack))
    norms = bare_norms(executor, adapters)
    stood = ((module, norm_step(norm, kernels)) for module, norm in norms)
    forwards: Forwards = [(module, forward) for module, forward in stood if forward is not None]
    walks = executor.walks(backbone.dtype)
    whole: dict[Maps, JoinedMaps] = {}
    distinct, runs = _runs(stacks, [1] * len(stacks))
    for group in groups_of(executor):
        if not group.free:
            continue
        factors, slow = _factors(executor, group, distinct, runs, updates, kernels)
        step = JoinedMaps(group, factors, walks)
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
        walk = step_walk(executor, standing, adapted, adapters, walks, walk)
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
    kernels that read factors where they lie, and only in float32. Below `alone` there is one token of each.
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
    # in half precision another order of roundings would tell a prompt's log-probabilities from the trainer's
    kernels = executor.kernels(torch.float32) if executor.backbone.dtype == torch.float32 else None
    if kernels is None or not _computes_alike(executor):
        return {}
    distinct, runs = _runs(stacks, lengths)
    free = ((group, _rows_at(executor, group, distinct, updates, kernels)) for group in groups if group.free)
    low = ((group, _low(group, rows, runs, kernels)) for group, rows in free if rows is not None)
    walks = executor.walks(torch.float32)
    return {group: JoinedMaps(group, factors, walks) for group, factors in low}


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


def _rows_at(
    executor: Executor, group: Group, distinct: Sequence[Stack], updates: Updates, kernels: Kernels
) -> list[RowMaps] | None:
    """What each stack has at a group's maps, where that is factors for kernels; None elsewhere."""
    if group.members[0].weight.dtype != kernels.dtype:
        return None
    sites = tuple(m.site for m in group.members)
    rows = [updates.row(executor, sites, stack, kernels) for stack in distinct]
    known = [row for row in rows if row is not None]
    return known if len(known) == len(rows) else None


def _low(
    group: Group, rows: Sequence[RowMaps], runs: Sequence[tuple[int, int]], kernels: Kernels
) -> GroupFactors | None:
    """The factors of all rows; None where no stack has any."""
    if not any(row.rank for row in rows):
        return None
    return GroupFactors(LowRank(kernels, rows, group.maps.sizes, [stop - start for start, stop in runs]))


def _factors(
    executor: Executor,
    group: Group,
    distinct: Sequence[Stack],
    runs: Sequence[tuple[int, int]],
    updates: Updates,
    kernels: Kernels | None,
) -> tuple[GroupFactors | None, frozenset[int]]:
    """The factors of the rows' stacks at a group's maps, and which of the maps must go the general way."""
    rows = None if kernels is None else _rows_at(executor, group, distinct, updates, kernels)
    if rows is not None and kernels is not None:
        return _low(group, rows, runs, kernels), frozenset()
    weight, sites = group.members[0].weight, [m.site for m in group.members]
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
    return gather(maps, group.maps.sizes, runs, kernels), frozenset(slow)
