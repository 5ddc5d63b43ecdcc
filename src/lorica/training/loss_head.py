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
"""About the memory that one chunk's logits take: products of a GPU are fast from some hundred rows on."""
BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**27}
"""About the memory of the float32 in which probabilities are made, block by block: on a CPU, what its cache holds."""
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
    """Rows whose logits fit into `CHUNK_BYTES`."""
    fitting = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (vocabulary * element)
    return max(ROWS[0], min(ROWS[1], fitting // 16 * 16))


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, targets_N: Tensor, forward: Product, back: Product | None, chunk: int
    ) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        lp_N = torch.empty(hidden_ND.shape[0], dtype=wide, device=hidden_ND.device)
        slopes_ND = None if back is None else torch.empty_like(hidden_ND)
        room_BV: Tensor | None = None
        for start in range(0, hidden_ND.shape[0], chunk):
            span = slice(start, start + chunk)
            logits_CV = forward(hidden_ND[span])
            room_BV = _room(logits_CV, wide) if room_BV is None else room_BV
            lp_N[span] = _probabilities(logits_CV, targets_N[span], room_BV, kept=back is not None)
            if back is not None and slopes_ND is not None:
                slopes_ND[span] = back(logits_CV)
            del logits_CV  # before there are the next
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


def _room(logits_CV: Tensor, wide: torch.dtype) -> Tensor:
    """Memory for a block of logits in a wider dtype; all blocks share it, for fresh memory of this size costs more than
    what is computed in it.
    """
    kind = logits_CV.device.type
    fitting = BLOCK_BYTES.get(kind, BLOCK_BYTES["cpu"]) // (logits_CV.shape[1] * wide.itemsize)
    return logits_CV.new_empty(max(1, min(len(logits_CV), fitting)), logits_CV.shape[1], dtype=wide)


def _probabilities(logits_CV: Tensor, targets_C: Tensor, room_BV: Tensor, *, kept: bool) -> Tensor:
    """Log-probabilities [C] of the targets. If `kept`, the logits' place takes `p`, and `p − 1` at the target."""
    found = []
    for z_BV, targets_B1 in zip(logits_CV.split(len(room_BV)), targets_C[:, None].split(len(room_BV)), strict=True):
        own = z_BV.dtype == room_BV.dtype
        p_BV = z_BV if own else room_BV[: len(z_BV)].copy_(z_BV)
        most_B1, lp_B1 = p_BV.amax(1, keepdim=True), p_BV.gather(1, targets_B1)
        torch.softmax(p_BV, -1, out=p_BV)
        lp_B1 = _logp(lp_B1, most_B1, p_BV.amax(1, keepdim=True))
        found.append(lp_B1)
        if kept:
            p_BV = p_BV if own else z_BV.copy_(p_BV)
            # p − 1 of the target apart: p itself may be rounded to 1
            p_BV.scatter_(1, targets_B1, lp_B1.expm1().to(p_BV.dtype))
    return torch.cat(found)[:, 0]


def _logp(z: Tensor, most: Tensor, likeliest: Tensor) -> Tensor:
    """A target's log-probability from its logit, the largest logit and that one's probability: as this is
    `1 / Σ exp(z − max)`, one exponential of each logit gives p and log p. `z` and `likeliest` are written over.
    """
    return z.sub_(most).add_(likeliest.log_())


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
    result: Tensor = cast(Any, _TargetLogprobs).apply(head(hidden_CD, start), rows_M, targets_M)
    return result


class _TargetLogprobs(torch.autograd.Function):
    """`z_r[t] − logsumexp_v(z_r)` of logits [C, V] that an adapter or a transformation made, which have to be left as
    they are: p [C, V] is kept beside them, from which the way back is one product.
    """

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, rows_M: Tensor, targets_M: Tensor) -> Tensor:
        z_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        p_CV = torch.softmax(z_CV, -1)
        ctx.save_for_backward(p_CV, rows_M, targets_M)
        ctx.dtype = logits_CV.dtype
        return _logp(z_CV[rows_M, targets_M], z_CV.amax(-1)[rows_M], p_CV.amax(-1)[rows_M])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        p_CV, rows_M, targets_M = ctx.saved_tensors
        grad_M = grads[0]
        sums_C = grad_M.new_zeros(len(p_CV)).index_add_(0, rows_M, grad_M)
        dz_CV = p_CV * -sums_C[:, None]
        dz_CV.index_put_((rows_M, targets_M), grad_M, accumulate=True)
        return dz_CV.to(ctx.dtype), None, None
