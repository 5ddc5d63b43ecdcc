"""Linear sites while rows are sampled token by token: few rows, the same adapters at every step, no gradients.

In: a host under a route of one token a row. Out: stand-ins for the forwards of its linear modules, for the time of a
`with`. Maps of one input (q, k and v; gate and up) become one product with weights packed once, and the rows' factors
are gathered once. What has no such form keeps its own forward. Refuses to know caches, sampling and methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.engine.factors import GroupFactors, factors_of
from lorica.engine.host import Host
from lorica.engine.prepack import PackedWeight, worth_packing
from lorica.engine.route import Stack
from lorica.engine.sites import LinearForward
from lorica.models.backbone import Backbone


class Member:
    """One linear module. `inner` is what acted before, `group` the maps that it is computed with."""

    def __init__(self, backbone: Backbone, site: str) -> None:
        self.site = site
        self.module = backbone.module_of(site)
        self.weight_OI = backbone.weight(site).matrix()
        self.bias_O = backbone.bias(site)
        self._version = self.weight_OI._version

    @property
    def inner(self) -> Callable[[Tensor], Tensor]:
        """The forward that the module has when no row is being sampled."""
        before = self.module.__dict__.get("forward")
        if before is not None:
            return cast(Callable[[Tensor], Tensor], before)
        return lambda x: cast(Tensor, type(self.module).forward(self.module, x))

    def unchanged(self, backbone: Backbone) -> bool:
        """Whether the frozen tensors are those that this object was made of."""
        now = backbone.weight(self.site).matrix()
        return (
            now.data_ptr() == self.weight_OI.data_ptr()
            and now.dtype == self.weight_OI.dtype
            and now._version == self._version
        )


class Group:
    """Maps of one input tensor: one base product, one low-rank product, an output for each member."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.sizes = [m.weight_OI.shape[0] for m in members]
        self.packed: PackedWeight | None = None
        self.factors: GroupFactors | None = None
        self._seen: Tensor | None = None
        self._version = -1
        self._outs: list[Tensor] = []

    def pack(self) -> None:
        """Lay the frozen weights out for the CPU's kernels; a second copy of them."""
        self.packed = PackedWeight([m.weight_OI for m in self.members], [m.bias_O for m in self.members])

    def output(self, index: int, x: Tensor) -> Tensor:
        """What member `index` makes of x; computed for all members when x is new."""
        if x is not self._seen or x._version != self._version:
            y_NO = self._compute(x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1]))
            y = y_NO.view(*x.shape[:-1], y_NO.shape[1])
            self._outs = [y] if len(self.sizes) == 1 else list(y.split(self.sizes, dim=-1))
            self._seen, self._version = x, x._version
        return self._outs[index]

    def _compute(self, x_NI: Tensor) -> Tensor:
        """The outputs of all members side by side."""
        factors = self.factors
        x_in = x_NI if factors is None else factors.scaled(x_NI)
        if self.packed is not None:
            y_NO = self.packed(x_in)
        else:
            ys = [F.linear(x_in, m.weight_OI, m.bias_O) for m in self.members]
            y_NO = ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)
        return y_NO if factors is None else factors.add(x_NI, y_NO)

    def forget(self) -> None:
        """Drop the last input and its outputs."""
        self._seen, self._outs = None, []


class _Stand:
    """The forward of one member while rows are sampled."""

    def __init__(self, group: Group, index: int) -> None:
        self.group, self.index = group, index

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.output(self.index, x)


class _Watch:
    """The forward of one member during a prompt pass: reports its input, and computes as before."""

    def __init__(self, member: Member, seen: Callable[[Member, Tensor], None]) -> None:
        self.member, self.inner, self.seen = member, member.inner, seen

    def __call__(self, x: Tensor) -> Tensor:
        self.seen(self.member, x)
        return self.inner(x)


class _Groups:
    """What a backbone keeps between generations. A copy of the backbone starts without it."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class FastLinears:
    """Stands before a host's linear modules while entered; `watching()` learns once which of them share their input."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._before: list[tuple[nn.Module, Any]] = []
        self._installed: list[Group] = []

    # -- learning the groups -----------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a pass through the model shows which modules are handed the same tensor. Only needed once a
        backbone.
        """
        if self._groups() is not None:
            yield
            return
        members = [Member(self.host.backbone, site) for site in self._sites()]
        groups: list[list[Member]] = []
        placed: set[str] = set()
        last: list[Tensor | None] = [None]

        def seen(member: Member, x: Tensor) -> None:
            if member.site in placed:
                last[0] = None
            elif x is last[0]:
                groups[-1].append(member)
            else:
                groups.append([member])
                last[0] = x
            placed.add(member.site)

        self._install([(m.module, _Watch(m, seen)) for m in members])
        try:
            yield
        finally:
            self._restore()
        groups += [[m] for m in members if m.site not in placed]
        self._keep([Group(g) for g in groups])

    def _sites(self) -> list[str]:
        """Linear sites whose module does nothing but its product, apart from our own stand-in."""
        backbone, found = self.host.backbone, []
        for site in backbone.sites.values():
            if site.kind != "linear":
                continue
            module = backbone.module_of(site.name)
            before = module.__dict__.get("forward")
            ours = before is None or (isinstance(before, LinearForward) and before.previous is None)
            if ours and (type(module) is nn.Linear or site.transposed):
                found.append(site.name)
        return found

    def _groups(self) -> list[Group] | None:
        """The groups kept from before, unless the frozen weights have changed since."""
        kept = self.host.backbone.kept.get("decode")
        if not isinstance(kept, _Groups):
            return None
        if all(member.unchanged(self.host.backbone) for group in kept.groups for member in group.members):
            return kept.groups
        return None

    def _keep(self, groups: list[Group]) -> None:
        if groups and worth_packing([m.weight_OI for group in groups for m in group.members]):
            for group in groups:
                group.pack()
        self.host.backbone.kept["decode"] = _Groups(groups)

    # -- standing in -------------------------------------------------------------------------------------------------

    def __enter__(self) -> FastLinears:
        groups, stacks = self._groups(), self._stacks()
        if groups is None or not self._plain_arithmetic():
            return self
        self._installed = groups
        forwards: list[tuple[nn.Module, Any]] = []
        for group in groups:
            group.factors, slow = factors_of(self.host.executor, [m.site for m in group.members], stacks)
            forwards += [(m.module, _Stand(group, i)) for i, m in enumerate(group.members) if i not in slow]
        self._install(forwards)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        for group in self._installed:
            group.factors = None
            group.forget()
        self._installed = []

    def _stacks(self) -> tuple[Stack, ...]:
        route = self.host.executor.live_route()
        return () if route is None else route.stacks

    def _plain_arithmetic(self) -> bool:
        """Whether adapters compute in the base's own dtype, without autocast."""
        backbone, compute = self.host.backbone, self.host.executor.compute
        return not torch.is_autocast_enabled(backbone.device.type) and compute in (None, backbone.dtype)

    def _install(self, forwards: Sequence[tuple[nn.Module, Any]]) -> None:
        for module, forward in forwards:
            self._before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward

    def _restore(self) -> None:
        for module, before in reversed(self._before):
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self._before = []
