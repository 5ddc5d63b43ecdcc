"""Loading a backbone: a name becomes a directory, a directory becomes a checked, frozen module.

In: a built-in name, a directory or a hub id; dtype and device. Out: a backbone with its tokenizer at hand. The nano
model goes the same way as any other. Transformers is quiet while it loads, and torch's global random state is kept.
Refuses to run code from a checkpoint and to fill missing weights with random ones.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.core.errors import ConfigError, FormatError, LoricaError, MissingError, did_you_mean
from lorica.models.backbone import Backbone
from lorica.models.builtin import BUILTIN
from lorica.models.directory import check_directory, has_tokenizer, read_config, read_lineage, weight_files
from lorica.models.positions import check_scale, check_scaled, scale_positions
from lorica.models.quantize.apply import quantize_backbone
from lorica.models.quantize.config import Quantization
from lorica.models.quantize.directory import (
    Stored,
    check_asked,
    dense_state,
    read_state,
    restore_packed,
    sorted_out,
    stored_as,
)

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
CHECKED = 2**28
"""Parameters up to which every weight is checked to be finite on load."""


def load_backbone(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    revision: str | None = None,
    position_scale: float = 1.0,
    quantize: Quantization | str | Mapping[str, Any] | None = None,
) -> Backbone:
    """See `lorica.models.load`."""
    wanted, place, packed = parse_dtype(dtype), parse_device(device), Quantization.of(quantize)
    check_scale(position_scale)
    if name.startswith("tiny-") and name in BUILTIN:
        from lorica.models.factory import make_tiny

        _no_revision(name, revision)
        make = functools.partial(make_tiny, name.removeprefix("tiny-"), dtype=wanted, position_scale=position_scale)
        backbone = make()
        if packed is not None:
            backbone = quantize_backbone(backbone, packed, device=place).packed_from(make)
        return _moved(backbone, place)
    path = locate(name, revision)
    stored, setting = None, stored_as(read_config(path), path)
    if setting is not None:
        check_asked(setting, packed, name)
        stored = sorted_out(read_state(weight_files(path)), setting)
    module = read_module(path, wanted, position_scale, stored)
    backbone = Backbone(module, name=name, tokenizer=(lambda: read_tokenizer(path)) if has_tokenizer(path) else None)
    backbone.lineage = read_lineage(path)
    if stored is not None:
        backbone = restore_packed(backbone, stored, place)
    elif packed is not None:  # weight by weight, so that the device never holds them all in full
        full = functools.partial(
            load_backbone, name, dtype=dtype, revision=revision, position_scale=position_scale, quantize=None
        )
        backbone = quantize_backbone(backbone, packed, device=place).packed_from(full)
    return _moved(backbone, place)


def _moved(backbone: Backbone, place: torch.device) -> Backbone:
    backbone.module.to(place)
    return backbone


def locate(name: str, revision: str | None = None) -> Path:
    """The directory that a name stands for, fetched if need be. Raises MissingError, ConfigError."""
    if name == "nano":
        _no_revision(name, revision)
        return Path(str(importlib.resources.files("lorica.models") / "nano"))
    path = Path(name).expanduser()
    if path.is_dir():
        _no_revision(name, revision)
        return path
    if path.is_file():
        raise FormatError(f"{name!r} is a file; a model is a directory that holds config.json and weights.")
    if (
        not name
        or path.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
        or (os.sep != "/" and os.sep in name)
    ):
        raise MissingError(f"There is no directory {name!r}.{did_you_mean(name, BUILTIN)}")
    from lorica.models.hub import fetch

    return fetch(name, revision)


def read_module(
    path: Path,
    dtype: torch.dtype | None = None,
    position_scale: float = 1.0,
    stored: Stored | None = None,
) -> nn.Module:
    """The network of a model directory, on the CPU. None as dtype keeps bfloat16 and turns all else into float32.

    `stored` are the tensors of a directory whose weights are packed: they are dequantised.
    """
    config = check_directory(path)
    with quiet(), torch.random.fork_rng(devices=[]):
        parsed, cls = model_class(path, config)
        if position_scale != 1:
            scale_positions(parsed, position_scale, path.name)
        source: dict[str, Any] = {"pretrained_model_name_or_path": path, "dtype": dtype or "auto"}
        if stored is not None:
            full = dtype or DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
            del parsed.quantization_config
            with torch.device("meta"):
                skeleton = getattr(cls, "from_config", cls)(parsed)
            dense = dense_state(stored, full, skeleton)
            source = {"pretrained_model_name_or_path": None, "dtype": full, "state_dict": dense}
        try:
            module, info = cls.from_pretrained(config=parsed, local_files_only=True, output_loading_info=True, **source)
        except Exception as error:
            raise _format(path, error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise FormatError(
            f"{path} lacks {len(missing)} weights of {type(module).__name__}, such as {missing[0]!r}; "
            "they would be random, so the model is not loaded."
        )
    if dtype is None and next(module.parameters()).dtype != torch.bfloat16:
        module = module.float()
    check_finite(module, path)
    if position_scale != 1:
        check_scaled(module, position_scale, path.name)
    result: nn.Module = module
    return result


def model_class(path: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """The parsed config and the class that its `architectures` names. Raises FormatError."""
    import transformers

    kind, version = config["model_type"], transformers.__version__
    if kind not in transformers.CONFIG_MAPPING:
        if "auto_map" in config:
            raise FormatError(f"{path} needs Python code from its own repository, which Lorica does not run.")
        near = did_you_mean(kind, transformers.CONFIG_MAPPING)
        raise FormatError(f"transformers {version} has no architecture {kind!r}, which {path} asks for.{near}")
    try:
        parsed = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise _format(path, error) from error
    names = config.get("architectures") or []
    if not names:
        causal = type(parsed) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        return parsed, transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    cls = getattr(transformers, str(names[0]), None)
    if cls is None:
        raise FormatError(f"transformers {version} has no class {names[0]!r}, which {path} asks for.")
    return parsed, cls


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory. Raises FormatError."""
    import transformers

    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise FormatError(f"The tokenizer in {path} cannot be read: {_first_line(error)}") from error


