"""All layers of a chain in one call of a kernel, or whole tokens, while rows are sampled token by token.

In: a chain, the stand-ins of its modules in a step, the step's joined maps. Out: a walk, where every module has a
stand-in that the kernel knows; rows whose keys lie in several lanes go the way of the stand-ins. Refuses to know
adapters and families by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.engine.attention import HUB
from lorica.engine.chain import Chain, Forward, Walk, chain_of
from lorica.engine.executor import Executor
from lorica.engine.groups import hooked
from lorica.engine.kv_cache import KVCache
from lorica.engine.kv_lane import Lane
from lorica.engine.native.walk import Adapted, Layer, Layers, Memory, Norm, Sampler, Walks
from lorica.engine.sites import is_bare
from lorica.engine.step_blocks import GatedStep, NormStep, RotaryStep, Rotations, signed
from lorica.models.positions import uniform_positions, window_of

KEPT = "turns"
FIRST = 256
"""Positions that rotations are made for at first."""
Maps = tuple[nn.Module, ...]
Drawn = tuple[Tensor, Tensor]
"""Tokens [C, R] of rows, and their log-probabilities."""


class Turns:
    """Signed cosines and sines [R, K] of positions [R, 1], which are all that a rotation depends on: made once for all
    positions up to the largest so far.
    """

    def __init__(self, rotations: nn.Module) -> None:
        self._rotations, self._made = rotations, (torch.empty(0), torch.empty(0))

    def __call__(self, x_R1D: Tensor, positions_R1: Tensor) -> Rotations:
        positions_R = positions_R1.flatten()
        cos_PK, sin_PK = self.known(x_R1D, int(positions_R.max()) + 1)
        return cos_PK.index_select(0, positions_R), sin_PK.index_select(0, positions_R)

    def known(self, like: Tensor, count: int) -> Rotations:
        """Those of all positions below `count` at least, [P, K], for hidden states of this dtype and device."""
        if count > len(self._made[0]):
            known_1P = torch.arange(max(FIRST, 2 * count), device=like.device)[None]
            cos_P1K, sin_P1K = signed(self._rotations(like, known_1P))
            self._made = cos_P1K[:, 0].contiguous(), sin_P1K[:, 0].contiguous()
        return self._made


def _turns_of(executor: Executor, chain: Chain) -> Callable[[Tensor, Tensor], Rotations]:
    """Rotations in the form that the layers read, kept until the weights change."""
    kept = executor.backbone.kept
    if uniform_positions(executor.backbone.module) is not None or hooked(chain.rotations):
        return lambda x_R1D, positions_R1: signed(chain.rotations(x_R1D, positions_R1))
    if KEPT not in kept:
        kept[KEPT] = Turns(chain.rotations)
    return cast(Turns, kept[KEPT])


class StepWalk:
    """The walk of a step. `ends` are the table of embeddings and the head, where whole tokens are made of those."""

    def __init__(
        self,
        chain: Chain,
        turns: Callable[[Tensor, Tensor], Rotations],
        attentions: list[nn.Module],
        layers: Layers,
        ends: tuple[Tensor, Adapted] | None,
        other: Walk,
    ) -> None:
        self._chain, self._turns, self._attentions, self._layers, self._other = chain, turns, attentions, layers, other
        self._seen: tuple[Lane, int] | None = None
        self._sampling: tuple[Sampler, Turns] | None = None
        if ends is not None and isinstance(turns, Turns):
            self._sampling = Sampler(layers, *ends), turns

    def __call__(self, ids_RT: Tensor, positions_RT: Tensor) -> Tensor:
        cache = self._attentions[0].__dict__[HUB].cache
        found = None if cache is None else self._places(cache)
        if found is None:
            return self._other(ids_RT, positions_RT)
        lane, places_R = found
        x_R1D = self._chain.embedding(ids_RT)
        turns = self._turns(x_R1D, positions_RT)
        return self._layers(x_R1D[:, 0].clone(), turns, places_R, lane.slot)[:, None]

    def room(self, cache: KVCache) -> int:
        """How many tokens of each row `sample` may be asked for; the first of them has been advanced to."""
        found = None if self._sampling is None else self._places(cache)
        return 0 if found is None else found[0].capacity - found[0].slot

    def sample(
        self, cache: KVCache, ids_R: Tensor, heats: Sequence[float], uniform: Sequence[Sequence[float]]
    ) -> Drawn:
        """The next tokens of each row behind `ids`, one for each list of uniform numbers of the rows."""
        found = self._places(cache)
        assert found is not None
        assert self._sampling is not None
        (lane, places_R), (sampler, turns), count = found, self._sampling, len(uniform)
        positions_R = cache.positions().flatten()
        known = turns.known(sampler.embedding, int(positions_R.max()) + count)
        rows = ids_R, positions_R, places_R
        drawn = sampler(*rows, known, torch.tensor(heats), torch.tensor(uniform), lane.slot)
        lane.advance(count - 1)
        return drawn

    def _places(self, cache: KVCache) -> tuple[Lane, Tensor] | None:
        """The lane of all rows, which the layers know then, and their places in it."""
        found = cache.alone()
        if found is not None and self._seen != (found[0], found[0].version):
            self._layers.remember([Memory(*found[0].memory(module)) for module in self._attentions])
            self._seen = found[0], found[0].version
        return found


def step_walk(
    executor: Executor,
    forwards: Mapping[nn.Module, Forward],
    adapted: Mapping[Maps, Adapted | None],
    adapters: Iterable[Adapter],
    walks: Walks,
    other: Walk,
) -> Walk:
    """A chain's walk in one call, where that is what its stand-ins do for rows of these adapters; `other` is what they
    do.
    """
    chain = chain_of(executor)
    assert chain is not None
    layers, heads = [], set()
    for parts in chain.layers:
        layer = _layer([forwards.get(part) for part in parts], adapted)
        if layer is None:
            return other
        layers.append(layer)
        heads.add(cast(RotaryStep, forwards[parts[1]]).rotary.heads)
    last = _norm(forwards.get(chain.norm))
    if last is None or len(heads) != 1:
        return other
    attentions = [parts[1] for parts in chain.layers]
    whole = Layers(walks, layers, last, heads.pop())
    ends = _ends(executor, chain.embedding, adapted, adapters)
    return StepWalk(chain, _turns_of(executor, chain), attentions, whole, ends, other)


def _ends(
    executor: Executor, embedding: nn.Module, adapted: Mapping[Maps, Adapted | None], adapters: Iterable[Adapter]
) -> tuple[Tensor, Adapted] | None:
    """The table [V, D] that tokens become hidden states by, and the head, where logits are what it makes; None where
    either is more.
    """
    backbone = executor.backbone
    head = None if backbone.head is None or backbone.transforms_logits else adapted.get((backbone.head,))
    if head is None or type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return None
    table_VD = embedding.weight.detach()
    known = table_VD.dtype == torch.float32 and table_VD.device.type == "cpu" and table_VD.is_contiguous()
    return (table_VD, head) if known and is_bare(embedding, adapters) and not hooked(embedding) else None


def _norm(step: Forward | None) -> Norm | None:
    return Norm(step.factor_D, step.eps) if isinstance(step, NormStep) else None


def _layer(steps: Sequence[Forward | None], adapted: Mapping[Maps, Adapted | None]) -> Layer | None:
    first, attention, second, block = steps
    before, after = _norm(first), _norm(second)
    if before is None or after is None or not isinstance(attention, RotaryStep) or not isinstance(block, GatedStep):
        return None
    if attention.kernels is None or block.kernels is None:
        return None
    rotary, settings = attention.rotary, attention.rotary.settings
    maps = [
        adapted.get(own)
        for own in (rotary.maps, (rotary.out,), (block.block.gate, block.block.up), (block.block.down,))
    ]
    if any(own is None for own in maps) or any(settings.get(name) is not None for name in ("softcap", "s_aux")):
        return None
    qkv, out, both, down = cast("list[Adapted]", maps)
    turn = None if rotary.norm_SK is None else Norm(rotary.norm_SK, rotary.eps)
    scale, window = settings.get("scaling"), settings.get("sliding_window", window_of(rotary.module))
    scale = rotary.heads[2] ** -0.5 if scale is None else scale
    return Layer(before, qkv, turn, out, after, both, down, scale, window or 0)
