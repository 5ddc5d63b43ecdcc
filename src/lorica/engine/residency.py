"""Tensors of a run as one file, and which runs keep theirs in memory.

In: named tensors and a JSON record. Out: a safetensors file, whole or not at all, that is checked byte for byte when it
is read; names in the order in which they were used last. No pickle. Refuses to know what the tensors mean.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lorica.core.errors import FormatError, MissingError
from lorica.core.storage import replacing_file, storage

FORMAT = 1
"""Version of state files. Readers refuse a later one."""
RECORD = "lorica"
MOST_HEADER = 2**27


@dataclass(frozen=True, slots=True)
class State:
    """Tensors by name, in the host's memory, and a JSON record."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]

    @property
    def size(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.tensors.values())


def write_state(path: Path, state: State, *, durable: bool = True) -> int:
    """Write a state file; returns its bytes. One that is not durable a power cut may lose. Raises StorageError."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.tensors.items()}
    record = {**state.record, "format": FORMAT, "checksum": _checksum(tensors)}
    content = save_tensors(tensors, {RECORD: json.dumps(record, sort_keys=True)})
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if durable:
            with replacing_file(path) as file:
                file.write(content)
        else:
            path.write_bytes(content)
    return len(content)


def read_state(path: Path) -> State:
    """Raises MissingError where there is none, FormatError for one that is not as it was written."""
    content = _read(path)
    record = _record(content, path)
    try:
        tensors: dict[str, Tensor] = load_tensors(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise FormatError(f"{path} is corrupt or cut short: {str(error).splitlines()[0]}.") from None
    if record.pop("checksum", None) != _checksum(tensors):
        raise FormatError(f"{path} is corrupt: its tensors are not those that were written.")
    return State(tensors, record)


def read_record(path: Path) -> dict[str, Any]:
    """The record alone, without the tensors. Raises MissingError, FormatError."""
    return _record(_read(path, header=True), path)


def _read(path: Path, *, header: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if not header:
                return start + file.read()
            return start + (file.read(length) if length <= MOST_HEADER else b"")
    except FileNotFoundError:
        raise MissingError(f"There is no file {path} to continue a run from.") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}.") from None


def _record(content: bytes, path: Path) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    try:
        if len(content) < 8 + length or length > MOST_HEADER:
            raise ValueError("it is shorter than its header says")
        record = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][RECORD])
        version = record.pop("format")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is corrupt or no state of a run: {type(error).__name__}, {error}.") from None
    if version != FORMAT:
        raise FormatError(f"{path} has format {version!r}; this Lorica reads {FORMAT}.")
    assert isinstance(record, dict)
    return record


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Of names and bytes."""
    total = 0
    for name in sorted(tensors):
        value = tensors[name]
        total = zlib.crc32(f"{name}{tuple(value.shape)}{value.dtype}".encode(), total)
        if value.numel():
            total = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, total)
    return total


class Recent:
    """Names, at most `limit` of them, least recently used first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._names: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def use(self, name: str) -> None:
        self._names[name] = None
        self._names.move_to_end(name)

    def drop(self, name: str) -> None:
        self._names.pop(name, None)

    def surplus(self, room: int = 0, keep: Collection[str] = ()) -> list[str]:
        """Names that must go so that `room` more are within the limit, as far as none of `keep` is touched."""
        count = len(self._names) + room - self.limit
        return [name for name in self._names if name not in keep][: max(count, 0)]
