"""Trunks that are a chain of `x + attention(norm(x))` and `x + block(norm(x))`: a plain loop over their layers.

In: a backbone, stand-ins for its modules. Out: final hidden states. Only for trunks that are proved, on a probe, to be
such a chain, bit for bit: what transformers does around the layers is no small part of a small model's pass. Refuses to
know adapters, caches and families by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorica.engine.abilities import FAILURES, probe_row
from lorica.engine.executor import Executor
from lorica.engine.groups import hooked
from lorica.engine.modes import in_mode
from lorica.models.backbone import Backbone

KEPT = "chain"
PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
Walk = Callable[[Tensor, Tensor], Tensor]
"""Final hidden states [R, T, width] from ids and positions [R, T]."""
Forward = Callable[..., Any]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Only these positions go on behind the last attention, inside `alone`, where they are all that there is."""

    index_K: Tensor
    alone: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Chain:
    """The modules of a trunk. Each layer has its norm, attention, second norm and feed-forward block."""

    trunk: nn.Module
    embedding: nn.Module
    rotations: nn.Module
    layers: tuple[tuple[nn.Module, ...], ...]
    owners: tuple[nn.Module, ...]
    norm: nn.Module

    @property
    def parts(self) -> list[nn.Module]:
        """What a walk calls, besides the embedding and the rotations."""
        return [*(part for parts in self.layers for part in parts), self.norm]

    def walk(self, forward: Callable[[nn.Module], Forward], cut: Cut | None = None) -> Walk:
        """A pass in which `forward` says how each module computes, now and later."""
        layers = [tuple(forward(part) for part in parts) for parts in self.layers]
        first = layers[0][0] if layers else forward(self.norm)
        nexts = [*(layer[0] for layer in layers[1:]), forward(self.norm)]
        steps = [
            (attend, _after(second), block, _after(third))
            for (_, attend, second, block), third in zip(layers, nexts, strict=bool(layers))
        ]

        def run(ids_RT: Tensor, positions_RT: Tensor) -> Tensor:
            x_RTD: Tensor = self.embedding(ids_RT)
            turns = self.rotations(x_RTD, positions_RT)
            y_RTD: Tensor = first(x_RTD)
            for depth, (attend, second, block, third) in enumerate(steps, 1):
                # by keyword, as transformers does
                y_RTD = attend(hidden_states=y_RTD, position_embeddings=turns, attention_mask=None)[0]
                alone = cut if depth == len(steps) else None
                if alone is not None:
                    x_RTD, y_RTD = x_RTD[:, alone.index_K], y_RTD[:, alone.index_K]
                with nullcontext() if alone is None else alone.alone():
                    x_RTD, y_RTD = second(x_RTD, y_RTD)
                    x_RTD, y_RTD = third(x_RTD, block(y_RTD))
            return y_RTD

        return run


def _after(norm: Forward) -> Callable[[Tensor, Tensor], Pair]:
    """`x + branch` and its norm: in one call, where the norm has one for it."""
    own = None if isinstance(norm, nn.Module) else getattr(norm, "after", None)
    if own is not None:
        return cast(Callable[[Tensor, Tensor], Pair], own)

    def both(x: Tensor, branch: Tensor) -> Pair:
        x = x + branch
        return x, norm(x)

    return both


def chain_of(executor: Executor) -> Chain | None:
    """The trunk of a backbone as a chain, kept until its weights change; None for any other trunk."""
    backbone = executor.backbone
    if KEPT not in backbone.kept:
        with executor.replay(None):
            backbone.kept[KEPT] = _found(backbone)
    return cast("Chain | None", backbone.kept[KEPT])


@torch.no_grad()
def _found(backbone: Backbone) -> Chain | None:
    trunk = backbone.trunk
    if trunk is None or "forward" in trunk.__dict__:
        return None
    owners = getattr(trunk, "layers", None)
    ends = [getattr(trunk, name, None) for name in ("embed_tokens", "rotary_emb", "norm")]
    if not isinstance(owners, nn.ModuleList) or not all(isinstance(end, nn.Module) for end in ends):
        return None
    layers = [tuple(getattr(owner, name, None) for name in PARTS) for owner in owners]
    if not all(isinstance(part, nn.Module) for parts in layers for part in parts):
        return None
    embedding, rotations, norm = cast("list[nn.Module]", ends)
    found = Chain(trunk, embedding, rotations, cast(Any, tuple(layers)), tuple(owners), norm)
    ids_1T = torch.tensor([probe_row(backbone)], device=backbone.device)
    places_1T = torch.arange(ids_1T.shape[1], device=backbone.device)[None]
    try:  # without a mask, the attention of a single row is causal
        with in_mode(trunk.modules(), training=False):
            wanted = trunk(input_ids=ids_1T, position_ids=places_1T, use_cache=False)[0]
            return found if torch.equal(found.walk(lambda module: module)(ids_1T, places_1T), wanted) else None
    except FAILURES:
        return None


def walk_of(executor: Executor, forwards: Mapping[nn.Module, Forward]) -> Walk | None:
    """The trunk's pass by these stand-ins, and by the modules themselves where there is none; None for a trunk that is
    no chain, and where somebody listens to a module that would not be called.
    """
    chain = chain_of(executor)
    if chain is None:
        return None
    standing = [part for part in chain.parts if part in forwards]
    if any(hooked(module) for module in (chain.trunk, *chain.owners, *standing)):
        return None
    return chain.walk(lambda module: forwards.get(module, module))


def last_block(executor: Executor) -> nn.Module | None:
    """The last feed-forward block of a trunk that is a chain, where some positions may go on alone; None where there is
    none, or somebody listens to a part of it.
    """
    chain = chain_of(executor)
    if chain is None or not chain.layers:
        return None
    behind = (part for owner in (*chain.layers[-1][2:], chain.norm) for part in owner.modules())
    return None if any(map(hooked, behind)) else chain.layers[-1][3]


def packed_walk_of(executor: Executor, cut: Cut | None = None) -> Walk | None:
    """A packed pass by the forwards that the modules have now; None for a trunk that is no chain, whose layers are
    checkpointed, or where somebody listens to one.
    """
    chain = chain_of(executor)
    if chain is None or hooked(chain.trunk):
        return None
    if any(hooked(layer) or getattr(layer, "gradient_checkpointing", False) for layer in chain.owners):
        return None
    return chain.walk(lambda module: module if hooked(module) else module.forward, cut)


def outside(executor: Executor, forwards: Mapping[nn.Module, Forward]) -> list[tuple[nn.Module, Forward]]:
    """The stand-ins that a walk does not call itself: they must stand before their modules."""
    chain = chain_of(executor)
    assert chain is not None
    inside = {module for part in chain.parts if part in forwards for module in part.modules()}
    return [(module, forward) for module, forward in forwards.items() if module not in inside]
