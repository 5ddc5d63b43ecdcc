"""Which weights hold several maps of one input below each other: fused q, k, v and fused gate, up.

In: a site, its module's path and the model. Out: the maps' names and outputs in order, or nothing. Only layouts in
which each map's rows are contiguous are told: GPT-NeoX, BLOOM and Falcon interleave heads, gpt-oss gate and up.
Refuses to know adapters and weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorica.core.site import Site

Parts = tuple[tuple[str, int], ...]

INTERLEAVED = frozenset({"gpt_oss"})
"""Model types whose fused gate and up alternate row by row."""


def fused_parts(site: Site, path: str, root: nn.Module) -> Parts:
    """The maps inside one weight; empty where it is a single map or the order of its rows is not known."""
    if site.kind not in ("linear", "expert"):
        return ()
    role, out, inner = site.role, site.out_features, site.in_features
    config: Any = getattr(root, "config", None)
    family = getattr(config, "model_type", None)
    # experts outside a model do not tell whose they are
    known = family not in INTERLEAVED and (family is not None or site.kind == "linear")
    if role == "gate_up_proj" and out % 2 == 0 and known:
        return (("gate", out // 2), ("up", out // 2))
    if role in ("c_attn", "qkv") and out == 3 * inner:
        return (("q", inner), ("k", inner), ("v", inner))
    if role == "c_attn" and out == 2 * inner:  # GPT-2's cross-attention, whose queries have a module of their own
        return (("k", inner), ("v", inner))
    if role == "qkv_proj":
        return _grouped(site, path, root)
    return ()


def _grouped(site: Site, path: str, root: nn.Module) -> Parts:
    """Phi-3's order: all query heads, then the key heads, then the value heads."""
    owner: Any = root.get_submodule(path.rpartition(".")[0])
    config: Any = getattr(root, "config", None)
    width, heads = getattr(owner, "head_dim", None), getattr(config, "num_attention_heads", None)
    kv = getattr(config, "num_key_value_heads", None)
    if not (isinstance(width, int) and isinstance(heads, int) and isinstance(kv, int)):
        return ()
    if site.out_features != (heads + 2 * kv) * width:
        return ()
    return (("q", heads * width), ("k", kv * width), ("v", kv * width))
