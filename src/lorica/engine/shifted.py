"""Shifted sparse attention: packed attention over segments, for one half of the heads and for the other.

In: queries, keys and values, packed end to end or as padded rows. Out: attention outputs in the same order. A segment
is to the kernels what a sequence is, so what no head sees is never computed. Refuses to know adapters and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorica.core.errors import MethodError
from lorica.engine.packed import Prefix, packed_attention
from lorica.models.shifted_attention import Shifted


def shifted_attention(
    module: nn.Module,
    q_1HNK: Tensor,
    k_1GNK: Tensor,
    v_1GNK: Tensor,
    shifted: Shifted,
    *,
    lengths: Sequence[int],
    prefixes: Sequence[Prefix],
    s_aux: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Causal attention within the groups of `Shifted`, of packed sequences. Returns [1, N, heads, head dim].

    Heads `0 … H/2 − 1` have unshifted groups, the others shifted ones; which key head serves a query head is as in
    dense attention. `settings` are those of `packed_attention`; a window narrows every segment.
    """
    heads = q_1HNK.shape[1]
    pieces = []
    for first, last, moved in ((0, heads // 2, False), (heads // 2, heads, True)):
        segments = [shifted.segments(length, shifted=moved) for length in lengths]
        own = [_part(prefix, heads, first, last) for prefix in prefixes]
        pieces.append(
            packed_attention(
                module,
                q_1HNK[:, first:last],
                _key_heads(k_1GNK, 1, heads, first, last),
                _key_heads(v_1GNK, 1, heads, first, last),
                lengths=[size for sizes in segments for size in sizes],
                prefixes=[prefix for prefix, sizes in zip(own, segments, strict=True) for _ in sizes],
                s_aux=None if s_aux is None else s_aux[first:last],
                **settings,
            )
        )
    return torch.cat(pieces, dim=2)


def _part(prefix: Prefix, heads: int, first: int, last: int) -> Prefix:
    """The prefix as the query heads `[first, last)` see it."""
    if prefix is None:
        return None
    key_PGK, value_PGK = prefix
    return _key_heads(key_PGK, 1, heads, first, last), _key_heads(value_PGK, 1, heads, first, last)


def _key_heads(x: Tensor, axis: int, heads: int, first: int, last: int) -> Tensor:
    """The key heads of the query heads `[first, last)`: shared still, where the border is one between key heads."""
    repeats = heads // x.shape[axis]
    if first % repeats == 0 and last % repeats == 0:
        return x.narrow(axis, first // repeats, (last - first) // repeats)
    return x.repeat_interleave(repeats, dim=axis).narrow(axis, first, last - first)


def shifted_rows(
    module: nn.Module,
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    mask: Any,
    shifted: Shifted,
    *,
    prefixes: Sequence[Prefix],
    sliding_window: int | None = None,
    **settings: Any,
) -> Tensor:
    """The same for rows that are padded to one length. Returns [B, T, heads, head dim], zero at padding.

    Only the real tokens of a row count, wherever its padding is. Raises MethodError for kept keys and for masks that
    hold anything but one causal sequence a row.
    """
    rows, _, width, _ = q_BHTK.shape
    if k_BGTK.shape[2] != width:
        raise MethodError(
            f"Shifted attention is for whole sequences, and {width} queries came with {k_BGTK.shape[2]} keys: a "
            "training pass takes no KV cache.",
            hint="Call the model with use_cache=False, or host.eval() for dense attention.",
        )
    real_BT = _real_tokens(mask, rows, width, sliding_window, settings).to(q_BHTK.device)
    lengths = real_BT.sum(1).tolist()
    q, k, v = (x.transpose(1, 2)[real_BT].transpose(0, 1)[None] for x in (q_BHTK, k_BGTK, v_BGTK))
    present = [row for row, length in enumerate(lengths) if length]
    y_1NHK = shifted_attention(
        module,
        q,
        k,
        v,
        shifted,
        lengths=[lengths[row] for row in present],
        prefixes=[prefixes[row] for row in present],
        sliding_window=sliding_window,
        **settings,
    )
    out_BTHK = q_BHTK.new_zeros(rows, width, *y_1NHK.shape[2:])
    out_BTHK[real_BT] = y_1NHK[0]
    return out_BTHK


def _real_tokens(mask: Any, rows: int, width: int, window: int | None, settings: dict[str, Any]) -> Tensor:
    """Which tokens are no padding, [B, T], from the mask of any kernel."""
    if mask is None and settings.get("cu_seq_lens_q") is None:
        return torch.ones(rows, width, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise MethodError(
            "Shifted attention cannot read this kernel's mask.", hint="Load the model with the kernel sdpa or eager."
        )
    if mask.ndim == 2:
        return mask[:, :width].bool().expand(rows, -1)
    seen_BTT = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0, :, :width]
    real_BT = seen_BTT.diagonal(dim1=1, dim2=2)  # a token sees itself unless it is padding
    expected_BTT = real_BT[:, None, :].expand(-1, width, -1).tril()
    if window is not None and window < width:
        expected_BTT = expected_BTT.triu(1 - window)
    if not torch.equal(expected_BTT & real_BT[..., None], seen_BTT & real_BT[..., None]):
        raise MethodError(
            "Shifted attention takes one causal sequence a row, and this batch's mask is another.",
            hint="Give sequences rows of their own, or let the engine pack them.",
        )
    return real_BT.expand(rows, -1)
