"""The loss head: cross-entropy of hidden states against an output embedding, without the logits of a whole batch.

In: hidden states, the head (products with a frozen matrix, or any callable), targets and loss weights. Out: the
weighted sum of −log p and every log-probability, exact. Refuses to know models and adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 2**25
"""About the memory that one chunk's logits take, with their probabilities; larger chunks are slower, not faster, for
an allocator takes such blocks from the system and gives them back each time.
"""
ROWS = (32, 512)
"""Least and most rows of a chunk: products of fewer are slow, and more do not make them faster."""

Product = Callable[[Tensor], Tensor]


def weighted(logprobs_N: Tensor, weights_N: Tensor) -> Tensor:
    """`w ⊙ log p`, zero where the weight is: a token that does not count may be impossible."""
    return (logprobs_N * weights_N.to(logprobs_N.dtype)).masked_fill(weights_N == 0, 0.0)


def linear_cross_entropy(
    hidden_ND: Tensor,
    forward: Product,
    back: Product,
    vocabulary: int,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`loss = Σ_i w_i (logsumexp_v(z_i) − z_i[t_i])` in nats, for logits `z = forward(h) = h Wᵀ + b` of a frozen head.

    Returns (loss, log-probabilities [N] in float32, detached). `back(d) = d W`. The gradient with respect to `hidden`
    is made in the forward pass, so that logits of at most `chunk` rows ever exist; without `chunk`, about as many as
    `CHUNK_BYTES` hold.
    """
    rows = chunk or chunk_rows(vocabulary, hidden_ND.element_size())
    wants_gradient = torch.is_grad_enabled() and hidden_ND.requires_grad
    loss, logprobs_N = cast(Any, _LinearCrossEntropy).apply(
        hidden_ND, targets_N, weights_N, forward, back if wants_gradient else None, rows
    )
    return loss, logprobs_N


def chunk_rows(vocabulary: int, element: int) -> int:
    """Rows whose logits, float32 log-probabilities and probabilities fit into `CHUNK_BYTES`."""
    fitting = CHUNK_BYTES // (vocabulary * (2 * element + 4))
    return max(ROWS[0], min(ROWS[1], fitting // 16 * 16))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        forward: Product,
        back: Product | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        logprobs_N = torch.empty(hidden_ND.shape[0], dtype=wide, device=hidden_ND.device)
        dhidden_ND = None if back is None else torch.empty_like(hidden_ND)
        # two buffers for all chunks: fresh memory of this size costs more than what is computed in it
        logp_buffer, p_buffer = torch.empty(0, dtype=wide), torch.empty(0, dtype=hidden_ND.dtype)
        for start in range(0, hidden_ND.shape[0], chunk):
            span = slice(start, start + chunk)
            logits_CV = forward(hidden_ND[span])
            if not start:
                logp_buffer, p_buffer = torch.empty_like(logits_CV, dtype=wide), torch.empty_like(logits_CV)
            logp_CV = logp_buffer[: logits_CV.shape[0]].copy_(logits_CV)
            torch.log_softmax(logp_CV, -1, out=logp_CV)
            target_C1 = targets_N[span, None]
            logp_C1 = logp_CV.gather(1, target_C1)
            logprobs_N[span] = logp_C1[:, 0]
            if back is not None and dhidden_ND is not None:
                p_CV = p_buffer[: logits_CV.shape[0]].copy_(logp_CV.exp_())
                # p − 1 of the target apart: p itself may be rounded to 1
                p_CV.scatter_(1, target_C1, logp_C1.expm1().to(p_CV.dtype))
                own_CD = torch.mul(back(p_CV), weights_N[span, None], out=dhidden_ND[span])
                own_CD.masked_fill_(weights_N[span, None] == 0, 0.0)
        if dhidden_ND is not None:
            ctx.save_for_backward(dhidden_ND)
        ctx.mark_non_differentiable(logprobs_N)
        return -weighted(logprobs_N, weights_N).sum(), logprobs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden_ND,) = ctx.saved_tensors
        return dhidden_ND * grads[0].to(dhidden_ND.dtype), None, None, None, None, None


def chunked_cross_entropy(
    hidden_ND: Tensor,
    head: Callable[[Tensor, int], Tensor],
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    chunk: int = 256,
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
    return -weighted(logprobs_N, weights_N).sum(), logprobs_N.detach()


def _chunk(head: Callable[[Tensor, int], Tensor], start: int, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
    logits_CV = head(hidden_CD, start)
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return logits_CV.gather(1, targets_C[:, None])[:, 0] - logits_CV.logsumexp(-1)
