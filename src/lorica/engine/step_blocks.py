"""Attention and gated blocks while rows are sampled token by token, in as few calls as they have to be.

In: a backbone's modules, the joined linear maps of a step. Out: stand-ins for the forwards of those blocks that are
proved, on a probe, to be of a known form: equal up to rounding, several times fewer operations around the products. Any
other block keeps its own forward. Refuses to know adapters, caches and families by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.engine.abilities import FAILURES, close
from lorica.engine.attention import HUB
from lorica.engine.executor import Executor
from lorica.engine.fused import FusedNorm, Gated, norm_of, probe
from lorica.engine.native.kernels import LANES, Kernels
from lorica.engine.native.nodes import is_silu

Joined = Callable[[Tensor], Tensor]
"""The outputs [R, ΣO] of maps of one input [..., I], side by side."""
Rotations = tuple[Tensor, Tensor]
"""Cosines and sines of each row's position, as transformers hands them to its layers."""
KEPT = "rotary"


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """Attention `o(attend(turn(n_q(q x)), turn(n_k(k x)), v x))` whose rotation is of whole heads, half against half.

    Attributes: `norm_SK` is the factor of the norms of every query and key head, None without norms; `settings` is what
    the module tells its attention function.
    """

    module: nn.Module
    maps: tuple[nn.Linear, nn.Linear, nn.Linear]
    out: nn.Linear
    norms: tuple[nn.Module, ...]
    norm_SK: Tensor | None
    eps: float
    heads: tuple[int, int, int]
    settings: Mapping[str, Any]

    def turned(
        self, y_RO: Tensor, rotations: Rotations, kernels: Kernels | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [R, H, 1, K], keys and values [R, G, 1, K] from the three maps' outputs side by side. Queries and
        keys are in float32 at least.
        """
        queries, groups, dim = self.heads
        y_RSK = y_RO.view(y_RO.shape[0], queries + 2 * groups, dim)
        if kernels is not None:
            q_RHK, k_RGK = kernels.turn(y_RO, self.norm_SK, *rotations, self.heads, self.eps)
            return q_RHK[:, :, None], k_RGK[:, :, None], y_RSK[:, queries + groups :, None]
        x_RSK = y_RSK[:, : queries + groups]
        x_RSK = x_RSK.to(torch.promote_types(x_RSK.dtype, torch.float32))
        if self.norm_SK is not None:
            x_RSK = F.rms_norm(x_RSK, (dim,), None, self.eps).mul_(self.norm_SK)
        cos_R1K, sin_R1K = rotations
        x_RSK = torch.addcmul(x_RSK * cos_R1K, x_RSK.roll(dim // 2, -1), sin_R1K)
        q_RHK, k_RGK = x_RSK.split((queries, groups), dim=1)
        return q_RHK[:, :, None], k_RGK[:, :, None], y_RSK[:, queries + groups :, None]


class Turn:
    """The rotations of a step in the form that `Rotary.turned` reads, made once for all layers that share them."""

    def __init__(self) -> None:
        self._given: object = None
        self._made: Rotations | None = None

    def __call__(self, given: Rotations) -> Rotations:
        if self._made is None or given is not self._given:
            self._given, self._made = given, signed(given)
        return self._made


def signed(given: Rotations) -> Rotations:
    """`x cos + swap(x) sin` with the sign of the half that is subtracted in the sines, [R, 1, K]."""
    cos_R1K, sin_R1K = (part.view(-1, 1, part.shape[-1]) for part in given)
    dtype = torch.promote_types(cos_R1K.dtype, torch.float32)
    cos_R1K, sin_R1K = cos_R1K.to(dtype), sin_R1K.to(dtype, copy=True)
    sin_R1K[..., : sin_R1K.shape[-1] // 2].neg_()
    return cos_R1K.contiguous(), sin_R1K


class NormStep:
    """The forward of a norm for one token of each row, and of the sum before it."""

    def __init__(self, norm: FusedNorm, plain: Callable[[Tensor], Tensor], kernels: Kernels) -> None:
        self.factor_D, self.eps, self.plain, self.kernels = norm.factor.contiguous(), norm.eps, plain, kernels

    def _fits(self, *tensors: Tensor) -> bool:
        return all(x.dtype == self.kernels.dtype and x.is_contiguous() for x in tensors)

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.norm(x, self.factor_D, self.eps) if self._fits(x) else self.plain(x)

    def after(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """`x + branch`, and its norm."""
        if self._fits(x, branch):
            return self.kernels.sum_norm(x, branch, self.factor_D, self.eps)
        x = x + branch
        return x, self(x)


def norm_step(norm: FusedNorm, kernels: Kernels | None) -> Callable[[Tensor], Tensor] | None:
    """How a norm computes one token of each row; None for its own way."""
    plain = norm.in_one_call
    if plain is None or kernels is None or norm.factor.shape[0] % LANES:
        return plain
    return NormStep(norm, plain, kernels)


class RotaryStep:
    """The forward of an attention module for one token of each row."""

    def __init__(self, rotary: Rotary, qkv: Joined, out: Joined, turn: Turn, kernels: Kernels | None) -> None:
        self.rotary, self.qkv, self.out, self.turn = rotary, qkv, out, turn
        self.kernels = kernels if rotary.heads[2] % LANES == 0 else None
        self.settings = {**rotary.settings, "kernels": self.kernels}
        self.attend = rotary.module.__dict__[HUB]

    def __call__(self, hidden_states: Tensor, position_embeddings: Rotations, **_: Any) -> tuple[Tensor, None]:
        rotary = self.rotary
        q, k, v = rotary.turned(self.qkv(hidden_states), self.turn(position_embeddings), self.kernels)
        y_R1HK, _weights = self.attend(rotary.module, q, k, v, None, **self.settings)
        y_R1D = y_R1HK.reshape(*hidden_states.shape[:2], -1).to(hidden_states.dtype)
        return self.out(y_R1D).view(hidden_states.shape), None


class GatedStep:
    """The forward of a gated block for one token of each row."""

    def __init__(self, block: Gated, both: Joined, down: Joined, kernels: Kernels | None) -> None:
        self.block, self.both, self.down = block, both, down
        fits = cast(nn.Linear, block.gate).out_features % LANES == 0
        self.kernels = kernels if kernels is not None and fits and is_silu(block, kernels.dtype) else None

    def __call__(self, x_R1D: Tensor) -> Tensor:
        both_RF = self.both(x_R1D)
        if self.kernels is not None:
            return self.down(self.kernels.gate(both_RF)).view(x_R1D.shape)
        gate_RF, up_RF = both_RF.chunk(2, dim=-1)
        return self.down(self.block.make(gate_RF, up_RF)).view(x_R1D.shape)


# -- which modules are of this form ------------------------------------------------------------------------------------


class _Spy:
    """In the place of a hub: what an attention module hands to its attention function."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]] = []

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        self.seen.append((q, k, v, settings))
        return q.transpose(1, 2), None


def rotary_of(module: nn.Module, like: Tensor) -> Rotary | None:
    """The parts of an attention module that calls one of our hubs; None unless they give what it gives. `like` has the
    backbone's dtype and device.
    """
    parts = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    named = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    norms = [norm for norm in named if norm is not None]
    fused = [norm_of(norm) for norm in norms]
    hub, dim = module.__dict__[HUB], getattr(module, "head_dim", None)
    linear = all(isinstance(part, nn.Linear) for part in parts)
    if "forward" in module.__dict__ or not linear or not isinstance(dim, int) or dim % 2 or len(norms) not in (0, 2):
        return None
    q, k, v, out = cast("list[nn.Linear]", parts)
    heads = (q.out_features // dim, k.out_features // dim, dim)
    factor_SK, eps = None, 0.0
    if norms:
        known = [norm for norm in fused if norm is not None and norm.factor.shape == (dim,)]
        if len(known) < 2 or known[0].eps != known[1].eps:
            return None
        eps, rows = known[0].eps, [norm.factor.expand(n, -1) for norm, n in zip(known, heads, strict=False)]
        factor_SK = torch.cat(rows).contiguous()
    made = Rotary(module, (q, k, v), out, tuple(norms), factor_SK, eps, heads, {})
    spy = _Spy()
    try:
        module.__dict__[HUB] = spy
        return _proved(made, spy, like)
    except FAILURES:  # a forward of another form
        return None
    finally:
        module.__dict__[HUB] = hub


def _proved(made: Rotary, spy: _Spy, like: Tensor) -> Rotary | None:
    """With the settings that the module gives, if a probe of two rows agrees at every point."""
    dim = made.heads[2]
    x_21D = probe((2, 1, made.maps[0].in_features), like)
    # as in a real rotation, both halves of a head have the same angles
    cos, sin = (torch.cat((part, part), -1) for part in probe((2, 1, dim), like).chunk(2, dim=-1))
    given = type(made.module).forward(
        made.module, hidden_states=x_21D, position_embeddings=(cos, sin), attention_mask=None
    )
    if len(spy.seen) != 1 or not isinstance(given, tuple) or len(given) != 2:
        return None
    *theirs, settings = spy.seen[0]
    if not all(value is None or isinstance(value, int | float) for value in settings.values()):
        return None
    y_RO = torch.cat([part(x_21D[:, 0]) for part in made.maps], dim=-1)
    ours = made.turned(y_RO, signed((cos, sin)))
    same = all(close(own.to(other.dtype), other) for own, other in zip(ours, theirs, strict=True))
    wanted = made.out(theirs[0].transpose(1, 2).reshape(2, 1, -1))
    return replace(made, settings=settings) if same and torch.equal(wanted, given[0]) else None


@torch.no_grad()
def rotary_parts(executor: Executor) -> dict[nn.Module, Rotary]:
    """Every attention module of the backbone that has a stand-in, kept until the weights change."""
    backbone = executor.backbone
    if KEPT not in backbone.kept:
        like = torch.empty(0, dtype=backbone.dtype, device=backbone.device)
        with executor.replay(None):
            modules = [module for module in backbone.module.modules() if HUB in module.__dict__]
            found = [rotary_of(module, like) for module in modules]
        backbone.kept[KEPT] = {rotary.module: rotary for rotary in found if rotary is not None}
    return cast("dict[nn.Module, Rotary]", backbone.kept[KEPT])
