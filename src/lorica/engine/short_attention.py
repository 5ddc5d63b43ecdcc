"""Causal attention of short half-precision sequences on a CPU: plain batched products.

In: queries, keys and values in buckets of padded sequences. Out: attention outputs. torch's flash kernel takes about
twice the time here, because its products of few rows are small. Scores and softmax are in float32; the probabilities
are made again in backward. Refuses to know adapters and models.
S sequences, T padded width, P keys before them that all see, H heads, G key heads, R = H / G, K head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 256
"""Above this width torch's flash kernel is the faster one."""
SCORES = 2**24
"""Most scores that exist at a time."""


def worth_it(q: Tensor, width: int) -> bool:
    """Whether this is the faster kernel (measured by `python -m benchmarks.train`)."""
    return q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and width <= LONGEST


def short_attention(q_STHK: Tensor, k_SPGK: Tensor, v_SPGK: Tensor, scale: float, window: int | None = None) -> Tensor:
    """`softmax(q kᵀ · scale) v`, causal, [S, T, H, K]. Keys and values are P + T; a token sees the first P, and at most
    `window` of the others, its own included.
    """
    result: Tensor = cast(Any, _ShortAttention).apply(q_STHK, k_SPGK, v_SPGK, scale, window)
    return result


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_STHK: Tensor, k_SPGK: Tensor, v_SPGK: Tensor, scale: float, window: int | None) -> Tensor:
        q, k, v = (_by_group(x, k_SPGK.shape[2]) for x in (q_STHK, k_SPGK, v_SPGK))
        settings = scale, window, k_SPGK.shape[1] - q_STHK.shape[1]
        y = q.new_empty(*q.shape[:2], v.shape[2])
        for span in _spans(q, k):
            y[span] = torch.bmm(_weights(q[span], k[span], *settings).to(v.dtype), v[span])
        ctx.save_for_backward(q_STHK, k_SPGK, v_SPGK)
        ctx.settings = settings
        return _by_token(y, q_STHK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tokens = ctx.saved_tensors
        settings = ctx.settings
        q, k, v, dy = (_by_group(x, tokens[1].shape[2]) for x in (*tokens, grads[0]))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for span in _spans(q, k):
            p = _weights(q[span], k[span], *settings)
            dv[span] = torch.bmm(p.to(v.dtype).mT, dy[span])
            ds = torch.bmm(dy[span], v[span].mT).to(p.dtype)
            ds.sub_((ds * p).sum(-1, keepdim=True)).mul_(p).mul_(settings[0])
            low = ds.to(q.dtype)
            dq[span] = torch.bmm(low, k[span])
            dk[span] = torch.bmm(low.mT, q[span])
        return (*(_by_token(d, x) for d, x in zip((dq, dk, dv), tokens, strict=True)), None, None)


def _by_group(x_STHK: Tensor, groups: int) -> Tensor:
    """[S · G, R · T, K]: the query heads of one key head are rows of one product."""
    s, t, heads, dim = x_STHK.shape
    split = x_STHK.reshape(s, t, groups, heads // groups, dim).permute(0, 2, 3, 1, 4)
    return split.reshape(s * groups, heads // groups * t, dim)


def _by_token(x: Tensor, like_STHK: Tensor) -> Tensor:
    """The inverse: [S, T, H, K]."""
    s, t = like_STHK.shape[:2]
    split = x.view(s, x.shape[0] // s, x.shape[1] // t, t, x.shape[2])
    return split.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _spans(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Runs of the first axis whose scores fit into the limit."""
    step = max(1, SCORES // (q.shape[1] * k.shape[1]))
    return (slice(start, start + step) for start in range(0, q.shape[0], step))


def _weights(q: Tensor, k: Tensor, scale: float, window: int | None, before: int) -> Tensor:
    """The attention probabilities [S · G, R · T, P + T]."""
    width = k.shape[1] - before
    mask_QP = _mask(width, q.shape[1] // width, window, before)
    with torch.autocast(q.device.type, enabled=False):
        return torch.softmax(torch.baddbmm(mask_QP[None], q.float(), k.float().mT, alpha=scale), -1)


@functools.lru_cache(maxsize=32)
def _mask(width: int, repeats: int, window: int | None, before: int) -> Tensor:
    """0 where a query may look and −inf elsewhere, [R · T, P + T], float32."""
    seen_TT = torch.ones(width, width, dtype=torch.bool).tril()
    if window is not None and window < width:
        seen_TT = seen_TT.triu(1 - window)
    mask_TT = torch.zeros(width, width).masked_fill_(~seen_TT, -torch.inf)
    return F.pad(mask_TT, (before, 0)).repeat(repeats, 1)
