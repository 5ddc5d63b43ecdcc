"""Model directories whose weights are packed: bitsandbytes' 4-bit checkpoints, and ours for other formats.

In: a parsed `config.json` and the tensors of its files; or a quantised backbone. Out: the setting, dense tensors that
transformers can load, and then the stored bits themselves; or the `quantization_config` to write. Refuses to know how
files and model classes are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.core.errors import ConfigError, FormatError
from lorica.core.site import Site
from lorica.models.backbone import Backbone
from lorica.models.quantize.apply import format_for, linear_sites, quantize_backbone
from lorica.models.quantize.config import Quantization
from lorica.models.quantize.formats import Packed, finite32
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


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """What a directory holds: packed weights by the name of their module, and all other tensors."""

    config: Quantization
    packed: Mapping[str, Packed]
    rest: State


def sorted_out(state: State, config: Quantization) -> Stored:
    """The tensors of a directory whose weights are packed. Raises FormatError for packed ones that cannot be read."""
    packed: dict[str, Packed] = {}
    rest = dict(state)
    for name in _names(state):
        own = [key for key in state if key.startswith(f"{name}.weight")]
        packed[name] = _packed({key: state[key] for key in own}, name, config)
        for key in own:
            rest.pop(key, None)
    return Stored(config, packed, rest)


def dense_state(stored: Stored, dtype: torch.dtype, skeleton: nn.Module) -> State:
    """All tensors with every packed weight dequantised, as a network of this form loads it."""
    dense = dict(stored.rest)
    flipped = {name for name, module in skeleton.named_modules() if is_conv1d(module)}
    for name, weight in stored.packed.items():
        full = weight.dense(dtype)
        dense[f"{name}.weight"] = full.T.contiguous() if name in flipped else full
    return dense


def restore_packed(backbone: Backbone, stored: Stored, device: torch.device | None = None) -> Backbone:
    """A backbone loaded from `dense_state`, with the stored bits as its weights. What is no linear site stays dense."""

    def pack(site: Site, weight_OI: Tensor) -> Packed:
        finite32(weight_OI)
        one = stored.packed[site.name]
        parts = {name: part.to(device or weight_OI.device, copy=True) for name, part in one.parts.items()}
        return Packed(one.format, one.shape, parts)

    skip = tuple(site.name for site in linear_sites(backbone) if site.name not in stored.packed)
    quantized = quantize_backbone(backbone, stored.config.replace(skip=skip, backend="auto"), device=device, pack=pack)
    forms = [module.form for module in quantized.packed_modules()]
    if isinstance(forms[-1], NormalFloat) and quantized.quantization is not None:
        found = {"block": forms[-1].block, "double": forms[-1].double}  # what the tensors say, not their directory
        quantized.quantization = quantized.quantization.replace(**found)
    quantized.origin = ""  # nobody knows what these bits were made from
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
    own = {key.removeprefix(f"{name}."): value for key, value in state.items()}
    try:
        return from_state(own, format_for(config), stored_shape(own))
    except FormatError as error:
        raise FormatError(f"The packed weight of {name!r} cannot be read: {error}.") from None
