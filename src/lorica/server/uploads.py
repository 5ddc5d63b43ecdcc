"""What an uploaded adapter must be before anything else reads it.

In: a folder of files that a stranger sent. Out: its size and settings, or a FormatError: no settings, a header that
does not fit the file, shapes that overlap, values that are not finite. Reads with numpy alone. Refuses to know methods.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorica.core.errors import FormatError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS, "lorica.json")
MOST_HEADER = 64 * 2**20
MOST_CONFIG = 2**20

_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS: dict[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_PIECE = 2**24


@dataclass(frozen=True, slots=True)
class Found:
    size: int
    tensors: int
    opened: dict[str, Any]


def check_folder(folder: Path) -> Found:
    """Raises FormatError."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FormatError(f"{name} was not uploaded.", hint=f"PUT /api/v1/adapters/NAME/files/{name}")
    config = _config(folder / CONFIG)
    tensors = check_safetensors(folder / WEIGHTS)
    size = sum(file.stat().st_size for file in folder.iterdir())
    rank = config.get("r") if isinstance(config.get("r"), int) else None
    settings = {"rank": rank, "alpha": config.get("lora_alpha")}
    return Found(size, tensors, {"method": str(config["peft_type"]).lower(), "rank": rank, "config": settings})


def _config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MOST_CONFIG:
        raise FormatError(f"{path.name} has more than {MOST_CONFIG:,} bytes.")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise FormatError(f"{path.name} is not JSON.") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise FormatError(f"{path.name} is no PEFT configuration: it has no 'peft_type'.")
    return config


def check_safetensors(path: Path) -> int:
    """How many tensors a file holds. Raises FormatError for one whose header and bytes do not agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little") if len(head) == 8 else 0
        if not 2 <= length <= min(MOST_HEADER, size - 8):
            raise FormatError(f"{path.name} is no safetensors file: its header has no possible length.")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise FormatError(f"{path.name} is no safetensors file: its header is not JSON.") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path.name} is no safetensors file: its header is no object.")
    header.pop("__metadata__", None)
    if not header:
        raise FormatError(f"{path.name} holds no tensors.")
    at = 0
    for name, entry in sorted(header.items(), key=lambda pair: _begin(pair[1], path.name)):
        at = _check_entry(path, name, entry, at, 8 + length, size)
    if at != size - 8 - length:
        raise FormatError(f"{path.name} has {size - 8 - length - at} bytes that belong to no tensor.")
    return len(header)


def _begin(entry: Any, name: str) -> int:
    try:
        return int(entry["data_offsets"][0])
    except (TypeError, KeyError, IndexError, ValueError):
        raise FormatError(f"{name} has a tensor without data_offsets.") from None


def _check_entry(path: Path, name: str, entry: Any, at: int, data: int, size: int) -> int:
    """Where the next tensor must begin."""
    offsets, shape, kind = entry.get("data_offsets"), entry.get("shape"), entry.get("dtype")
    where = f"Tensor {name[:200]!r} of {path.name}"
    if kind not in _WIDTH:
        raise FormatError(f"{where} has dtype {str(kind)[:20]!r}, which no adapter has.")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**40 for n in shape) or len(shape) > 8:
        raise FormatError(f"{where} has no possible shape.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise FormatError(f"{where} has no possible place in the file.")
    begin, end = offsets
    if begin != at or end - begin != math.prod(shape) * _WIDTH[kind] or data + end > size:
        raise FormatError(f"{where} does not lie where its header says.")
    _check_finite(path, where, kind, data + begin, end - begin)
    return int(end)


def _check_finite(path: Path, where: str, kind: str, begin: int, length: int) -> None:
    if kind not in _FLOATS and kind != "BF16":
        return
    with path.open("rb") as file:
        file.seek(begin)
        while length > 0:
            piece = file.read(min(_PIECE, length))
            length -= len(piece)
            if kind == "BF16":  # all exponent bits set is infinity or NaN
                bad = ((np.frombuffer(piece, "<u2") & 0x7F80) == 0x7F80).any()
            else:
                bad = not np.isfinite(np.frombuffer(piece, _FLOATS[kind])).all()
            if bad:
                raise FormatError(f"{where} holds values that are not finite.")
