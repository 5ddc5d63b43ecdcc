"""Norms and gated feed-forward blocks as single autograd nodes that save only what they read.

In: a backbone's modules. Out: stand-ins for the forwards of those that are proved, on a probe, to be of a known form:
bit for bit the same output, less memory and time in backward. Any other module keeps its own forward.
Refuses to know adapters, batches and families by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorica.engine.groups import is_free
from lorica.engine.modes import in_mode
from lorica.models.backbone import Backbone

Scale = Callable[[Tensor, Tensor, torch.dtype], Tensor]


def _scaled_after(x_hat: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Llama's order: round first, then `w ⊙`."""
    return weight * x_hat.to(dtype)


def _scaled_before(x_hat: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Gemma's: `(1 + w) ⊙` in float32, then round."""
    return (x_hat * (1.0 + weight.float())).to(dtype)


@dataclass(frozen=True, slots=True)
class Form:
    """A way to apply a norm's weight, and the factor by which a gradient goes through it."""

    apply: Scale
    factor: Callable[[Tensor], Tensor]


FORMS = (
    Form(_scaled_after, lambda weight: weight.float()),
    Form(_scaled_before, lambda weight: 1.0 + weight.float()),
)


class FusedNorm:
    """The forward of one root-mean-square norm: `w ⊙ x / √(mean(x²) + ε)`, in float32 within."""

    def __init__(self, weight: Tensor, eps: float, form: Form) -> None:
        self.weight, self.eps, self.form = weight.detach(), eps, form
        self.factor = form.factor(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = cast(Any, _Norm).apply(x, self)
        return result

    def root(self, wide: Tensor) -> Tensor:
        """`1 / √(mean(x²) + ε)` of a float32 x."""
        return wide.pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()

    @property
    def in_one_call(self) -> Callable[[Tensor], Tensor] | None:
        """torch's own norm, for passes without gradients: fewer calls, and one rounding fewer. None for a form whose
        factor is not of the weight's dtype.
        """
        factor = self.weight if self.form is FORMS[0] else self.factor
        if factor.dtype != self.weight.dtype:
            return None
        return lambda x: F.rms_norm(x, factor.shape, factor, self.eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: FusedNorm) -> Tensor:
        wide = x.float()
        root = norm.root(wide)
        ctx.save_for_backward(x, root)
        ctx.factor = norm.factor
        return norm.form.apply(wide * root, norm.weight, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, root = ctx.saved_tensors
        dy, x_hat = grads[0].float() * ctx.factor, x.float() * root
        dot = torch.linalg.vecdot(dy, x_hat)[..., None]
        return dy.addcmul_(x_hat, dot, value=-1 / x.shape[-1]).mul_(root).to(x.dtype), None


def norm_of(module: nn.Module) -> FusedNorm | None:
    """A stand-in for a norm's forward; None unless one form gives its output bit for bit."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named = type(module).__name__.endswith("RMSNorm") and is_free(module)
    if not named or weight is None or weight.ndim != 1 or not isinstance(eps, float) or len(module._parameters) > 1:
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None  # such norms are in float32 within, and a float64 base asks for its own rounding
    x = probe((3, weight.shape[0]), weight)
    expected = type(module).forward(module, x)
    for form in FORMS:
        fused = FusedNorm(weight, eps, form)
        if torch.equal(fused(x), expected):
            return fused
    return None


def probe(shape: Sequence[int], like: Tensor) -> Tensor:
    """Random numbers, the same each time; torch's global state is left alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like)


@dataclass(frozen=True, slots=True)
class Gated:
    """A feed-forward block `down(act(gate(x)) ⊙ up(x))`, by its modules."""

    module: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module

    def make(self, gate: Tensor, up: Tensor) -> Tensor:
        """What `down` reads, by the activation that the block has now."""
        act = cast(Callable[[Tensor], Tensor], self.module.act_fn)
        return act(gate) * up


def gated_of(module: nn.Module) -> Gated | None:
    """The parts of a gated block; None unless they give its output bit for bit."""
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    gate, up, down, act = (getattr(module, name, None) for name in names)
    if not all(isinstance(part, nn.Linear) for part in (gate, up, down)) or act is None:
        return None
    if "forward" in module.__dict__ or set(module._modules) - set(names):
        return None
    found = Gated(module, cast(nn.Module, gate), cast(nn.Module, up), cast(nn.Module, down))
    return found if all(_is_gated(found, training) for training in (False, True)) else None


def _is_gated(block: Gated, training: bool) -> bool:
    """Whether the parts give the block's output in one mode: some drop features while training."""
    module = block.module
    weight = cast(nn.Linear, block.gate).weight
    x = probe((3, weight.shape[1]), weight)
    generators = torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else [])
    with generators, in_mode(module.modules(), training=training):
        try:
            expected = type(module).forward(module, x)
            return torch.equal(block.down(block.make(block.gate(x), block.up(x))), cast(Tensor, expected))
        except (TypeError, RuntimeError):  # a forward of another form
            return False


@torch.no_grad()
def fused_parts(backbone: Backbone) -> tuple[dict[nn.Module, FusedNorm], list[Gated]]:
    """Every module of the backbone that has a stand-in. Call it where no adapter acts."""
    norms, blocks = {}, []
    for module in backbone.module.modules():
        norm = norm_of(module)
        if norm is not None:
            norms[module] = norm
        block = gated_of(module)
        if block is not None:
            blocks.append(block)
    return norms, blocks
