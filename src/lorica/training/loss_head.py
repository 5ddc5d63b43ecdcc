"""The loss head: cross-entropy of hidden states against an output embedding, without the logits of a whole batch.

In: hidden states, the head (a frozen matrix, or any callable), targets and loss weights. Out: the weighted sum of
−log p and every log-probability, exact. Refuses to know models and adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 256
"""Rows whose logits exist at one time."""


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`loss = Σ_i w_i (logsumexp_v(W h_i) − (W h_i)[t_i])` for a frozen head, in natural-log units.

    Returns (loss, log-probabilities [N] in float32, detached). The gradient with respect to `hidden` is made in the
    forward pass, so that logits of at most `chunk` rows ever exist.
    """
    loss, logprobs_N = cast(Any, _LinearCrossEntropy).apply(hidden_ND, weight_VD, targets_N, weights_N, chunk)
    return loss, logprobs_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        logprobs_N = torch.empty(hidden_ND.shape[0], dtype=wide, device=hidden_ND.device)
        dhidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden_ND.shape[0], chunk):
            span = slice(start, start + chunk)
            logits_CV = (hidden_ND[span] @ weight_VD.T).to(wide)
            lse_C = logits_CV.logsumexp(-1)
            target_C1 = targets_N[span, None]
            logprobs_N[span] = logits_CV.gather(1, target_C1)[:, 0] - lse_C
            if dhidden_ND is not None:
                p_CV = logits_CV.sub_(lse_C[:, None]).exp_()
                p_CV.scatter_add_(1, target_C1, p_CV.new_full(target_C1.shape, -1.0))
                p_CV.mul_(weights_N[span, None].to(wide))
                dhidden_ND[span] = p_CV.to(weight_VD.dtype) @ weight_VD
        if dhidden_ND is not None:
            ctx.save_for_backward(dhidden_ND)
        ctx.mark_non_differentiable(logprobs_N)
        return -(logprobs_N * weights_N.to(wide)).sum(), logprobs_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden_ND,) = ctx.saved_tensors
        return dhidden_ND * grads[0].to(dhidden_ND.dtype), None, None, None, None


def chunked_cross_entropy(
    hidden_ND: Tensor,
    head: Callable[[Tensor, int], Tensor],
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same for a head that is trained or transforms its logits; each chunk's logits are made again in the
    backward pass.

    `head(hidden[start : start + n], start)` gives the logits of n positions.
    """
    pieces = [
        checkpoint(_chunk, head, s, hidden_ND[s : s + chunk], targets_N[s : s + chunk], use_reentrant=False)
        for s in range(0, hidden_ND.shape[0], chunk)
    ]
    logprobs_N = torch.cat(pieces)
    return -(logprobs_N * weights_N.to(logprobs_N.dtype)).sum(), logprobs_N.detach()


def _chunk(head: Callable[[Tensor, int], Tensor], start: int, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
    logits_CV = head(hidden_CD, start)
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return logits_CV.gather(1, targets_C[:, None])[:, 0] - logits_CV.logsumexp(-1)
