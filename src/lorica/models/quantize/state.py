"""The names of packed tensors in a state dict: bitsandbytes' for NF4, ModelOpt's for NVFP4, ours for what nobody has.

In: a packed weight, or the entries of a state dict behind a module's prefix. Out: the other. Shapes and settings are
checked. Refuses to know modules and files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorica.core.errors import FormatError
from lorica.models.quantize.codebooks import dynamic_8bit, normal_float
from lorica.models.quantize.formats import Format, Packed
from lorica.models.quantize.normal import NESTED, NormalFloat
from lorica.models.quantize.nvfp4 import NVFP4

STATE = "weight.quant_state."
"""Before the name of the settings of a weight, JSON as bytes. They say nothing of its values."""
BNB = f"{STATE}bitsandbytes__nf4"
OURS = f"{STATE}lorica"
NVFP4_NAMES = {"codes": "weight", "scale": "weight_scale", "tensor_scale": "weight_scale_2"}


def to_state(packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    """State-dict entries, by what follows the module's prefix. `dtype` is that of the dequantised weight."""
    form, parts = packed.format, packed.parts
    if isinstance(form, NormalFloat) and form.width == 4:
        return _to_bnb(form, packed.shape, parts, dtype)
    names = _names(form, packed.shape)
    settings = _text({"kind": form.name, "shape": list(packed.shape)}, parts["codes"].device)
    return {**{names[name]: part for name, part in parts.items()}, OURS: settings}


def from_state(state: Mapping[str, Tensor], form: Format, shape: tuple[int, ...]) -> Packed:
    """The packed weight of a module of this shape. NF4 may have another block or double quantisation than `form`.

    Raises FormatError for a dense weight, absent or unknown entries, another shape or other settings.
    """
    weight = state.get("weight")
    if weight is not None and weight.is_floating_point():
        raise FormatError(f"the weight is dense ({str(weight.dtype)[6:]}) and this module holds {form.name}")
    if BNB in state:
        if not (isinstance(form, NormalFloat) and form.width == 4):
            raise FormatError(f"the weight is nf4 and this module holds {form.name}")
        return _from_bnb(state, shape)
    if OURS in state and stored_shape(state) != tuple(shape):
        raise FormatError(f"the weight has shape {stored_shape(state)}; {tuple(shape)} is right")
    names = _names(form, shape)
    absent = next((key for key in names.values() if key not in state), None)
    if absent is not None:
        raise FormatError(f"{absent!r} is missing, which {form.name} needs")
    return _checked(form, shape, {name: state[key] for name, key in names.items()})


def stored_shape(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of the weight that a module's entries hold, as their settings say. Raises FormatError without any."""
    key = next((key for key in (BNB, OURS) if key in state), None)
    if key is None:
        raise FormatError(f"it has neither {BNB!r} nor {OURS!r}, which say how to read it")
    return tuple(_settings(state, key, "shape")["shape"])


def _names(form: Format, shape: tuple[int, ...]) -> Mapping[str, str]:
    """Part → key."""
    if isinstance(form, NVFP4):
        return NVFP4_NAMES
    return {name: "weight" if name == "codes" else f"weight.{name}" for name in form.sizes(shape)}


def _text(settings: dict[str, Any], device: torch.device) -> Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8, device=device)


def _settings(state: Mapping[str, Tensor], key: str, *needed: str) -> dict[str, Any]:
    """Settings of a weight. Raises FormatError where they are no JSON or lack one of those needed."""
    try:
        found = json.loads(bytes(state[key].cpu().numpy()).decode())
        return {**found, **{name: found[name] for name in needed}}
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{key!r} is not as it should be: {type(error).__name__} at {error}") from None


def _to_bnb(
    form: NormalFloat, shape: tuple[int, ...], parts: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    device = parts["codes"].device
    settings: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": form.block,
        # bitsandbytes has no float64
        "dtype": str(torch.float32 if dtype == torch.float64 else dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    state = {"weight": parts["codes"], "weight.absmax": parts["absmax"]}
    state["weight.quant_map"] = normal_float(4).to(device, copy=True)
    if form.double:
        settings |= {"nested_blocksize": NESTED, "nested_dtype": "float32"}
        settings["nested_offset"] = 0.0 if device.type == "meta" else parts["nested_offset"].item()
        state["weight.nested_absmax"] = parts["nested_absmax"]
        state["weight.nested_quant_map"] = dynamic_8bit().to(device, copy=True)
    return {**state, BNB: _text(settings, device)}


def _from_bnb(state: Mapping[str, Tensor], shape: tuple[int, ...]) -> Packed:
    settings = _settings(state, BNB, "blocksize", "shape")
    form = NormalFloat(4, int(settings["blocksize"]), "nested_offset" in settings)
    if stored_shape(state) != tuple(shape):
        raise FormatError(f"the weight has shape {stored_shape(state)}; {tuple(shape)} is right")
    known = {"weight.quant_map": normal_float(4)}
    known |= {"weight.nested_quant_map": dynamic_8bit()} if form.double else {}
    for key, table in known.items():
        if key not in state or not torch.equal(state[key].float().cpu(), table):
            raise FormatError(f"{key!r} is missing or is another table than bitsandbytes' own")
    if settings.get("nested_blocksize", NESTED) != NESTED:
        raise FormatError(f"its scales share scales in blocks of {settings['nested_blocksize']}; {NESTED} can be read")
    names = {"codes": "weight", "absmax": "weight.absmax"}
    names |= {"nested_absmax": "weight.nested_absmax"} if form.double else {}
    absent = next((key for key in names.values() if key not in state), None)
    if absent is not None:
        raise FormatError(f"{absent!r} is missing")
    parts = {name: state[key] for name, key in names.items()}
    parts["codes"] = parts["codes"].view(torch.uint8).reshape(-1, 1)  # other storage dtypes hold the same bytes
    if form.double:
        parts["nested_offset"] = torch.tensor(float(settings["nested_offset"]), dtype=torch.float32)
    return _checked(form, shape, parts)


def _checked(form: Format, shape: tuple[int, ...], parts: dict[str, Tensor]) -> Packed:
    """Raises FormatError where a part has another size or dtype than the format says."""
    for name, (size, dtype) in form.sizes(shape).items():
        part = parts[name]
        if tuple(part.shape) != size or part.dtype != dtype:
            found, right = f"{str(part.dtype)[6:]} {tuple(part.shape)}", f"{str(dtype)[6:]} {size}"
            raise FormatError(f"{name!r} is {found}; {right} is right for {form.name}")
    return Packed(form, tuple(shape), parts)
