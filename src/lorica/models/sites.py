"""The sites of a module tree, with every family's way of storing weights normalised.

In: any `torch.nn.Module`. Out: for each site its record and where its weight lives (owner, attribute, expert,
transposed). A module is listed only when replacing its forward or its weight does what it says: subclasses that
redefine `forward`, weights that are computed (parametrised, or quantised by others) and the insides of
`nn.MultiheadAttention` are left out. Refuses to know adapters, files and families by name.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lorica.core.errors import FormatError
from lorica.core.site import Site
from lorica.models.fused import fused_parts
from lorica.models.quantize.linear import QuantizedLinear

INPUT = "input"
HEAD_NAMES = frozenset({"classifier", "score", "qa_outputs", "seq_relationship", "lm_head"})
CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
EXPERT_PARAMETERS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a site is: the module that acts, the attribute of its weight ('' for none), and the name of its bias."""

    site: Site
    module: nn.Module
    attribute: str = "weight"
    bias: str | None = None


def list_places(root: nn.Module) -> dict[str, Place]:
    """Every site by name: the input first, then in module-tree order. Raises FormatError for lazy modules."""
    lazy = next((name for name, p in root.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise FormatError(
            f"Parameter {lazy!r} is lazy and has no shape yet.", hint="Run the module once before wrapping it."
        )
    hidden = {id(m) for mha in root.modules() if isinstance(mha, nn.MultiheadAttention) for m in mha.modules()}
    heads = _heads(root)
    places: dict[str, Place] = {}
    embedding = input_embedding(root)
    if embedding is not None:
        scale = embedding_scale(embedding) or 1.0
        places[INPUT] = Place(Site(INPUT, "input", (embedding.embedding_dim,), scale=scale), embedding)
    for name, module in root.named_modules():
        if id(module) in hidden:
            continue
        for place in _of_module(name or "root", module):
            head = id(module) in heads and place.site.kind == "linear"
            parts = fused_parts(place.site, name, root)
            places[place.site.name] = replace(place, site=replace(place.site, head=head, parts=parts))
    return _mark_tied(places)


def _of_module(name: str, module: nn.Module) -> Iterator[Place]:
    """The sites of one module: at most one, but for fused experts."""
    layer = layer_of(name)
    weight = module._parameters.get("weight")
    has_bias = module._parameters.get("bias") is not None
    bias = "bias" if has_bias else None
    if isinstance(module, QuantizedLinear):
        yield Place(Site(name, "linear", module.shape, has_bias, layer, module.transposed), module, bias=bias)
    elif weight is not None and weight.is_floating_point():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            yield Place(Site(name, "linear", tuple(weight.shape), has_bias, layer), module, bias=bias)
        elif is_conv1d(module):
            yield Place(
                Site(name, "linear", (weight.shape[1], weight.shape[0]), has_bias, layer, transposed=True),
                module,
                bias=bias,
            )
        elif isinstance(module, nn.Embedding):
            scale = embedding_scale(module)
            if scale is not None and module.max_norm is None:  # max_norm rewrites rows of the base in every forward
                shape = (module.embedding_dim, module.num_embeddings)
                yield Place(Site(name, "embedding", shape, layer=layer, transposed=True, scale=scale), module)
        elif isinstance(module, CONVS) and any(type(module).forward is conv.forward for conv in CONVS):
            yield Place(Site(name, "conv", tuple(weight.shape), has_bias, layer), module, bias=bias)
        elif is_router(module):
            site = Site(name, "linear", tuple(weight.shape), has_bias, layer, router=True)
            yield Place(site, module, bias=bias)
        elif is_norm(module):
            yield Place(Site(name, "norm", tuple(weight.shape), has_bias, layer), module, bias=bias)
    heads = attention_heads(module)
    if heads is not None:
        query, kv, width = heads
        yield Place(Site(name, "attention", (kv, width), layer=layer, query_heads=query), module, attribute="")
    yield from _experts(name, module, layer)


def layer_of(name: str) -> int | None:
    """The first number in a dotted path: `model.layers.3.mlp` → 3."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, without importing transformers: none can exist before that."""
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)


def is_router(module: nn.Module) -> bool:
    """A router of experts that computes its logits by `F.linear` from a weight of its own."""
    weight, code = module._parameters.get("weight"), getattr(inspect.unwrap(type(module).forward), "__code__", None)
    named = type(module).__name__.endswith("Router") and not isinstance(module, nn.Linear)
    return named and weight is not None and weight.ndim == 2 and code is not None and "linear" in code.co_names


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm, GroupNorm and look-alikes by class name, with a one-dimensional weight over the last axis."""
    named = isinstance(module, nn.GroupNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    weight = module._parameters.get("weight")
    return (
        named
        and weight is not None
        and weight.ndim == 1
        and getattr(module, "data_format", "channels_last") == "channels_last"
    )


def embedding_scale(module: nn.Embedding) -> float | None:
    """What the module multiplies its rows by; None where its forward is its own and says nothing about a scale."""
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, Tensor):
        return float(scale.to(module.weight.dtype))  # the module rounds it so too
    return None if scale is None else float(scale)


def attention_heads(module: nn.Module) -> tuple[int, int, int] | None:
    """(query heads, kv heads, head dim) of a self-attention that goes through transformers' attention interface."""
    if not calls_interface(type(module)) or getattr(module, "is_cross_attention", False):
        return None
    if "CrossAttention" in type(module).__name__ or hasattr(module, "v_head_dim"):  # keys and values of different width
        return None
    config = getattr(module, "config", None)
    query = _first(module, "num_heads", "num_attention_heads", "n_heads") or _first(config, "num_attention_heads")
    width = _first(module, "head_dim", "attention_head_size", "head_size")
    if query is None or width is None:
        return None
    kv = _first(module, "num_key_value_heads", "num_kv_heads")
    return query, kv or query // (_first(module, "num_key_value_groups") or 1), width


def calls_interface(cls: type[nn.Module]) -> bool:
    """Whether modules of a class ask transformers' registry for their attention kernel."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _first(owner: Any, *names: str) -> int | None:
    """The first attribute that is a whole number."""
    return next((value for n in names if isinstance(value := getattr(owner, n, None), int)), None)


def _experts(name: str, module: nn.Module, layer: int | None) -> Iterator[Place]:
    """One site for each expert and each of its weights, where the module fuses them into [experts, ·, ·]."""
    transposed = experts_transposed(module)
    if transposed is None:
        return
    weights = [(p, w) for p in EXPERT_PARAMETERS if (w := module._parameters.get(p)) is not None]
    for expert in range(weights[0][1].shape[0]):
        for parameter, weight in weights:
            rows, cols = weight.shape[1:]
            shape = (cols, rows) if transposed else (rows, cols)
            bias = f"{parameter}_bias" if module._parameters.get(f"{parameter}_bias") is not None else None
            full = f"{name}.{expert}.{parameter}"
            site = Site(full, "expert", shape, bias is not None, layer, transposed=transposed, expert=expert)
            yield Place(site, module, parameter, bias)


def experts_transposed(module: nn.Module) -> bool | None:
    """Whether fused experts store [in, out]; None where the module is no fused experts or does not tell."""
    down = module._parameters.get("down_proj")
    if down is None or down.ndim != 3 or not down.is_floating_point():
        return None
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return told
    hidden = _first(module, "hidden_dim", "hidden_size")
    if hidden is None or down.shape[1] == down.shape[2] or hidden not in down.shape[1:]:
        return None
    return int(down.shape[2]) == hidden


def input_embedding(root: nn.Module) -> nn.Embedding | None:
    """The token embedding, where the module is a transformers model that has one."""
    getter = getattr(root, "get_input_embeddings", None)
    if getter is None:
        return None
    try:
        found = getter()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def output_embedding(root: nn.Module) -> nn.Linear | None:
    """The linear that gives the vocabulary's logits, or None."""
    getter = getattr(root, "get_output_embeddings", None)
    found = getter() if getter is not None else None
    return found if isinstance(found, nn.Linear) else None


def _heads(root: nn.Module) -> set[int]:
    """Identities of the modules that are output heads: the output embedding, and classifiers beside a base model."""
    found = {id(output_embedding(root))}
    if getattr(root, "base_model", root) is not root:
        for name, child in root.named_children():
            if name in HEAD_NAMES:
                found |= {id(m) for m in child.modules() if name != "lm_head" or isinstance(child, nn.Linear)}
    return found


def _mark_tied(places: dict[str, Place]) -> dict[str, Place]:
    """Set `tied` on every site whose weight tensor another site has too."""
    owners: dict[int, list[str]] = {}
    for name, place in places.items():
        whole = place.site.kind not in ("input", "attention") and place.site.expert is None
        if whole and not isinstance(place.module, QuantizedLinear):  # a packed weight is nobody else's
            owners.setdefault(_storage(getattr(place.module, place.attribute)), []).append(name)
    shared = {name for group in owners.values() if len(group) > 1 for name in group}
    return {name: replace(p, site=replace(p.site, tied=True)) if name in shared else p for name, p in places.items()}


def _storage(weight: Tensor) -> int:
    """Equal for weights at the same memory; on the meta device there is none, and identity decides."""
    return id(weight) if weight.device == torch.device("meta") else weight.data_ptr() or id(weight)
