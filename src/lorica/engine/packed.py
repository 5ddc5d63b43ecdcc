"""Attention over packed sequences: no sequence sees another, and no padding is computed.

In: queries, keys and values of sequences laid end to end, their lengths, and each sequence's prefix, if it has one.
Out: attention outputs in the same order. Refuses to know adapters, methods and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.core.errors import MethodError

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
    **_: Any,
) -> Tensor:
    """`softmax(q kᵀ · scaling) v` within each sequence. Returns [1, N, heads, head dim].

    Sequences of equal length and prefix length go through one call. `sliding_window` is the number of own keys that a
    token sees, itself included; prefixes are always seen. Raises MethodError for soft caps and attention sinks.
    """
    if softcap is not None or s_aux is not None:
        raise MethodError(
            f"{type(module).__name__} caps its attention scores or has attention sinks; packed batches cannot do that "
            "yet.",
            hint="Call the model itself with padded rows instead.",
        )
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    heads, groups = q_1HNK.shape[1], k_1GNK.shape[1]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    buckets: dict[tuple[int, int], list[int]] = {}
    for row, length in enumerate(lengths):
        prefix = prefixes[row]
        buckets.setdefault((length, 0 if prefix is None else prefix[0].shape[0]), []).append(row)
    outputs: list[Tensor | None] = [None] * len(lengths)
    for (length, extra), rows in buckets.items():
        q_SHTK, k_SGTK, v_SGTK = (
            torch.stack([x[0, :, starts[row] : starts[row] + length] for row in rows]) for x in (q_1HNK, k_1GNK, v_1GNK)
        )
        if extra:
            k_SGTK = torch.cat([_stacked(prefixes, rows, 0).to(k_SGTK.dtype), k_SGTK], dim=2)
            v_SGTK = torch.cat([_stacked(prefixes, rows, 1).to(v_SGTK.dtype), v_SGTK], dim=2)
        mask_TS = _mask(length, extra, causal, sliding_window, q_1HNK.device)
        y_SHTK = F.scaled_dot_product_attention(
            q_SHTK,
            k_SGTK.repeat_interleave(heads // groups, dim=1),
            v_SGTK.repeat_interleave(heads // groups, dim=1),
            attn_mask=mask_TS,
            is_causal=causal and mask_TS is None,
            scale=scaling,
        )
        for row, y_HTK in zip(rows, y_SHTK, strict=True):
            outputs[row] = y_HTK.transpose(0, 1)
    return torch.cat([y for y in outputs if y is not None])[None]


def _stacked(prefixes: Sequence[Prefix], rows: list[int], part: int) -> Tensor:
    """Keys (0) or values (1) of the prefixes of some rows: [rows, kv heads, P, head dim]."""
    found = [prefix[part] for prefix in (prefixes[row] for row in rows) if prefix is not None]
    return torch.stack(found).transpose(1, 2)


def _mask(length: int, extra: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """The mask [T, P + T] where SDPA's own causal flag does not say it; None where it does."""
    narrow = window is not None and window < length
    if not extra and not narrow:
        return None
    own_TT = torch.ones(length, length, dtype=torch.bool, device=device)
    if causal:
        own_TT = own_TT.tril()
    if narrow:
        assert window is not None
        own_TT = own_TT.triu(1 - window) if causal else own_TT.triu(1 - window).tril(window - 1)
    return torch.cat([own_TT.new_ones(length, extra), own_TT], dim=1)
