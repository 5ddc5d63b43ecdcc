"""Attention sites: keys and values that a row's adapters put before its own (prefix tuning), and shifted groups.

In: queries, keys and values as transformers hands them to an attention function, [rows, heads, tokens, head dim].
Out: the attention output. Rows without a prefix run through the model's own attention function, untouched.
Prefixes are never cached, so decoding with a KV cache sees them again at every step. Refuses to know methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.core.errors import MethodError
from lorica.core.site import Site
from lorica.core.update import PrefixKV
from lorica.engine.executor import Executor
from lorica.engine.kv_cache import KVCache
from lorica.engine.packed import Prefix, packed_attention
from lorica.engine.shifted import shifted_attention, shifted_rows
from lorica.models.attention import (
    AttentionSwitch,
    attention_configs,
    attention_kernel,
    register_attention,
    set_attention,
)
from lorica.models.positions import window_of
from lorica.models.shifted_attention import Shifted
from lorica.models.sites import calls_interface

Attend = Callable[..., tuple[Tensor, Tensor | None]]
HUB = "_lorica_hub"
"""Where an attention module keeps its hub."""
OURS = "lorica-"
"""What the names of our kernels begin with; the rest is the kernel that they stand on."""
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
    """The attention function of one backbone.

    Attributes: `sites` holds the attention modules whose adapters may have prefixes; `cache` keeps the keys and values
    of the present generation, None outside one; `shifted` are the groups of training passes, None where these are
    dense.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.sites: dict[nn.Module, Site] = {}
        backbone = executor.backbone
        self._modules = [backbone.module_of(site.name) for site in backbone.sites.values() if site.kind == "attention"]
        self._switch: AttentionSwitch | None = None
        self.inner: Attend | None = None
        self.cache: KVCache | None = None
        self.shifted: Shifted | None = None

    def check_shifted(self) -> None:
        """Raises MethodError where some attention of the backbone could not be shifted, which would go unnoticed."""
        own, name = set(self._modules), self.executor.backbone.name
        if not own:
            raise MethodError(f"{name!r} has no attention that goes through transformers' interface, so none to shift.")
        for path, module in self.executor.backbone.module.named_modules():
            if module not in own:
                if calls_interface(type(module)):
                    raise MethodError(
                        f"Attention {path!r} of {name!r} is no causal self-attention with heads of one width."
                    )
            elif not getattr(module, "is_causal", True):
                raise MethodError(f"Attention {path!r} of {name!r} is not causal, and shifted groups are.")
        for site in self.executor.backbone.sites.values():
            if site.kind == "attention" and site.query_heads < 2:
                raise MethodError(f"Attention {site.name!r} has one head, and shifted groups need two.")

    def install(self) -> None:
        """Make this backbone's attention modules, and no others, call this object."""
        if not self._modules:
            return
        module = self.executor.backbone.module
        previous = attention_configs(module)[0]._attn_implementation
        if previous.startswith(OURS):  # of another hub: its model was made from the same config object
            previous = previous.removeprefix(OURS)
            set_attention(module, previous)
        self.inner, mask = attention_kernel(previous, self._modules[0])
        register_attention(f"{OURS}{previous}", _through_hub(self.inner), _unless_packed(mask))
        self._switch = set_attention(module, f"{OURS}{previous}")
        _INSTALLED.add(self)
        for attention in self._modules:
            # kept on the instance, so that a deep copy of the model calls the copy's own hub
            attention.__dict__[HUB] = self

    def remove(self) -> None:
        _INSTALLED.discard(self)
        if self._switch is not None:
            others = [hub._switch for hub in _INSTALLED if hub._switch is not None]
            self._switch.restore(but={id(config) for switch in others for config in switch.configs})
        for attention in self._modules:
            attention.__dict__.pop(HUB, None)

    def prefix_lengths(self, rows: int) -> list[int]:
        """Virtual tokens that each row's prefixes put before it.

        An adapter's prefix is equally long at all of its sites, and the text starts behind it at every site, also at
        those that it leaves out.
        """
        route = self.executor.live_route()
        if route is None or not self.sites:
            return [0] * rows
        with torch.no_grad():
            own = {adapter: self._prefix_length(adapter) for adapter in route.adapters()}
        return [sum(own[adapter] for adapter in stack) for stack in route.stacks_for(rows)]

    def _prefix_length(self, adapter: Adapter) -> int:
        sites, acts = adapter.layout.sites.values(), self.executor.acts
        site = next((site for site in sites if site.kind == "attention" and acts(adapter, site.name)), None)
        update = None if site is None else self.executor.lowered(adapter, site.name)
        return update.key_PHK.shape[0] if isinstance(update, PrefixKV) else 0

    def _prefixes(self, site: Site | None, rows: int) -> dict[int, list[PrefixKV]]:
        work = [] if site is None else self.executor.work_for_rows(site, rows)
        return {item.start: [u for u in item.updates if isinstance(u, PrefixKV)] for item in work}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        assert self.inner is not None
        route = self.executor.live_route()
        shifted = self.shifted if module.training and self.cache is None else None
        if route is None and shifted is None:
            return self.inner(module, query, key, value, attention_mask, **kwargs)
        site, lengths = self.sites.get(module), None if route is None else route.lengths
        if lengths is not None or self.cache is not None or shifted is not None:
            kwargs.setdefault("sliding_window", window_of(module))  # some say it in their mask alone
        if lengths is not None:
            pairs = self._pairs(site, len(lengths))
            if self.cache is not None:
                self.cache.fill(module, key, value, lengths, pairs)
            if shifted is not None:
                kwargs |= {"lengths": lengths, "prefixes": pairs}
                return shifted_attention(module, query, key, value, shifted, **kwargs), None
            return packed_attention(module, query, key, value, lengths=lengths, prefixes=pairs, **kwargs), None
        if self.cache is not None:
            return self.cache.attend(module, query, key, value, **kwargs), None
        if shifted is not None:
            kwargs["prefixes"] = self._pairs(site, query.shape[0])
            return shifted_rows(module, query, key, value, attention_mask, shifted, **kwargs), None
        return self._rows(module, query, key, value, attention_mask, **kwargs)

    def _pairs(self, site: Site | None, rows: int) -> list[Prefix]:
        found = self._prefixes(site, rows)
        return [_joined(found[row]) if row in found else None for row in range(rows)]

    def _rows(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Rows of one length in the model's own kernel, but for those with prefixes."""
        assert self.inner is not None
        prefixes = self._prefixes(self.sites.get(module), query.shape[0])
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


_INSTALLED: WeakSet[AttentionHub] = WeakSet()
"""Hubs whose kernel is in use: of several models that share a config object, the last to go puts it back."""


def _through_hub(inner: Attend) -> Attend:
    """The kernel to register: a module's own hub, or `inner` for another model that shares the config object."""

    def kernel(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        hub: AttentionHub | None = module.__dict__.get(HUB)
        return inner(module, *args, **kwargs) if hub is None else hub(module, *args, **kwargs)

    return kernel


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
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """One row: softmax over [prefix; keys]. GQA-correct: a prefix has as many heads as the keys. Returns [T, H, K].

    Raises MethodError for models with attention sinks, whose softmax has a term of its own.
    """
    if s_aux is not None:
        raise MethodError(f"{type(module).__name__} has attention sinks; a prefix cannot stand before their keys yet.")
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
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    if softcap is not None:
        return _capped(q_HTK, k, v, mask, scaling, softcap, dropout).transpose(0, 1)
    y_1HTK = F.scaled_dot_product_attention(
        q_HTK[None],
        k[None],
        v[None],
        attn_mask=None if mask is None else mask[None],
        dropout_p=dropout,
        scale=scaling,
    )
    return y_1HTK[0].transpose(0, 1)


def _capped(
    q_HTK: Tensor, k_HSK: Tensor, v_HSK: Tensor, mask: Tensor | None, scaling: float | None, cap: float, dropout: float
) -> Tensor:
    """Attention whose scores are `cap · tanh(score / cap)` (Gemma 2), [H, T, K]."""
    scores_HTS = q_HTK @ k_HSK.transpose(1, 2) * (q_HTK.shape[-1] ** -0.5 if scaling is None else scaling)
    scores_HTS = torch.tanh(scores_HTS / cap) * cap
    if mask is not None and mask.dtype == torch.bool:
        scores_HTS = scores_HTS.masked_fill(~mask, torch.finfo(scores_HTS.dtype).min)
    elif mask is not None:
        scores_HTS = scores_HTS + mask
    wide = torch.promote_types(scores_HTS.dtype, torch.float32)
    return F.dropout(scores_HTS.softmax(-1, dtype=wide), dropout, dropout > 0).to(q_HTK.dtype) @ v_HSK
