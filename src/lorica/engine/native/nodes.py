"""Autograd nodes of the kernels for training passes: norms, rotations and gates of known form, one call each way.

In: the stand-ins of `fused`, kernels. Out: stand-ins of the same modules, equal up to rounding, that save the same.
What a kernel does not take goes the way of `fused`. Refuses to know adapters, batches and families.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorica.engine.fused import FORMS, FusedNorm, Gated, probe
from lorica.engine.groups import hooked
from lorica.engine.native.passes import Passes, Signed


class NativeNorm:
    """The forward of a norm; None from `of` where the kernels have none of its dtype."""

    def __init__(self, norm: FusedNorm, passes: Passes) -> None:
        self.norm, self.passes = norm, passes
        self.factor_D = norm.factor.contiguous()
        self.rounded = norm.form is FORMS[0]

    @classmethod
    def of(cls, norm: FusedNorm, passes: Passes) -> NativeNorm | None:
        return cls(norm, passes) if norm.weight.dtype == passes.dtype else None

    def __call__(self, x: Tensor) -> Tensor:
        if not self.passes.takes(x, self.factor_D.shape[0]):
            return self.norm(x)
        result: Tensor = cast(Any, _Norm).apply(x, self)
        return result


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: NativeNorm) -> Tensor:
        y, root = norm.passes.norm_forth(x, norm.factor_D, norm.norm.eps, rounded=norm.rounded)
        ctx.save_for_backward(x, root)
        ctx.norm = norm
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, root = ctx.saved_tensors
        return ctx.norm.passes.norm_back(grads[0].contiguous(), x, ctx.norm.factor_D, root), None


class NativeTurn:
    """Queries and keys of one attention module: every head normed, where there is a factor, and rotated half against
    half.

    Args:
        factors: of the norms of query and key heads, each [K] in float32; None without norms.
        dim: K.
    """

    def __init__(self, passes: Passes, factors: tuple[Tensor, Tensor] | None, dim: int, eps: float) -> None:
        self.passes, self.factors, self.dim, self.eps = passes, factors, dim, eps

    def takes(self, *maps: Tensor) -> bool:
        """Whether the kernels read these outputs of maps [N, D]."""
        return all(self.passes.turns(x_ND, self.dim) for x_ND in maps)

    def __call__(self, q_ND: Tensor, k_ND: Tensor, rotations: Signed) -> tuple[Tensor, Tensor]:
        """Query heads [N, H, K] and key heads [N, G, K]."""
        result: tuple[Tensor, Tensor] = cast(Any, _Turn).apply(q_ND, k_ND, rotations, self)
        return result


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_ND: Tensor, k_ND: Tensor, rotations: Signed, turn: NativeTurn) -> tuple[Tensor, Tensor]:
        ctx.turn, ctx.rotations = turn, rotations
        run, eps = turn.passes.turn_forth, turn.eps
        if turn.factors is None:
            return run(q_ND, None, rotations, eps)[0], run(k_ND, None, rotations, eps)[0]
        (q_NHK, q_root), (k_NGK, k_root) = (
            run(x_ND, factor, rotations, eps) for x_ND, factor in zip((q_ND, k_ND), turn.factors, strict=True)
        )
        ctx.save_for_backward(q_ND, k_ND, q_root, k_root)
        return q_NHK, k_NGK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        turn, run = ctx.turn, ctx.turn.passes.turn_back
        if turn.factors is None:
            return (*(run(dy_NHK, ctx.rotations) for dy_NHK in grads), None, None)
        *maps, q_root, k_root = ctx.saved_tensors
        norms = zip(maps, turn.factors, (q_root, k_root), strict=True)
        return (*(run(dy, ctx.rotations, norm) for dy, norm in zip(grads, norms, strict=True)), None, None)


class NativeGate:
    """What a gated block's `down` reads, where the block's activation is the silu that it was when this was made."""

    def __init__(self, block: Gated, passes: Passes) -> None:
        self.block, self.passes, self.act = block, passes, block.module.act_fn

    @classmethod
    def of(cls, block: Gated, passes: Passes) -> NativeGate | None:
        """None for a block with another activation."""
        return cls(block, passes) if is_silu(block, passes.dtype) else None

    def takes(self, gate_NF: Tensor, up_NF: Tensor) -> bool:
        """Whether the kernels do, and nobody listens to the activation."""
        return self.block.module.act_fn is self.act and plain(self.act) and self.passes.gates(gate_NF, up_NF)

    def forth(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        """`silu(gate) ⊙ up`, outside autograd."""
        return self.passes.gate_forth(gate_NF, up_NF)

    def back(self, dy_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
        """dgate and dup."""
        return self.passes.gate_back(dy_NF.contiguous(), gate_NF, up_NF)

    def __call__(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        if not self.takes(gate_NF, up_NF):
            return self.block.make(gate_NF, up_NF)
        result: Tensor = cast(Any, _Gate).apply(gate_NF, up_NF, self)
        return result


def is_silu(block: Gated, dtype: torch.dtype) -> bool:
    """Whether a block's activation is `x σ(x)` and nobody listens to it."""
    x_F = probe((64,), torch.empty(0, dtype=dtype))
    return plain(block.module.act_fn) and torch.equal(block.make(x_F, torch.ones_like(x_F)), F.silu(x_F))


def plain(act: Any) -> bool:
    """Whether calling an activation is its class's forward and no more."""
    return not isinstance(act, nn.Module) or ("forward" not in act.__dict__ and not hooked(act))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor, gate: NativeGate) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        ctx.gate = gate
        return gate.forth(gate_NF, up_NF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (*ctx.gate.back(grads[0], *ctx.saved_tensors), None)
