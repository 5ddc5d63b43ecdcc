"""Interventions on a host's passes: push a hidden state along a direction, take a direction out of it, silence an
adapter at some sites, or let it write something else there.

In: a host, directions or a rank-1 adapter. Out: context managers. They nest in any order and act in the order in which
they were entered, in every pass that begins inside: called models, the engine's batches, sampling. Leaving restores
the model exactly. Keys that a stream kept of earlier prompts are not computed again. Refuses to know text and judges.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.adapters.analysis.directions import Directions, projected_out, steered, turned
from lorica.adapters.analysis.directions_rank1 import RankOne, chosen_sites, rank_ones
from lorica.adapters.targets import Targets
from lorica.core.errors import MergeError, MismatchError
from lorica.engine.host import Host, TargetSpec

Whose = str | Adapter | None
"""Whose rows an intervention is for: those on which an adapter acts, or, None, all rows."""
Change = Callable[[Tensor, Tensor], Tensor]
"""What a module's output becomes, from it and the module's input."""


def steer(
    host: Host, directions: Directions, kappa: float, *, layers: Collection[int] | None = None, whose: Whose = None
) -> AbstractContextManager[None]:
    """Inside, `h ← h + κ v` at the output of these layers' blocks (all that have a direction), at every token.

    Raises MethodError for a layer without a direction or a model without a list of blocks, MismatchError for directions
    of another base. Paper: arXiv 2506.11618, which steers one layer with κ from 4 to 12.
    """
    chosen = directions if layers is None else directions.only(layers)
    changes = {n: _by(steered, chosen.vectors[n], kappa) for n in chosen.layers}
    return _at_blocks(host, chosen, changes, whose)


def project_out(
    host: Host, directions: Directions, *, layers: Collection[int] | None = None, whose: Whose = None
) -> AbstractContextManager[None]:
    """Inside, `h ← h − (h·v̂) v̂` at the output of these layers' blocks, each with its own direction, at every token.

    The directions may be those of another fine-tune over the same base. Raises MethodError for a vector that is zero,
    and as `steer` does. Paper: arXiv 2506.11618.
    """
    chosen = directions if layers is None else directions.only(layers)
    return _at_blocks(host, chosen, {n: _by(projected_out, chosen.unit(n)) for n in chosen.layers}, whose)


def adapter_zero(host: Host, *adapters: str | Adapter, targets: TargetSpec = None) -> AbstractContextManager[None]:
    """Inside, these adapters (none named: all) do not act at the sites that `targets` selects (all of an adapter's).

    Whatever the method: where no adapter is left, the base's own forward runs, bit for bit. Raises RouteError for an
    unknown adapter, TargetError where no site is selected, MergeError for one that is merged into the weights.
    """
    chosen = [_adapter(host, name) for name in adapters] or list(host.adapters.values())
    spec = None if targets is None else Targets.of(targets)
    return _muted(host, {(adapter, site) for adapter in chosen for site in chosen_sites(adapter, spec)})


@contextmanager
def adapter_steer(host: Host, adapter: str | Adapter, kappa: float, *, targets: TargetSpec = None) -> Iterator[None]:
    """Inside, a rank-1 adapter is silent at these sites, and `κ B/‖B‖` is added to their outputs at every token of its
    rows: what it would write, at one length everywhere. κ < 0 writes the opposite.

    Raises MethodError where the adapter is not of rank 1, TargetError where no site is selected. Paper: arXiv
    2506.11618, with κ from 5 to 20.
    """
    own = _adapter(host, adapter)
    with ExitStack() as inside:
        for name, one in _silenced(inside, host, own, targets).items():
            inside.enter_context(_after(host, host.backbone.module_of(name), _by(steered, one.write_O, kappa), own))
        yield


@contextmanager
def adapter_turn(
    host: Host, adapter: str | Adapter, epsilon: float = 1.0, *, seed: int = 0, targets: TargetSpec = None
) -> Iterator[None]:
    """Inside, a rank-1 adapter writes its scalars along another direction: `√(1 − ε²) w + ε y` for `w = B/‖B‖`, y
    random and orthogonal to it. ε = 1 is the random adapter of equal norm, the control of `adapter_zero`.

    A site's y depends on (seed, site) alone. Raises MethodError where the adapter is not of rank 1 or ε is not in 0…1.
    """
    own = _adapter(host, adapter)
    with ExitStack() as inside:
        for name, one in _silenced(inside, host, own, targets).items():
            rng = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            written = RankOne(one.site, one.read_I, turned(one.write_O, epsilon, rng))
            inside.enter_context(_after(host, host.backbone.module_of(name), _writes(written), own))
        yield


def _adapter(host: Host, which: str | Adapter) -> Adapter:
    return host.stacks([which])[0][0]


def _by(function: Callable[..., Tensor], *values: Any) -> Change:
    """A change that does not look at the input."""
    return lambda h, x: function(h, *values)


def _writes(one: RankOne) -> Change:
    def change(y: Tensor, x: Tensor) -> Tensor:
        written = one.scalars(x)[..., None] * one.write_O.to(x.device)
        return (y.double() + written).to(y.dtype)

    return change


@contextmanager
def _muted(host: Host, pairs: Collection[tuple[Adapter, str]]) -> Iterator[None]:
    executor = host.executor
    folded = [adapter.name for adapter, _ in pairs if adapter.name in host.merged]
    if folded:
        raise MergeError(
            f"Adapter {folded[0]!r} is merged into the weights, where it cannot be silenced; unmerge() first."
        )
    before, executor.muted = executor.muted, executor.muted | frozenset(pairs)
    try:
        yield
    finally:
        executor.muted = before


def _silenced(inside: ExitStack, host: Host, adapter: Adapter, targets: TargetSpec) -> dict[str, RankOne]:
    found = rank_ones(adapter, host.backbone, None if targets is None else Targets.of(targets))
    inside.enter_context(_muted(host, {(adapter, name) for name in found}))
    return found


@contextmanager
def _at_blocks(host: Host, directions: Directions, changes: dict[int, Change], whose: Whose) -> Iterator[None]:
    blocks = check_directions(host, directions)
    adapter = None if whose is None else _adapter(host, whose)
    with ExitStack() as inside:
        for layer, change in changes.items():
            inside.enter_context(_after(host, blocks[layer], change, adapter))
        yield


def check_directions(host: Host, directions: Directions) -> dict[int, nn.Module]:
    """The blocks that they are for. Raises MismatchError for directions of another base, width or depth."""
    backbone = host.backbone
    blocks = backbone.blocks
    if directions.base and directions.base != backbone.fingerprint():
        name = directions.about.get("base", {}).get("name")
        raise MismatchError(
            f"The directions were made on {name!r} ({directions.base}); this backbone is {backbone.name!r} "
            f"({backbone.fingerprint()}).",
            hint="A direction is one of the states of the weights that it was measured on.",
        )
    deep = [layer for layer in directions.layers if layer not in blocks]
    if deep:
        raise MismatchError(
            f"There is a direction of layer {deep[0]}; {backbone.name!r} has layers 0 to {len(blocks) - 1}."
        )
    width = backbone.sites["input"].shape[0]
    wrong = [layer for layer in directions.layers if len(directions.vectors[layer]) != width]
    if wrong:
        raise MismatchError(
            f"The direction of layer {wrong[0]} has {len(directions.vectors[wrong[0]])} values; the states of "
            f"{backbone.name!r} have {width}."
        )
    return blocks


@contextmanager
def _after(host: Host, module: nn.Module, change: Change, adapter: Adapter | None) -> Iterator[None]:
    """Inside, the module's output is `change(output, input)`, on the rows of one adapter or on all."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        h, x = hidden_of(output), args[0]
        spans = None if adapter is None else _spans(host, adapter, h)
        if spans is None:
            return with_hidden(output, change(h, x))
        if not spans:
            return output
        h_ND, x_NI = h.reshape(-1, h.shape[-1]).clone(), x.reshape(-1, x.shape[-1])
        for start, stop in spans:
            h_ND[start:stop] = change(h_ND[start:stop], x_NI[start:stop])
        return with_hidden(output, h_ND.view(h.shape))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _spans(host: Host, adapter: Adapter, h: Tensor) -> list[tuple[int, int]]:
    """The positions of the flattened leading axes on which an adapter acts."""
    route = host.executor.live_route()
    if route is None:
        return []
    segments = route.segments(h.numel() // h.shape[-1])
    return [(segment.start, segment.stop) for segment in segments if adapter in segment.stack]


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: itself, or the first of several."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The same output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
