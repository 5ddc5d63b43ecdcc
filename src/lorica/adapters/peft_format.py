"""An adapter as the tensors and settings of PEFT's files, where PEFT has the maths, and back.

In: an adapter and its backbone, or what a PEFT folder holds. Out: tensors with `adapter_config.json`, or a filled
adapter. Methods that PEFT lacks are written under names of ours with a peft_type that PEFT refuses. Refuses to know
folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lorica.adapters import peft_adalora, peft_glora, peft_lora, peft_prompts, peft_vectors
from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.peft_config import method_class
from lorica.adapters.peft_extras import fill, take_changes, widen
from lorica.adapters.peft_keys import Tensors, own_key
from lorica.core.errors import FormatError
from lorica.methods.base import Method
from lorica.methods.pissa import CounterTerm, PiSSA
from lorica.models.backbone import Backbone

CODECS: dict[str, ModuleType] = {
    "LORA": peft_lora,
    "ADALORA": peft_adalora,
    "VERA": peft_vectors,
    "IA3": peft_vectors,
    "LN_TUNING": peft_vectors,
    "MISS": peft_vectors,
    "GLORA": peft_glora,
    "PROMPT_TUNING": peft_prompts,
    "PREFIX_TUNING": peft_prompts,
}
"""Each has why_not, settings, encode, decode and plan."""
OWN_TYPE = "LORICA"
"""The peft_type of adapters that PEFT cannot hold."""


def why_not(adapter: Adapter, backbone: Backbone) -> str | None:
    """Why PEFT cannot hold an adapter, in words, or None where it can."""
    codec = _codec(adapter.method)
    if codec is None:
        return f"PEFT has no method {adapter.method.name!r}"
    reason: str | None = codec.why_not(adapter, backbone)
    return reason


def _codec(method: Method) -> ModuleType | None:
    if isinstance(method, CounterTerm):
        return peft_lora
    return CODECS.get(method.peft.peft_type) if method.peft is not None else None


def encode(adapter: Adapter, backbone: Backbone) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of an adapter: PEFT's where it can hold it, and ours elsewhere."""
    common = {
        "base_model_name_or_path": backbone.name,
        "inference_mode": True,
        "task_type": "CAUSAL_LM" if backbone.is_causal_lm else None,
    }
    codec = _codec(adapter.method)
    if codec is not None and codec.why_not(adapter, backbone) is None:
        return codec.encode(adapter, backbone), {**common, **codec.settings(adapter, backbone)}
    tensors = {own_key(s, p): t for s in adapter.layout.specs for p, t in adapter.values(s).items()}
    return tensors, {**common, "peft_type": OWN_TYPE}


def decode(
    adapter: Adapter, config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, file: object
) -> None:
    """Fill an adapter whose layout is known (a folder that Lorica wrote). Raises FormatError, MismatchError."""
    held = Tensors(tensors, backbone, file)
    codec = _codec(adapter.method)
    if config.get("peft_type") == OWN_TYPE or codec is None:
        for site, specs in adapter.layout.specs.items():
            peft_lora.put(adapter, site, {param: held.take(own_key(site, param)) for param in specs}, file)
    else:
        codec.decode(adapter, held, backbone, adapter.layout.sites)
    held.finish()


def from_peft(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    backbone: Backbone,
    name: str,
    file: object,
    config_file: object,
) -> Adapter:
    """An adapter from a folder that PEFT wrote; parameters are float32 at least.

    Raises FormatError, MismatchError and MethodError for what cannot be read without changing what it computes.
    """
    if config.get("peft_type") == OWN_TYPE:
        raise FormatError(f"{file} is written in Lorica's own layout, and its lorica.json is missing.")
    cls = method_class(config, config_file)
    codec = CODECS[str(config["peft_type"])]
    held = Tensors(tensors, backbone, file)
    dtype = torch.float32
    for tensor in tensors.values():
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    layout: Layout = codec.plan(cls, config, held, backbone)
    changes = take_changes(held, backbone)
    adapter = Adapter(name, widen(layout, changes, backbone, file), base=backbone.fingerprint(), dtype=dtype)
    if cls is PiSSA:
        adapter.initialise(backbone.weight)
    codec.decode(adapter, held, backbone, layout.sites)
    fill(adapter, changes, file)
    held.finish()
    return adapter
