"""Causal attention of ragged half-precision sequences on a GPU: torch's kernel for variable lengths, in one call.

In: queries, keys and values of sequences laid end to end, and their lengths. Out: attention outputs in the same order.
The interface is young and differs between releases of torch, so a self-test against the plain formula guards it.
Refuses to know prefixes, adapters and models. N tokens, S sequences, H heads, G key heads, K head dim.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import torch
from torch import Tensor

from lorica.engine.abilities import FAILURES
from lorica.engine.replay import held

HALVES = (torch.bfloat16, torch.float16)


def worth_it(q: Tensor) -> bool:
    """Whether the kernel is there for such queries and right."""
    return q.is_cuda and q.dtype in HALVES and _works(q.device, q.dtype)


def varlen_attention(
    q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, lengths: tuple[int, ...], scale: float, window: int | None = None
) -> Tensor:
    """`softmax(q kᵀ · scale) v` within each sequence, causal, [N, H, K]; a token sees at most `window` keys, its own
    included.
    """
    starts_S1 = held(_starts(lengths, q_NHK.device))
    longest = max(lengths)
    settings: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in _settings():
        settings["enable_gqa"] = q_NHK.shape[1] != k_NGK.shape[1]
    parts = (x.contiguous() for x in (q_NHK, k_NGK, v_NGK))
    result: Tensor = _kernel()(*parts, starts_S1, starts_S1, longest, longest, **settings)
    return result


@functools.lru_cache(maxsize=64)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence begins, and where the last one ends."""
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def _kernel() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@functools.cache
def _settings() -> frozenset[str]:
    return frozenset(inspect.signature(_kernel()).parameters)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel takes fewer key heads than heads and a window, and agrees with the plain formula, gradients
    included.
    """
    rng = torch.Generator().manual_seed(0)
    lengths, scale = (5, 12), 0.2
    leaves = [torch.randn(17, heads, 64, generator=rng).to(device, dtype).requires_grad_() for heads in (4, 2, 2)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    try:
        with torch.enable_grad():
            for window in (None, 3):
                q, k, v = leaves
                found_NHK = varlen_attention(q, k, v, lengths, scale, window)
                wanted_NHK = torch.cat([_plain(own, scale, window) for own in _each(exact, lengths)])
                pairs = [(found_NHK, wanted_NHK)]
                slopes = torch.autograd.grad(found_NHK.sum(), leaves), torch.autograd.grad(wanted_NHK.sum(), exact)
                pairs += zip(*slopes, strict=True)
                if not all(_close(found, wanted) for found, wanted in pairs):
                    return False
    except (ImportError, *FAILURES):  # another build or card
        return False
    return True


def _each(parts: list[Tensor], lengths: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(part.split(list(lengths)) for part in parts), strict=True))


def _plain(own: tuple[Tensor, ...], scale: float, window: int | None) -> Tensor:
    q_HTK, k_GTK, v_GTK = (x.transpose(0, 1) for x in own)
    k_HTK, v_HTK = (x.repeat_interleave(q_HTK.shape[0] // x.shape[0], 0) for x in (k_GTK, v_GTK))
    seen_TT = torch.ones(q_HTK.shape[1], q_HTK.shape[1], dtype=torch.bool, device=q_HTK.device).tril()
    seen_TT = seen_TT if window is None else seen_TT.triu(1 - window)
    scores_HTT = (q_HTK @ k_HTK.mT * scale).masked_fill(~seen_TT, -torch.inf)
    return (scores_HTT.softmax(-1) @ v_HTK).transpose(0, 1)


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found.double() - wanted).abs().max() <= 0.02 * max(1.0, float(wanted.detach().abs().max())))
