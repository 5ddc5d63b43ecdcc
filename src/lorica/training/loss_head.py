"""The loss head: log-probabilities of targets under an output embedding, without the logits of a whole batch.

In: hidden states, the head (products with a frozen matrix, or any callable) and targets. Out: every log-probability,
exact and differentiable; what loss is made of them is `losses`' matter. Refuses to know models and adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
"""About the memory that one chunk's logits take, with their probabilities. On a CPU larger chunks are slower, not
faster, for an allocator takes such blocks from the system and gives them back each time; on a GPU, whose products must
be of some hundred rows, smaller ones are.
"""
ROWS = (32, 512)
"""Least and most rows of a chunk: products of fewer are slow, and more do not make them faster."""

KEPT_BYTES = 2**27
"""Logits that take no more than this for a whole batch are kept for the backward pass: to make them again costs a third
of the head's time.
"""

Product = Callable[[Tensor], Tensor]


def linear_logprobs(
    hidden_ND: Tensor, forward: Product, back: Product, vocabulary: int, targets_N: Tensor, *, chunk: int | None = None
) -> Tensor:
    """`lp_i = z_i[t_i] − logsumexp_v(z_i)` in nats, for logits `z = forward(h) = h Wᵀ + b` of a frozen head.

    Returns [N] in float32 (or wider). `back(d) = d W`. The slope `d lp_i / d h_i` is made in the forward pass, so that
    logits of at most `chunk` rows ever exist, and any function of the log-probabilities can be differentiated; without
    `chunk`, about as many rows as `CHUNK_BYTES` hold.
    """
    rows = chunk or chunk_rows(vocabulary, hidden_ND.element_size(), hidden_ND.device.type)
    wants_gradient = torch.is_grad_enabled() and hidden_ND.requires_grad
    lp_N: Tensor = cast(Any, _LinearLogprobs).apply(
        hidden_ND, targets_N, forward, back if wants_gradient else None, rows
    )
    return lp_N


def chunk_rows(vocabulary: int, element: int, device: str = "cpu") -> int:
    """Rows whose logits, float32 log-probabilities and probabilities fit into `CHUNK_BYTES`."""
    fitting = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (vocabulary * (2 * element + 4))
    return max(ROWS[0], min(ROWS[1], fitting // 16 * 16))


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, targets_N: Tensor, forward: Product, back: Product | None, chunk: int
    ) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        lp_N = torch.empty(hidden_ND.shape[0], dtype=wide, device=hidden_ND.device)
        slopes_ND = None if back is None else torch.empty_like(hidden_ND)
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
            lp_N[span] = logp_C1[:, 0]
            if back is not None and slopes_ND is not None:
                p_CV = p_buffer[: logits_CV.shape[0]].copy_(logp_CV.exp_())
                # p − 1 of the target apart: p itself may be rounded to 1
                p_CV.scatter_(1, target_C1, logp_C1.expm1().to(p_CV.dtype))
                slopes_ND[span] = back(p_CV)
        if slopes_ND is not None:
            ctx.save_for_backward(slopes_ND)
        return lp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slopes_ND,) = ctx.saved_tensors
        grad_N1 = -grads[0][:, None]
        dhidden_ND = torch.mul(slopes_ND, grad_N1, out=torch.empty_like(slopes_ND))
        # a token that does not count may be impossible, and its slope then no number
        return dhidden_ND.masked_fill_(grad_N1 == 0, 0.0), None, None, None, None


def chunked_logprobs(
    hidden_ND: Tensor,
    head: Callable[[Tensor, int], Tensor],
    targets_M: Tensor,
    *,
    vocabulary: int,
    crow: Sequence[int] | None = None,
    chunk: int = 256,
    keep: bool | None = None,
) -> Tensor:
    """The same for a head that is trained or transforms its logits, and for several targets a position. Unless
    `keep`, each chunk's logits are made again in the backward pass; None keeps them up to `KEPT_BYTES`.

    `head(hidden[start : start + n], start)` gives the logits of n positions. `crow` [N + 1]: which of the M targets
    are each position's; None with one for each. Returns [M].
    """
    count = hidden_ND.shape[0]
    if keep is None:
        keep = 2 * 4 * vocabulary * count <= KEPT_BYTES  # the logits and their slope, in float32
    pieces = []
    for start in range(0, count, chunk):
        stop = min(count, start + chunk)
        first, last = (start, stop) if crow is None else (crow[start], crow[stop])
        rows_M = torch.arange(stop - start, device=hidden_ND.device)
        if crow is not None:
            own = torch.tensor(crow[start : stop + 1], device=hidden_ND.device)
            rows_M = rows_M.repeat_interleave(own.diff())
        part = hidden_ND[start:stop]
        given = (head, start, part, rows_M, targets_M[first:last])
        pieces.append(_chunk(*given) if keep else checkpoint(_chunk, *given, use_reentrant=False))
    return torch.cat(pieces)


def _chunk(
    head: Callable[[Tensor, int], Tensor], start: int, hidden_CD: Tensor, rows_M: Tensor, targets_M: Tensor
) -> Tensor:
    logits_CV = head(hidden_CD, start)
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return logits_CV[rows_M, targets_M] - logits_CV.logsumexp(-1)[rows_M]
