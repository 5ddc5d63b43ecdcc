"""Causal attention of short half-precision sequences on a CPU: plain batched products.

In: queries, keys and values in buckets of padded sequences. Out: attention outputs. torch's flash kernel takes about
twice the time here, because its products of few rows are small. Scores and softmax are in float32; the probabilities
are made again in backward. Queries go in blocks, which meet no key behind them. Refuses to know adapters and models.
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

LONGEST = 512
"""Above this width torch's flash kernel is the faster one."""
SCORES = 2**24
"""Most scores that exist at a time."""
BLOCK, BLOCKS = 64, 4
"""Least tokens of a block of queries, and most blocks of a sequence: smaller products are slower."""


def worth_it(q: Tensor, width: int) -> bool:
    """Whether this is the faster kernel (measured by `python -m benchmarks.train` and `.packing`)."""
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
        for own, seen in _spans(q, k, settings[2]):
            y[own] = torch.bmm(_weights(q, k, own, seen, *settings).to(v.dtype), v[seen])
        ctx.save_for_backward(q_STHK, k_SPGK, v_SPGK)
        ctx.settings = settings
        return _by_token(y, q_STHK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tokens = ctx.saved_tensors
        settings = ctx.settings
        q, k, v, dy = (_by_group(x, tokens[1].shape[2]) for x in (*tokens, grads[0]))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for own, seen in _spans(q, k, settings[2]):
            p = _weights(q, k, own, seen, *settings)
            dv[seen] += torch.bmm(p.to(v.dtype).mT, dy[own])
            ds = torch.bmm(dy[own], v[seen].mT).to(p.dtype)
            ds.sub_((ds * p).sum(-1, keepdim=True)).mul_(p).mul_(settings[0])
            low = ds.to(q.dtype)
            dq[own] = torch.bmm(low, k[seen])
            dk[seen] += torch.bmm(low.mT, q[own])
        return (*(_by_token(d, x) for d, x in zip((dq, dk, dv), tokens, strict=True)), None, None)


def _by_group(x_STHK: Tensor, groups: int) -> Tensor:
    """[S · G, T · R, K]: the query heads of one key head are rows of one product, those of one token neighbours."""
    s, t, heads, dim = x_STHK.shape
    split = x_STHK.reshape(s, t, groups, heads // groups, dim).transpose(1, 2)
    return split.reshape(s * groups, t * (heads // groups), dim)


def _by_token(x: Tensor, like_STHK: Tensor) -> Tensor:
    """The inverse: [S, T, H, K]."""
    s, t = like_STHK.shape[:2]
    split = x.view(s, x.shape[0] // s, t, x.shape[1] // t, x.shape[2])
    return split.transpose(1, 2).flatten(2, 3)


Part = tuple[slice, slice]
"""Of an array by group: which of the first axis, and which rows."""


def _spans(q: Tensor, k: Tensor, before: int) -> Iterator[tuple[Part, Part]]:
    """Blocks of queries, with the keys that are not all behind them. The scores of each fit into the limit."""
    width = k.shape[1] - before
    size = max(BLOCK, -(-width // BLOCKS))
    repeats = q.shape[1] // width
    for start in range(0, width, size):
        stop = min(start + size, width)
        step = max(1, SCORES // ((stop - start) * repeats * (before + stop)))
        for first in range(0, q.shape[0], step):
            span = slice(first, first + step)
            yield (span, slice(start * repeats, stop * repeats)), (span, slice(0, before + stop))


def _weights(q: Tensor, k: Tensor, own: Part, seen: Part, scale: float, window: int | None, before: int) -> Tensor:
    """The attention probabilities of a block [S · G, n · R, P + m]."""
    width = k.shape[1] - before
    mask_QP = _mask(width, q.shape[1] // width, window, before)[own[1], seen[1]]
    with torch.autocast(q.device.type, enabled=False):
        return torch.softmax(torch.baddbmm(mask_QP[None], q[own].float(), k[seen].float().mT, alpha=scale), -1)


@functools.lru_cache(maxsize=32)
def _mask(width: int, repeats: int, window: int | None, before: int) -> Tensor:
    """0 where a query may look and −inf elsewhere, [T · R, P + T], float32."""
    seen_TT = torch.ones(width, width, dtype=torch.bool).tril()
    if window is not None and window < width:
        seen_TT = seen_TT.triu(1 - window)
    mask_TT = torch.zeros(width, width).masked_fill_(~seen_TT, -torch.inf)
    return F.pad(mask_TT, (before, 0)).repeat_interleave(repeats, 0)
