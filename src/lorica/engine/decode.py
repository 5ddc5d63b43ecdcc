"""Linear sites while rows are sampled token by token: few rows, the same adapters at every step, no gradients.

In: an executor under a route of one token a row. Out: stand-ins for the forwards of its linear modules, for the time of
a `with`. Maps of one input (q, k and v; gate and up) are one product, and the rows' factors are gathered once. What has
no such form keeps its own forward. Refuses to know caches, sampling and methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lorica.engine.executor import Executor
from lorica.engine.factors import GroupFactors, factors_of
from lorica.engine.groups import Group, Shared, Stand, groups_of, standing_in


class _Step(Shared):
    """A group while rows are sampled: the base product of all members, and the gathered factors of the rows."""

    def __init__(self, group: Group, factors: GroupFactors | None) -> None:
        super().__init__(group)
        self.factors = factors

    def compute(self, x: Tensor) -> list[Tensor]:
        x_NI = x.reshape(-1, x.shape[-1])
        factors = self.factors
        y_NO = self.group.maps.forward(x_NI if factors is None else factors.scaled(x_NI))
        y_NO = y_NO if factors is None else factors.add(x_NI, y_NO)
        y = y_NO.view(*x.shape[:-1], y_NO.shape[1])
        return [y] if len(self.group.maps.sizes) == 1 else list(y.split(self.group.maps.sizes, dim=-1))


@contextmanager
def stepwise_linears(executor: Executor) -> Iterator[None]:
    """Inside, the linear modules expect one token of each row of the present route."""
    backbone, route = executor.backbone, executor.live_route()
    plain = executor.compute in (None, backbone.dtype) and not torch.is_autocast_enabled(backbone.device.type)
    forwards = []
    for group in groups_of(executor) if plain else []:
        if not group.free:
            continue
        factors, slow = factors_of(executor, [m.site for m in group.members], () if route is None else route.stacks)
        step = _Step(group, factors)
        forwards += [(m.module, Stand(step, i)) for i, m in enumerate(group.members) if i not in slow]
    with standing_in(forwards):
        yield
