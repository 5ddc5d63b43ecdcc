"""Attention over packed sequences: no sequence sees another, and next to no padding is computed.

In: queries, keys and values of sequences laid end to end, their lengths, and each sequence's prefix, if it has one.
Out: attention outputs in the same order. Refuses to know adapters, methods and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.engine import varlen
from lorica.engine.buckets import plan
from lorica.engine.replay import held
from lorica.engine.short_attention import short_attention, worth_it

TINY = 128
"""Up to so many rows of scores, over all sequences and heads, one kernel that is slow costs less than many calls."""

Prefix = tuple[Tensor, Tensor] | None
"""Keys and values [P, kv heads, head dim] that stand before one sequence's own."""


def packed_attention(
    module: nn.Module,
    q_1HNK: Tensor,
    k_1GNK: Tensor,
    v_1GNK: Tensor,
    *,
    lengths: Sequence[int],
    prefixes: Sequence[Prefix],
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> Tensor:
    """`softmax(q kᵀ · scaling) v` within each sequence. Returns [1, N, heads, head dim].

    Causal sequences of nearly equal length go through one call, padded; on a GPU those of any length, not padded.
    `sliding_window` is the number of own keys that a token sees, itself included; prefixes are always seen. `softcap` c
    turns scores s into `c · tanh(s / c)` (Gemma 2); `s_aux` [heads] are scores of a sink that has no value (GPT-OSS).
    """
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    scale = q_1HNK.shape[-1] ** -0.5 if scaling is None else scaling
    q_NHK, k_NGK, v_NGK = (x[0].transpose(0, 1) for x in (q_1HNK, k_1GNK, v_1GNK))
    extra = tuple(0 if prefix is None else prefix[0].shape[0] for prefix in prefixes)
    found = held(plan(tuple(lengths), extra, causal, q_1HNK.device))
    usual = causal and softcap is None and s_aux is None and not dropout
    if usual and not any(extra) and not found.whole and varlen.worth_it(q_1HNK):
        return varlen.varlen_attention(q_NHK, k_NGK, v_NGK, tuple(lengths), scale, sliding_window)[None]
    pieces = []
    for bucket, q, k, v in zip(found.buckets, *(found.spread(x) for x in (q_NHK, k_NGK, v_NGK)), strict=True):
        own = [prefix for prefix in (prefixes[row] for row in bucket.rows) if prefix is not None]
        before = own[0][0].shape[0] if own else 0
        if usual and worth_it(q, before + bucket.width) and q.shape[:3].numel() > TINY:
            if own:
                k, v = (torch.cat([_stacked(own, i).to(x.dtype), x], 1) for i, x in enumerate((k, v)))
            y_STHK = short_attention(q, k, v, scale, sliding_window)
        else:
            mask = _mask(bucket.width, own, causal, sliding_window, q.device)
            y_STHK = _attention(q, k, v, own, scale, mask, softcap, s_aux, dropout)
        pieces.append(y_STHK)
    return found.join(pieces)[None]


def _attention(
    q_STHK: Tensor,
    k_STGK: Tensor,
    v_STGK: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    scale: float,
    mask: Tensor | bool,
    softcap: float | None,
    s_aux: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention of equally long sequences behind their prefixes, [S, T, H, K]. A mask of True is torch's causal one."""
    q_SHTK, k_SGTK, v_SGTK = (x.transpose(1, 2) for x in (q_STHK, k_STGK, v_STGK))
    if prefixes:
        k_SGTK = torch.cat([_stacked(prefixes, 0).transpose(1, 2).to(k_SGTK.dtype), k_SGTK], dim=2)
        v_SGTK = torch.cat([_stacked(prefixes, 1).transpose(1, 2).to(v_SGTK.dtype), v_SGTK], dim=2)
    repeats = q_SHTK.shape[1] // k_SGTK.shape[1]
    grouped = q_SHTK.device.type == "cpu" or q_SHTK.dtype in varlen.HALVES  # the kernels that repeat no key
    if mask is True and grouped and softcap is None and s_aux is None:
        y_SHTK = F.scaled_dot_product_attention(
            q_SHTK, k_SGTK, v_SGTK, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=repeats > 1
        )
        return y_SHTK.transpose(1, 2)
    k_SHTK, v_SHTK = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k_SGTK, v_SGTK))
    if softcap is not None or s_aux is not None:
        return _unusual(q_SHTK, k_SHTK, v_SHTK, scale, mask, softcap, s_aux, dropout).transpose(1, 2)
    seen, causal = (None, mask) if isinstance(mask, bool) else (mask, False)
    y_SHTK = F.scaled_dot_product_attention(
        q_SHTK, k_SHTK, v_SHTK, attn_mask=seen, dropout_p=dropout, is_causal=causal, scale=scale
    )
    return y_SHTK.transpose(1, 2)


def _unusual(
    q_SHTK: Tensor,
    k_SHTK: Tensor,
    v_SHTK: Tensor,
    scale: float,
    mask: Tensor | bool,
    softcap: float | None,
    s_aux: Tensor | None,
    dropout: float,
) -> Tensor:
    """What no fused kernel has: capped scores, and a sink in the softmax."""
    scores_SHTT = (q_SHTK @ k_SHTK.mT) * scale
    if softcap is not None:
        scores_SHTT = torch.tanh(scores_SHTT / softcap) * softcap
    if isinstance(mask, bool):
        mask = scores_SHTT.new_ones(scores_SHTT.shape[-2:], dtype=torch.bool).tril() if mask else mask
    if isinstance(mask, Tensor):
        scores_SHTT = scores_SHTT.masked_fill(~mask, torch.finfo(scores_SHTT.dtype).min)
    if s_aux is not None:
        sink_SHT1 = s_aux.to(scores_SHTT.dtype).view(1, -1, 1, 1).expand(*scores_SHTT.shape[:3], 1)
        scores_SHTT = torch.cat([scores_SHTT, sink_SHT1], dim=-1)
    weights = torch.softmax(scores_SHTT, -1, dtype=torch.promote_types(scores_SHTT.dtype, torch.float32))
    weights = F.dropout(weights[..., : k_SHTK.shape[2]], dropout, dropout > 0)
    return weights.to(v_SHTK.dtype) @ v_SHTK


def _stacked(prefixes: Sequence[tuple[Tensor, Tensor]], part: int) -> Tensor:
    """Keys (0) or values (1) of the prefixes: [rows, P, kv heads, head dim]."""
    return torch.stack([prefix[part] for prefix in prefixes])


def _mask(
    length: int, prefixes: Sequence[tuple[Tensor, Tensor]], causal: bool, window: int | None, device: torch.device
) -> Tensor | bool:
    """The mask [T, P + T] where SDPA's own causal flag does not say it; else that flag."""
    extra = prefixes[0][0].shape[0] if prefixes else 0
    narrow = window is not None and window < length
    if not extra and not narrow:
        return causal
    own_TT = torch.ones(length, length, dtype=torch.bool, device=device)
    if causal:
        own_TT = own_TT.tril()
    if narrow:
        assert window is not None
        own_TT = own_TT.triu(1 - window) if causal else own_TT.triu(1 - window).tril(window - 1)
    return torch.cat([own_TT.new_ones(length, extra), own_TT], dim=1)
