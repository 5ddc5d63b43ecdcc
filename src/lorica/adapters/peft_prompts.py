"""Prompt tuning and prefix tuning in PEFT's layout, in both directions.

In: an adapter, or a PEFT config with its tensors. Out: tensors and settings, or a layout and its values. PEFT keeps
one table for all layers, [tokens, layers · 2 · kv heads · head dim], a layer's keys before its values. What trains
the table (the MLP of `projection`) travels beside it under names of ours. Refuses to know files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import GLOBAL, Layout
from lorica.adapters.peft_keys import Tensors, own_key
from lorica.adapters.peft_lora import put
from lorica.core.errors import FormatError, MismatchError
from lorica.core.site import Site
from lorica.methods.base import Method
from lorica.methods.prefix import Prefix
from lorica.methods.prompt import Prompt
from lorica.models.backbone import Backbone

TABLE = "prompt_embeddings"


def why_not(adapter: Adapter, backbone: Backbone) -> str | None:
    """Why the PEFT type cannot hold an adapter, or None."""
    if not backbone.is_causal_lm:
        return "PEFT needs a task for prompts, and this backbone is no causal language model"
    if isinstance(adapter.method, Prefix):
        if len(adapter.layout.sites) != len(_attention(backbone)):
            return "PEFT's prefixes act at every layer"
        if len({site.shape for site in adapter.layout.sites.values()}) > 1:
            return "PEFT needs layers of one shape"
    return None


def _attention(backbone: Backbone) -> list[Site]:
    return [site for site in backbone.sites.values() if site.kind == "attention"]


def settings(adapter: Adapter, backbone: Backbone) -> dict[str, Any]:
    """The fields of PEFT's config that describe an adapter."""
    method = adapter.method
    assert method.peft is not None
    assert isinstance(method, Prompt | Prefix)
    layers = _attention(backbone)
    first = next(iter(adapter.layout.sites.values()))
    if isinstance(method, Prefix):
        heads, width = first.shape[0], first.shape[0] * first.shape[1]
    else:
        heads, width = (layers[0].query_heads if layers else 1), first.shape[0]
    return {
        "peft_type": method.peft.peft_type,
        "num_virtual_tokens": method.tokens,
        "token_dim": width,
        "num_layers": max(1, len(layers)),
        "num_attention_heads": heads,
        **method.peft.fixed,
    }


def encode(adapter: Adapter, backbone: Backbone) -> dict[str, Tensor]:
    """The one table, and beside it what trains it."""
    method, sites = adapter.method, adapter.layout.sites
    if not isinstance(method, Prefix):
        return {TABLE: adapter.values(next(iter(sites)))["prompt"]}
    shared = adapter.values(GLOBAL)
    with torch.no_grad():
        tables = [method.table({**shared, **adapter.values(name)}) for name in sites]
    found = {TABLE: torch.cat(tables, dim=1)}
    if method.projection:
        for site in adapter.layout.specs:
            found |= {own_key(site, param): value for param, value in adapter.values(site).items()}
    return found


def decode(adapter: Adapter, held: Tensors, backbone: Backbone, names: Collection[str]) -> None:
    """Fill an adapter's sites `names`. Raises FormatError for missing tensors, MismatchError for other shapes."""
    method, sites = adapter.method, {name: adapter.layout.sites[name] for name in names}
    table = held.take(TABLE)
    if not isinstance(method, Prefix):
        put(adapter, next(iter(sites)), {"prompt": table}, held.file)
    elif method.projection:
        for name in (GLOBAL, *sites):
            params = adapter.layout.specs[name]
            put(adapter, name, {param: held.take(own_key(name, param)) for param in params}, held.file)
    else:
        widths = [2 * site.shape[0] * site.shape[1] for site in sites.values()]
        if table.ndim != 2 or table.shape[1] != sum(widths):
            raise MismatchError(
                f"{held.file} holds a prefix of shape {list(table.shape)}; the {len(sites)} attention sites of "
                f"{backbone.name!r} need [{method.tokens}, {sum(widths)}]."
            )
        for name, part in zip(sites, table.split(widths, dim=1), strict=True):
            put(adapter, name, {"prefix": part}, held.file)


def plan(method_class: type[Method], config: Mapping[str, Any], held: Tensors, backbone: Backbone) -> Layout:
    """Where a PEFT prompt acts: at the input, or at every attention. Raises FormatError, MismatchError."""
    kind = "input" if method_class is Prompt else "attention"
    sites = [site for site in backbone.sites.values() if site.kind == kind]
    if not sites:
        raise MismatchError(f"{backbone.name!r} has no {kind} site for the adapter in {held.file}.")
    if TABLE not in held:
        raise FormatError(f"{held.file} lacks the tensor {TABLE!r}.")
    told, rows = config.get("num_virtual_tokens"), held.peek(TABLE).shape[0]
    if told != rows:
        raise FormatError(f"{held.file} holds {rows} virtual tokens, where its settings say {told}.")
    # PEFT stores what the encoder computed and not the encoder, so a projected prefix comes back as a plain table
    method = method_class(**{"tokens": rows})
    return Layout(method, {site.name: (site, method) for site in sites})
