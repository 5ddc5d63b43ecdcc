"""An update: what a method says about one site, and the only thing the executor understands.

    y = out_scale ⊙ ( (x ⊙ in_scale) (W₀ + delta)ᵀ + Σ_f scale_f · post_f ⊙ (((x A_fᵀ) ⊙ mid_f) B_fᵀ) ) + b₀ + bias

In: tensors, differentiable with respect to a method's parameters. Out: records and the dense effective weight.
Suffixes: I in, O out, R rank, P virtual tokens, D width, H kv heads, K head dim. Refuses to know methods, rows and
modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`ΔW = scale · diag(post) B diag(mid) A`.

    `A_RI` is [r, in] and `B_OR` is [out, r] for linear sites; for conv A is [r, in/groups, *kernel] and B [out, r];
    for embeddings A is [r, tokens] and B [dim, r]. `mid_R` and `post_O` are the vectors of methods whose factors are
    shared between adapters (VeRA): keeping them apart lets one product serve every tenant, and no gradient of A or B
    is formed.
    """

    A_RI: Tensor
    B_OR: Tensor
    scale: float = 1.0
    mid_R: Tensor | None = None
    post_O: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A_RI.shape[0]

    def dense(self) -> Tensor:
        """The product, shape [out, *A's other axes], in the factors' dtype."""
        B_OR = self.B_OR if self.mid_R is None else self.B_OR * self.mid_R
        if self.post_O is not None:
            B_OR = self.post_O[:, None] * B_OR
        return self.scale * (B_OR @ self.A_RI.flatten(1)).view(-1, *self.A_RI.shape[1:])

    def folded(self) -> LowRank:
        """The same ΔW with scale, mid and post folded into B: exactly what a plain LoRA folder can hold."""
        B_OR = self.scale * self.B_OR if self.mid_R is None else self.scale * self.B_OR * self.mid_R
        return LowRank(self.A_RI, B_OR if self.post_O is None else self.post_O[:, None] * B_OR)


@dataclass(frozen=True, slots=True, eq=False)
class LinearUpdate:
    """An update of a site that holds a weight: linear, expert, embedding, conv or norm.

    For a norm, `delta` is [features] and is added to the norm's weight. Absent parts are None; all None is the
    identity. `dropout` acts on the input of the low-rank path only, and only while training. With `scale_bias`,
    out_scale multiplies b₀ too (IA³); otherwise b₀ stays as it is (DoRA).
    """

    factors: tuple[LowRank, ...] = ()
    delta: Tensor | None = None
    in_scale_I: Tensor | None = None
    out_scale_O: Tensor | None = None
    bias_O: Tensor | None = None
    dropout: float = 0.0
    scale_bias: bool = False

    @property
    def low_rank_only(self) -> bool:
        """Whether a plain LoRA folder can hold it (a bias is `lora_bias`)."""
        return self.delta is None and self.in_scale_I is None and self.out_scale_O is None

    def effective(self, weight: Tensor) -> Tensor:
        """`W' = diag(out_scale) ((W + delta) diag(in_scale) + Σ BA)` for a normalised weight of any site kind."""
        trail = (1,) * (weight.ndim - 1)
        merged = weight if self.delta is None else weight + self.delta
        if self.in_scale_I is not None:
            merged = merged * (self.in_scale_I if weight.ndim <= 2 else self.in_scale_I.view(1, -1, *trail[1:]))
        for factor in self.factors:
            merged = merged + factor.dense().to(merged.dtype)
        return merged if self.out_scale_O is None else self.out_scale_O.view(-1, *trail) * merged

    def effective_bias(self, bias_O: Tensor | None) -> Tensor | None:
        """`b' = b₀ (⊙ out_scale with scale_bias) + bias`; None where there is no bias at all."""
        if bias_O is not None and self.scale_bias and self.out_scale_O is not None:
            bias_O = bias_O * self.out_scale_O
        if bias_O is None or self.bias_O is None:
            return self.bias_O if bias_O is None else bias_O
        return bias_O + self.bias_O


@dataclass(frozen=True, slots=True, eq=False)
class SoftPrompt:
    """Virtual tokens before the first real one: `[p₁ … p_P, e(x₁) …]`. `embeddings_PD` is [P, width]."""

    embeddings_PD: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PrefixKV:
    """Keys and values that every query of one attention site also sees, at positions before the first token.

    Both are [P, kv heads, head dim], not rotated: the real tokens' positions start at P.
    """

    key_PHK: Tensor
    value_PHK: Tensor


Update = LinearUpdate | SoftPrompt | PrefixKV


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One tensor that a method owns at a site: its shape, whether it is trained, decayed, and in which group.

    A tensor that is not trained but `changes` is written by the method's step hooks (a counter, a mask, a choice): it
    is float32 whatever the adapter's dtype, and never shared with other adapters.
    """

    shape: tuple[int, ...]
    trainable: bool = True
    decay: bool = True
    group: str = "default"
    changes: bool = False


@dataclass(frozen=True, slots=True)
class Cost:
    """What an adapter costs: trained parameters and bytes of frozen extra tensors."""

    trainable: int
    frozen: int
    groups: dict[str, int] = field(default_factory=dict)


def all_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None."""
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