def check_finite(module: nn.Module, where: Path) -> None:
    """Raises FormatError when a weight is NaN or infinite; networks above `CHECKED` parameters are taken on trust."""
    if sum(p.numel() for p in module.parameters()) > CHECKED:
        return
    for name, parameter in module.named_parameters():
        # a finite sum proves finite terms in one cheap pass; only a suspicious one is looked at closely
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)) and not torch.isfinite(parameter).all():
            raise FormatError(f"{where} holds values that are not finite, in {name!r}.")


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A floating torch dtype; None for "auto". Raises ConfigError."""
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise ConfigError(f"A backbone cannot be loaded as {dtype}; use one of {', '.join(list(DTYPES)[:4])}.")
        return dtype
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise ConfigError(f"There is no dtype {dtype!r}; use auto, {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    return DTYPES[dtype]


def parse_device(device: str) -> torch.device:
    """A device that exists here; `auto` is the GPU where there is one. Raises ConfigError for a name that torch lacks,
    MissingError for an absent one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"There is no device {device!r}; use cpu, cuda, cuda:0 or mps.") from None
    present = {"cpu": True, "meta": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(found.type, True):
        raise MissingError(f"Device {device!r} is not available on this machine.", hint="Use device cpu.")
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers' and the hub's bars and warnings off inside the block, and as they were after it."""
    import huggingface_hub.utils
    import transformers.utils.logging

    hub: Any = huggingface_hub.utils
    logging: Any = transformers.utils.logging
    level, bars, hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()


def _no_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise ConfigError(
            f"{name!r} has no revisions, so revision {revision!r} cannot apply; only hub models have them."
        )


def _format(path: Path, error: Exception) -> LoricaError:
    """The FormatError for whatever transformers raised while reading a checked directory."""
    if isinstance(error, LoricaError):
        return error
    return FormatError(f"transformers cannot load {path}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{(lines or [type(error).__name__])[0].rstrip('.:')}."
