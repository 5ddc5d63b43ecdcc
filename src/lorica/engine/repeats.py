"""By which key a packed pass comes again: all that its operations depend on, besides numbers in tensors.

In: the rows of a pass. Out: a key, or None for a pass that must be run as it is: one that draws dropout masks, puts
soft prompts or prefixes before rows, is listened to, or is so long that launching its operations is a small part of it.
Refuses to know how passes are recorded and what they compute.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch

from lorica.adapters.adapter import Adapter
from lorica.engine.chain import chain_of
from lorica.engine.groups import hooked
from lorica.engine.replay import GRAPHS
from lorica.engine.route import Stack
from lorica.engine.trunk import Trunk

MOST = 4096
"""Positions of the longest pass that is recorded."""


def pass_key(
    trunk: Trunk, stacks: Sequence[Stack], lengths: Sequence[int], others: Hashable, *, backward: bool
) -> Hashable | None:
    """The key of a pass of the trunk and the head over these rows. `others` is what else the caller's pass depends
    on.
    """
    host = trunk.host
    executor, hub = host.executor, trunk.hub
    device = trunk.backbone.device.type
    if not executor.graphs or device not in GRAPHS or sum(lengths) > MOST:
        return None
    if hub.shifted is not None or _saving_is_watched():
        return None
    chain = chain_of(executor)
    adapters = dict.fromkeys(adapter for stack in stacks for adapter in stack)
    if chain is None or not all(_steady(adapter, backward=backward) for adapter in adapters):
        return None
    forwards = []
    for part in (chain.trunk, trunk.backbone.head):
        assert part is not None
        for module in part.modules():
            if hooked(module) or getattr(module, "gradient_checkpointing", False):
                return None
            forwards.append(module.__dict__.get("forward"))
    marks = {adapter: (weakref.ref(adapter), adapter.mark, adapter.held) for adapter in adapters}
    rows = tuple(tuple(marks[adapter] for adapter in stack) for stack in stacks)
    modes = (backward, executor.compute, executor.muted, torch.are_deterministic_algorithms_enabled())
    return (rows, tuple(lengths), others, modes, torch.is_autocast_enabled(device), tuple(forwards))


def _saving_is_watched() -> bool:
    """Whether somebody handles what autograd saves, who would not be asked again."""
    top: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def _steady(adapter: Adapter, *, backward: bool) -> bool:
    """Whether an adapter computes the same at every pass, and gradients go into its own row."""
    if any(site.kind in ("attention", "input") for site in adapter.layout.sites.values()):
        return False
    if backward and not adapter.held:
        return adapter.gathers and not _draws(adapter)
    return True


def _draws(adapter: Adapter) -> bool:
    methods: Iterable[object] = {id(method): method for method in adapter.layout.methods.values()}.values()
    return any(getattr(method, "dropout", 0.0) for method in methods)
