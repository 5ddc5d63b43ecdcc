"""Which linear maps of a backbone are handed the same tensor, and their products side by side.

In: a backbone, and one pass of two tokens that shows who shares an input. Out: groups (q, k and v; gate and up; single
maps), kept with the backbone, with frozen weights laid out once for the CPU's kernels where that pays.
Refuses to know adapters and batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorica.engine.executor import Executor
from lorica.engine.modes import in_mode
from lorica.engine.prepack import FrozenMaps, worth_packing
from lorica.engine.sites import SiteForward
from lorica.models.backbone import Backbone
from lorica.models.quantize.linear import QuantizedLinear

KEPT = "groups"
CACHED = 2**25
"""Weights of so many bytes in all stay in a processor's cache from pass to pass. There a product of one or two rows is
two to four times as fast by our kernel as with a weight that is laid out, and one copy serves both directions; from
memory the kernel is slower.
"""


class Member:
    """One linear module with its frozen tensors."""

    def __init__(self, backbone: Backbone, site: str) -> None:
        self.site = site
        self.module = backbone.module_of(site)
        self.weight = backbone.weight(site)
        self.bias_O = backbone.bias(site)

    @property
    def inner(self) -> Callable[[Tensor], Tensor]:
        """The forward that the module has outside of groups."""
        before = self.module.__dict__.get("forward")
        if before is not None:
            return cast(Callable[[Tensor], Tensor], before)
        return lambda x: cast(Tensor, type(self.module).forward(self.module, x))


class Group:
    """Linear modules that are handed one tensor, and their frozen maps side by side."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        weights = [m.weight.matrix() if m.weight.packed is None else m.weight for m in members]
        self.maps = FrozenMaps(weights, [m.bias_O for m in members])
        self.is_dense = all(m.weight.packed is None for m in members)

    def alone(self, index: int) -> Group:
        """One member as a group of its own, which does not pack: for the rare batch that cannot share."""
        return Group([self.members[index]])

    @property
    def free(self) -> bool:
        """Whether nobody else has put a forward on a member since."""
        return all(is_free(m.module) for m in self.members)


def is_free(module: nn.Module) -> bool:
    """Whether a module has the forward of its class, or a stand-in of ours before that."""
    before = module.__dict__.get("forward")
    if isinstance(before, Stand):  # which stands before free modules alone
        return True
    return before is None or (isinstance(before, SiteForward) and before.previous is None)


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward."""
    ahead = module._forward_pre_hooks or module._backward_pre_hooks
    return bool(ahead or module._forward_hooks or module._backward_hooks)


def groups_of(executor: Executor) -> list[Group]:
    """The groups of a backbone that is a causal language model, kept until its weights change (`Backbone.refresh`)."""
    kept = executor.backbone.kept
    if KEPT not in kept:
        groups = [Group(members) for members in _learn(executor)]
        dense = [group for group in groups if group.is_dense]  # a layout of a quantised weight would be a dense copy
        if dense and worth_packing([weight for group in dense for weight in group.maps.dense], copies=2):
            for group in dense:
                group.maps.packs = True
        few = executor.passes(torch.float32) if sum(group.maps.bytes for group in groups) <= CACHED else None
        for group in dense:
            group.maps.few = few if few is not None and few.multiplies(group.maps.dense) else None
        kept[KEPT] = groups
    found: list[Group] = kept[KEPT]
    return found


def _sites(backbone: Backbone) -> list[str]:
    """Linear sites whose module does nothing but its product, apart from our own stand-in."""
    found = []
    for site in backbone.sites.values():
        module = backbone.module_of(site.name)
        plain = type(module) in (nn.Linear, QuantizedLinear) or site.transposed
        if site.kind == "linear" and is_free(module) and plain:
            found.append(site.name)
    return found


class _Watch:
    """The forward of one member during the pass that is watched: reports its input, and computes as before."""

    def __init__(self, member: Member, seen: Callable[[Member, Tensor], None]) -> None:
        self.member, self.inner, self.seen = member, member.inner, seen

    def __call__(self, x: Tensor) -> Tensor:
        self.seen(self.member, x)
        return self.inner(x)


@torch.no_grad()
def _learn(executor: Executor) -> list[list[Member]]:
    """Run two tokens through the trunk, without adapters, and see which neighbours are handed one tensor."""
    backbone = executor.backbone
    assert backbone.trunk is not None
    members = [Member(backbone, site) for site in _sites(backbone)]
    groups: list[list[Member]] = []
    placed: set[str] = set()
    last: list[Tensor | None] = [None]

    def seen(member: Member, x: Tensor) -> None:
        if member.site in placed:
            last[0] = None
        elif x is last[0] and groups[-1][0].weight.dtype == member.weight.dtype:
            groups[-1].append(member)
        else:
            groups.append([member])
            last[0] = x
        placed.add(member.site)

    ids_12 = torch.zeros(1, 2, dtype=torch.long, device=backbone.device)
    watches = [(m.module, _Watch(m, seen)) for m in members]
    with in_mode(backbone.module.modules(), training=False), executor.replay(None), standing_in(watches):
        backbone.trunk(input_ids=ids_12, use_cache=False)
    return [*groups, *([m] for m in members if m.site not in placed)]


@contextmanager
def standing_in(forwards: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Inside, these modules' forwards are others; afterwards what they were, also after an exception."""
    before = [(module, module.__dict__.get("forward")) for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, previous in reversed(before):
            if previous is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = previous


class Shared(ABC):
    """A group in one pass: computed for all members when x is new, handed out to one after the other."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._seen: Tensor | None = None
        self._version = -1
        self._outs: list[Tensor | None] = []

    @abstractmethod
    def compute(self, x: Tensor) -> list[Tensor]:
        """What each member makes of x [..., I]."""

    def output(self, index: int, x: Tensor) -> Tensor:
        """What member `index` makes of x. An output that was handed out once is let go."""
        version = -1 if x.is_inference() else x._version
        if x is not self._seen or version != self._version or self._outs[index] is None:
            self._outs = list(self.compute(x))
            self._seen, self._version = x, version
        found, self._outs[index] = self._outs[index], None
        assert found is not None
        if all(out is None for out in self._outs):
            self._seen = None
        return found


class Stand:
    """The forward of one member of a group that is shared."""

    def __init__(self, shared: Shared, index: int) -> None:
        self.shared, self.index = shared, index

    def __call__(self, x: Tensor) -> Tensor:
        return self.shared.output(self.index, x)
