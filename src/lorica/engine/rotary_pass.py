"""Attention modules in training passes whose queries and keys are normed and rotated by one node of a kernel in C.

In: an executor, kernels, norms that no adapter changes. Out: stand-ins for the forwards of attention modules
that are proved to be of a known form. Refuses to know adapters, masks and what the attention function is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lorica.engine.attention import HUB
from lorica.engine.executor import Executor
from lorica.engine.groups import hooked
from lorica.engine.native.kernels import LANES
from lorica.engine.native.nodes import NativeTurn
from lorica.engine.native.passes import Passes
from lorica.engine.step_blocks import Rotary, Rotations, Turn, rotary_parts

PLAIN = (bool, int, float, str, Tensor)
"""What a module may be told that its attention function takes as it is."""


class RotaryPass:
    """The forward of an attention module over whole sequences."""

    def __init__(self, rotary: Rotary, node: NativeTurn, turn: Turn) -> None:
        self.rotary, self.node, self.turn = rotary, node, turn

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotations,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        module, (queries, groups, dim) = self.rotary.module, self.rotary.heads
        rows, positions, _ = hidden_states.shape
        maps = None
        # a cache, whatever it is called in this release of transformers, is for the module's own forward
        plain = all(value is None or isinstance(value, PLAIN) for value in others.values())
        if plain and position_embeddings[0].numel() == rows * positions * dim:
            q, k, v = (part(hidden_states) for part in self.rotary.maps)
            maps = q.reshape(-1, queries * dim), k.reshape(-1, groups * dim)
        if maps is None or not self.node.takes(*maps):
            others |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            own: tuple[Tensor, Tensor | None] = type(module).forward(module, hidden_states=hidden_states, **others)
            return own
        turned = self.node(*maps, self.turn(position_embeddings))
        q, k = (heads.view(rows, positions, -1, dim).transpose(1, 2) for heads in turned)
        v = v.view(rows, positions, groups, dim).transpose(1, 2)
        attend = module.__dict__[HUB]
        y_RTHK, weights = attend(module, q, k, v, attention_mask, **self.rotary.settings, **others)
        return self.rotary.out(y_RTHK.reshape(rows, positions, -1)), weights


def rotary_nodes(executor: Executor, passes: Passes) -> dict[Rotary, NativeTurn]:
    """The nodes of all attention modules of known form."""
    return {rotary: _node(rotary, passes) for rotary in rotary_parts(executor).values() if _fits(rotary)}


def _fits(rotary: Rotary) -> bool:
    """Whether the kernels take its heads, and it draws nothing: what it drops in training is not in its settings."""
    return not rotary.heads[2] % LANES and not getattr(rotary.module, "attention_dropout", 0.0)


def _node(rotary: Rotary, passes: Passes) -> NativeTurn:
    factors = None if rotary.norm_SK is None else (rotary.norm_SK[0], rotary.norm_SK[rotary.heads[0]])
    return NativeTurn(passes, factors, rotary.heads[2], rotary.eps)


def rotary_passes(nodes: dict[Rotary, NativeTurn], bare: set[nn.Module]) -> Iterator[tuple[nn.Module, RotaryPass]]:
    """Stand-ins for one pass, of the modules whose norms are `bare`, and which nobody else changes."""
    turn = Turn()
    for rotary, node in nodes.items():
        free = "forward" not in rotary.module.__dict__ and not any(hooked(norm) for norm in rotary.norms)
        if free and HUB in rotary.module.__dict__ and bare.issuperset(rotary.norms):
            yield rotary.module, RotaryPass(rotary, node, turn)
