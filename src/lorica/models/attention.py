"""Switching a transformers model's attention kernel, and registering kernels of one's own.

In: a model and the name of a kernel; a kernel and how its mask is made. Out: a handle that switches back.
Thin, so that nothing outside `models/` imports transformers. Refuses to know what a kernel computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from lorica.core.errors import MethodError, did_you_mean


class AttentionSwitch:
    """The kernels that were in use before a switch: `restore()` puts them back."""

    def __init__(self, before: list[tuple[Any, str | None]]) -> None:
        self._before = before

    @property
    def configs(self) -> list[Any]:
        """The configs that were switched."""
        return [config for config, _ in self._before]

    def restore(self, *, but: Collection[int] = ()) -> None:
        """Put every config back to its kernel, but those of these ids. Twice is once."""
        for config, name in self._before:
            if id(config) not in but:
                config._attn_implementation_internal = name
        self._before = []


def set_attention(module: nn.Module, name: str) -> AttentionSwitch:
    """Make every attention module of a transformers model use the kernel called `name`, on this instance's config
    alone.

    Modules without a transformers config are left as they are. Raises MethodError for a kernel that is not registered.
    """
    configs = attention_configs(module)
    if configs:
        known = attention_names()
        if name not in known:
            raise MethodError(f"There is no attention kernel {name!r}.{did_you_mean(name, known)}")
    before = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    return AttentionSwitch(before)


def attention_configs(module: nn.Module) -> list[Any]:
    """Every config object that some module of the tree reads its kernel from, each once."""
    found: dict[int, Any] = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), config)
    return list(found.values())


def attention_names() -> list[str]:
    """The kernels that `set_attention` accepts."""
    return ["eager", *_interfaces()[0]]


def register_attention(name: str, kernel: Callable[..., Any], mask: Callable[..., Any] | str | None = None) -> None:
    """Register a kernel for every model of this process.

    `kernel(module, query_BHTK, key_BGSK, value_BGSK, attention_mask, scaling=, dropout=, **kwargs)` returns
    `(output_BTHK, weights or None)`; keyword arguments given to the model's forward arrive there too. `mask` makes
    the mask: a function of transformers' mask interface, the name of a registered kernel whose mask is used, or None
    for no mask. Raises MethodError for a mask name that is not registered.
    """
    kernels, masks = _interfaces()
    if isinstance(mask, str) and mask not in masks:
        raise MethodError(f"There is no attention mask {mask!r}.{did_you_mean(mask, masks)}")
    kernels.register(name, kernel)
    if mask is not None:
        masks.register(name, masks[mask] if isinstance(mask, str) else mask)


def attention_kernel(name: str, module: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The kernel that `module` runs under the name `name`, and the function that makes its mask.

    The kernel `eager` belongs to a model's own source file. Raises MethodError where there is none.
    """
    kernels, masks = _interfaces()
    own = sys.modules[type(module).__module__]
    kernel = getattr(own, "eager_attention_forward", None) if name == "eager" else kernels.get(name)
    mask = masks.get(name)
    if kernel is None or mask is None:
        raise MethodError(
            f"{type(module).__name__} has no attention kernel {name!r}.{did_you_mean(name, attention_names())}"
        )
    return kernel, mask


def _interfaces() -> tuple[Any, Any]:
    """Transformers' registries of kernels and of masks; both are shared by the whole process."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
