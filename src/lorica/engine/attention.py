"""Attention sites: keys and values that a row's adapters put before its own (prefix tuning).

In: queries, keys and values as transformers hands them to an attention function, [rows, heads, tokens, head dim].
Out: the attention output. Rows without a prefix run through the model's own attention function, untouched.
Prefixes are never cached, so decoding with a KV cache sees them again at every step. Refuses to know methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.core.site import Site
from lorica.core.update import PrefixKV
from lorica.engine.executor import Executor
from lorica.engine.packed import packed_attention
from lorica.models.attention import (
    AttentionSwitch,
    attention_configs,
    attention_kernel,
    register_attention,
    set_attention,
)

Attend = Callable[..., tuple[Tensor, Tensor | None]]
_PACKED: ContextVar[bool] = ContextVar("lorica_packed", default=False)


@contextmanager
def without_mask() -> Iterator[None]:
    """Inside, no attention mask is made: in a packed pass the kernel keeps sequences apart by their lengths."""
    token = _PACKED.set(True)
    try:
        yield
    finally:
        _PACKED.reset(token)


class AttentionHub:
    """The attention function of one backbone. `sites` holds the attention modules whose adapters may have prefixes."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.sites: dict[nn.Module, Site] = {}
        backbone = executor.backbone
        self._modules = [backbone.module_of(site.name) for site in backbone.sites.values() if site.kind == "attention"]
        self._switch: AttentionSwitch | None = None
        self.inner: Attend | None = None

    def install(self) -> None:
        """Make this backbone's attention modules, and no others, call this object."""
        if not self._modules:
            return
        module = self.executor.backbone.module
        previous = attention_configs(module)[0]._attn_implementation
        self.inner, mask = attention_kernel(previous, self._modules[0])
        register_attention(f"lorica-{previous}", _kernel, _unless_packed(mask))
        self._switch = set_attention(module, f"lorica-{previous}")
        for attention in self._modules:
            # kept on the instance, so that a deep copy of the model calls the copy's own hub
            attention.__dict__["_lorica_hub"] = self

    def remove(self) -> None:
        if self._switch is not None:
            self._switch.restore()
        for attention in self._modules:
            attention.__dict__.pop("_lorica_hub", None)

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Lengths of the sequences that lie end to end in the present pass; None where rows are a batch."""
        route = self.executor.live_route()
        return None if route is None else route.lengths

    def prefix_lengths(self, rows: int) -> list[int]:
        """Virtual tokens that each row's prefixes put before it; the same at every attention site."""
        first = next(iter(self.sites.values()), None)
        lengths = [0] * rows
        for row, prefixes in self._prefixes(first, rows).items():
            lengths[row] = sum(p.key_PHK.shape[0] for p in prefixes)
        return lengths

    def _prefixes(self, site: Site | None, rows: int) -> dict[int, list[PrefixKV]]:
        work = [] if site is None else self.executor.work_for_rows(site, rows)
        return {item.start: [u for u in item.updates if isinstance(u, PrefixKV)] for item in work}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        site = self.sites.get(module)
        lengths = self.lengths
        if lengths is not None:
            found = self._prefixes(site, len(lengths))
            pairs = [_joined(found[row]) if row in found else None for row in range(len(lengths))]
            return packed_attention(module, query, key, value, lengths=lengths, prefixes=pairs, **kwargs), None
        assert self.inner is not None
        prefixes = self._prefixes(site, query.shape[0])
        if not prefixes:
            return self.inner(module, query, key, value, attention_mask, **kwargs)
        plain = [row for row in range(query.shape[0]) if row not in prefixes]
        rows: list[Tensor] = [query.new_empty(0)] * query.shape[0]
        if plain:
            mask = None if attention_mask is None else attention_mask.expand(query.shape[0], -1, -1, -1)[plain]
            out, _ = self.inner(module, query[plain], key[plain], value[plain], mask, **kwargs)
            for row, y in zip(plain, out, strict=True):
                rows[row] = y
        for row, own in prefixes.items():
            mask_TS = None if attention_mask is None else attention_mask.expand(query.shape[0], -1, -1, -1)[row]
            rows[row] = attend_with_prefix(module, query[row], key[row], value[row], mask_TS, own, **kwargs)
        return torch.stack(rows), None


def _kernel(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    hub: AttentionHub = module.__dict__["_lorica_hub"]
    return hub(module, *args, **kwargs)


def _unless_packed(mask: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: None if _PACKED.get() else mask(*args, **kwargs)


def _joined(prefixes: list[PrefixKV]) -> tuple[Tensor, Tensor]:
    """The prefixes of one row's stack as one pair of [P, kv heads, head dim]."""
    return torch.cat([p.key_PHK for p in prefixes]), torch.cat([p.value_PHK for p in prefixes])


def attend_with_prefix(
    module: nn.Module,
    q_HTK: Tensor,
    k_GSK: Tensor,
    v_GSK: Tensor,
    mask: Tensor | None,
    prefixes: list[PrefixKV],
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> Tensor:
    """One row: softmax over [prefix; keys]. GQA-correct: a prefix has as many heads as the keys. Returns [T, H, K]."""
    k = torch.cat([*(p.key_PHK.transpose(0, 1).to(k_GSK.dtype) for p in prefixes), k_GSK], dim=1)
    v = torch.cat([*(p.value_PHK.transpose(0, 1).to(v_GSK.dtype) for p in prefixes), v_GSK], dim=1)
    extra, tokens, seen = k.shape[1] - k_GSK.shape[1], q_HTK.shape[1], k_GSK.shape[1]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if mask is None and causal and tokens > 1:
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=k.device).tril(seen - tokens)[None]
    if mask is not None:
        mask = mask[..., :seen]
        open_ = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        mask = torch.cat([open_((*mask.shape[:-1], extra)), mask], dim=-1)
    groups = q_HTK.shape[0] // k.shape[0]
    y_HTK = F.scaled_dot_product_attention(
        q_HTK[None],
        k.repeat_interleave(groups, 0)[None],
        v.repeat_interleave(groups, 0)[None],
        attn_mask=None if mask is None else mask[None],
        scale=scaling,
    )[0]
    return y_HTK.transpose(0, 1)
