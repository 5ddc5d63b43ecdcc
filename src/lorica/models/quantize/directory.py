"""Model directories whose weights are packed: bitsandbytes' 4-bit checkpoints, and ours for other formats.

In: a parsed `config.json` and the tensors of its files; or a quantised backbone. Out: the setting, dense tensors that
transformers can load, and then the stored bits themselves; or the `quantization_config` to write. Refuses to know how
files and model classes are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.core.errors import ConfigError, FormatError
from lorica.models.backbone import Backbone
from lorica.models.quantize.apply import format_for, quantize_backbone
from lorica.models.quantize.config import Quantization
from lorica.models.quantize.formats import Packed
from lorica.models.quantize.normal import NormalFloat
from lorica.models.quantize.state import from_state, stored_shape
from lorica.models.sites import is_conv1d

KEY = "quantization_config"
OURS = "lorica"
State = dict[str, Tensor]


def stored_as(config: Mapping[str, Any], path: Path) -> Quantization | None:
    """How the weights of a model directory are stored; None where they are dense.

    Raises FormatError for a quantisation that neither bitsandbytes' nf4 nor one of ours is.
    """
    given = config.get(KEY)
    if given is None:
        return None
    method = given.get("quant_method")
    if method == OURS:
        return Quantization.parse({key: value for key, value in given.items() if key != "quant_method"})
    if method == "bitsandbytes" and given.get("load_in_4bit") and given.get("bnb_4bit_quant_type") == "nf4":
        return Quantization(double=bool(given.get("bnb_4bit_use_double_quant")))
    what = f" ({given.get('bnb_4bit_quant_type') or '8 bits'})" if method == "bitsandbytes" else ""
    raise FormatError(
        f"{path} holds weights quantised by {method}{what}, which Lorica does not read; it reads bitsandbytes' nf4 and "
        "its own formats."
    )


def read_state(files: Sequence[Path]) -> State:
    """All tensors of a directory's weight files. Raises FormatError for files that are not safetensors."""
    from safetensors.torch import load_file

    state: State = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise FormatError(f"{file} holds packed weights and is no safetensors file, so it is not read.")
        state |= load_file(file)
    return state


def dense_state(state: State, config: Quantization, dtype: torch.dtype, skeleton: nn.Module) -> State:
    """The same with every packed weight dequantised, as a network of this form loads it. Raises FormatError."""
    packed = {name: _packed(state, name, config) for name in _names(state)}
    dense = {key: value for key, value in state.items() if key.partition(".weight")[0] not in packed}
    dense |= {f"{name}.bias": state[f"{name}.bias"] for name in packed if f"{name}.bias" in state}
    flipped = {name for name, module in skeleton.named_modules() if is_conv1d(module)}
    for name, weight in packed.items():
        full = weight.dense(dtype)
        dense[f"{name}.weight"] = full.T.contiguous() if name in flipped else full
    return dense


def restore_packed(
    backbone: Backbone, state: State, config: Quantization, device: torch.device | None = None
) -> Backbone:
    """A backbone loaded from `dense_state`, with the stored bits as its weights. What is no linear site stays dense."""
    names = set(_names(state))
    linear = [s.name for s in backbone.sites.values() if s.kind == "linear" and not (s.head or s.router or s.tied)]
    whole = config.replace(skip=tuple(name for name in linear if name not in names), backend="auto")
    quantized = quantize_backbone(backbone, whole, device=device)
    for site in quantized.sites.values():
        module = quantized.weight(site.name).packed
        if module is not None:
            module.hold(_packed(state, site.name, config))
        form = None if module is None else module.form
        if isinstance(form, NormalFloat) and quantized.quantization is not None:
            found = {"block": form.block, "double": form.double}  # what the tensors say, not their directory
            quantized.quantization = quantized.quantization.replace(**found)
    quantized.origin = ""  # nobody knows what these bits were made from
    quantized.invalidate()
    return quantized


def config_of(backbone: Backbone) -> dict[str, Any]:
    """The `quantization_config` of a quantised backbone: bitsandbytes' for nf4, so that transformers loads it too."""
    config = backbone.quantization
    assert config is not None
    dense = [s.name for s in backbone.sites.values() if s.kind == "linear" and backbone.weight(s.name).packed is None]
    if config.kind != "nf4":
        return {"quant_method": OURS, **config.model_dump(mode="json", exclude={"backend"})}
    dtype = torch.float32 if backbone.dtype == torch.float64 else backbone.dtype
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": config.double,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "llm_int8_skip_modules": dense or None,
    }


@contextmanager
def described(backbone: Backbone) -> Iterator[None]:
    """Inside, the model's config says how its weights are stored, for `save_pretrained`."""
    config: Any = getattr(backbone.module, "config", None)
    if backbone.quantization is None or config is None:
        yield
        return
    setattr(config, KEY, config_of(backbone))
    try:
        yield
    finally:
        delattr(config, KEY)


def check_asked(stored: Quantization, asked: Quantization | None, name: str) -> None:
    """Raises ConfigError where weights that are stored packed are asked for in another form."""
    if asked is not None and (asked.kind != stored.kind or asked.skip):
        raise ConfigError(
            f"{name!r} is stored as {stored.kind}, so it cannot be loaded as {str(asked)!r}.",
            hint="Leave quantize out, or take the model that it was made from.",
        )


def _names(state: State) -> Iterator[str]:
    """Names of modules whose weight is packed: an integer one."""
    for key, value in state.items():
        if key.endswith(".weight") and not value.is_floating_point():
            yield key.removesuffix(".weight")


def _packed(state: State, name: str, config: Quantization) -> Packed:
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(f"{prefix}weight")}
    try:
        return from_state(own, format_for(config), stored_shape(own))
    except FormatError as error:
        raise FormatError(f"The packed weight of {name!r} cannot be read: {error}.") from None
