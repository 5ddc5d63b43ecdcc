"""Save and load one adapter as a folder: PEFT's two files, and `lorica.json` with what PEFT has no field for.

In: an adapter or a path, and the backbone. Out: the folder, or the adapter, bit for bit what was saved.
Refuses to know how tensors are named (`peft_format`) and how a folder is replaced (`folder`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import lorica
from lorica.adapters.adapter import Adapter
from lorica.adapters.folder import CONFIG, OWN, WEIGHTS, read_folder, write_folder
from lorica.adapters.layout import Layout
from lorica.adapters.peft_format import decode, encode, from_peft, why_not
from lorica.core.errors import ConfigError, FormatError, MismatchError
from lorica.core.site import Site
from lorica.methods import make_method
from lorica.methods.base import Method
from lorica.models.backbone import Backbone

VERSION = 1
"""Version of `lorica.json`. Readers refuse a later one."""


def save_adapter(adapter: Adapter, backbone: Backbone, path: Path) -> Path:
    """Write an adapter to folder `path`, whole or not at all; what was there before survives a failure.

    The folder holds `adapter_model.safetensors` and `adapter_config.json` as PEFT writes them (for methods that PEFT
    lacks: in a layout of ours with peft_type LORICA, which PEFT refuses), and `lorica.json`. The adapter's name is
    not stored. Raises StorageError when the disk is full or cannot be written, ConfigError for meta that is not JSON.
    """
    tensors, config = encode(adapter, backbone)
    written = write_folder(path, tensors, {CONFIG: config, OWN: record_of(adapter, backbone)})
    adapter.folder = str(path.resolve())
    return written


def record_of(adapter: Adapter, backbone: Backbone) -> dict[str, Any]:
    """What `lorica.json` holds: everything but the values."""
    layout = adapter.layout
    default = layout.method.model_dump(mode="json")
    sites = {}
    for name, method in layout.methods.items():
        own = method.model_dump(mode="json")
        changed = {
            key: value for key, value in own.items() if method.name != layout.method.name or default[key] != value
        }
        sites[name] = changed if method.name == layout.method.name else {"method": method.name, **changed}
    return {
        "format": VERSION,
        "lorica": lorica.__version__,
        "method": layout.method.name,
        "config": default,
        "sites": sites,
        "seed": adapter.seed,
        "forwards": adapter.forwards,
        "dtype": str(adapter.flat.dtype).removeprefix("torch."),
        "base": {
            "fingerprint": adapter.base,
            "name": backbone.name,
            "family": backbone.family,
            "position_scale": backbone.position_scale,
            "quantization": None if backbone.quantization is None else str(backbone.quantization),
            "origin": backbone.origin,
        },
        "not_peft": why_not(adapter, backbone),
        "meta": adapter.meta,
    }


def load_adapter(
    path: Path, backbone: Backbone, name: str, *, from_quantized: bool = False, finite: bool = True
) -> Adapter:
    """Read an adapter folder, Lorica's or PEFT's, for a backbone. Nothing is executed: pickles are refused.

    With `from_quantized`, one is taken too that was trained beside quantised weights of this very backbone. With
    `finite=False`, one is taken whose values are not finite, to be looked at.

    Raises MissingError when there is no folder, FormatError when a file is missing, corrupt or not finite, or a
    setting would have to be ignored, MismatchError when it belongs to another base, MethodError for methods that
    Lorica lacks.
    """
    tensors, config, own = read_folder(path, finite=finite)
    file = path / WEIGHTS
    if own is None:
        adapter = from_peft(config, tensors, backbone, name, file, path / CONFIG)
    else:
        adapter = described(own, backbone, name, path / OWN, from_quantized=from_quantized)
        decode(adapter, config, tensors, backbone, file)
    adapter.folder = str(path.resolve())
    return adapter.to(device=backbone.device)


def described(
    own: Mapping[str, Any], backbone: Backbone, name: str, file: Path, *, from_quantized: bool = False
) -> Adapter:
    """The adapter that a record describes, without its values."""
    version = own.get("format")
    if version != VERSION:
        raise FormatError(
            f"{file} has format {version!r}; this Lorica reads {VERSION}.",
            hint=f"It was written by Lorica {own.get('lorica')}; install that version or a later one.",
        )
    try:
        base, sites = own["base"], own["sites"]
        _check_base(base, backbone, file, from_quantized)
        method = make_method(own["method"], **own["config"])
        if from_quantized and method.restores_rounding and base["fingerprint"] != backbone.fingerprint():
            raise MismatchError(
                f"The {method.name} adapter in {file.parent} holds what packing took from the base, so it cannot act "
                "beside the full weights, which still have that.",
                hint="Merge it into the packed base, or use it unmerged.",
            )
        picked: dict[str, tuple[Site, Method]] = {}
        for site in backbone.sites.values():
            if site.name in sites:
                picked[site.name] = (site, _resolve(method, dict(sites[site.name])))
        absent = [site for site in sites if site not in picked]
        if absent:
            raise MismatchError(f"{file} adapts {absent[0]!r}, which is no site of {backbone.name!r}.")
        dtype = getattr(torch, own["dtype"])
        adapter = Adapter(name, Layout(method, picked), seed=own["seed"], base=base["fingerprint"], dtype=dtype)
        adapter.forwards, adapter.meta = int(own["forwards"]), dict(own["meta"])
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{file} is not as Lorica writes it: {type(error).__name__} at {error}.") from None
    except ConfigError as error:
        raise FormatError(f"{file} holds settings that this Lorica does not take: {error}") from None
    return adapter


def _resolve(method: Method, changes: dict[str, Any]) -> Method:
    if "method" in changes:
        return make_method(changes.pop("method"), **changes)
    return method.replace(**changes) if changes else method


def _check_base(base: Mapping[str, Any], backbone: Backbone, file: Path, from_quantized: bool) -> None:
    scale = base.get("position_scale", 1.0)  # folders of earlier versions know plain positions alone
    if scale != backbone.position_scale:
        raise MismatchError(
            f"The adapter in {file.parent} was trained with positions divided by {scale:g}; this backbone divides them "
            f"by {backbone.position_scale:g}.",
            hint=f"Load the base with position_scale={scale:g} (`--position-scale {scale:g}`).",
        )
    if base["fingerprint"] and base["fingerprint"] != backbone.fingerprint():
        if base.get("origin") and base["origin"] == backbone.fingerprint():
            if from_quantized:
                return
            raise MismatchError(
                f"The adapter in {file.parent} was trained beside {base['quantization']} weights of {base['name']!r}; "
                "this backbone has them in full.",
                hint=f"Load the base with quantize={base['quantization']!r} (`--quantize {base['quantization']}`), or "
                "merge into the full weights with `lorica merge --full`.",
            )
        raise MismatchError(
            f"The adapter in {file.parent} was made for {base['name']!r} ({base['family']}, {base['fingerprint']}); "
            f"this backbone is {backbone.name!r} ({backbone.family}, {backbone.fingerprint()}).",
            hint="An adapter acts on the weights that it was trained beside, and on no others.",
        )
