"""What a directory must hold to be a model: checked before transformers sees it, so that each fault has its own
sentence.

In: a path. Out: its parsed `config.json`; or MissingError for what is absent and FormatError for what is broken.
Only headers of weight files are read. Refuses to know model classes and tensors.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from lorica.core.errors import FormatError, MissingError

CONFIG = "config.json"
LINEAGE = "lorica_lineage.json"
"""What the weights were made from, where Lorica made them; opaque here."""
SINGLE = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def check_directory(path: Path) -> dict[str, Any]:
    """The model's config as a dictionary. Raises MissingError and FormatError."""
    config = read_config(path)
    for file in weight_files(path):
        if not file.is_file():
            raise MissingError(f"{path} lacks {file.name!r}, which its index names.", hint="Copy or download it again.")
        if file.suffix == ".safetensors":
            check_safetensors(file)
    return config


def read_config(path: Path) -> dict[str, Any]:
    """`config.json`, with a model type. Raises MissingError and FormatError."""
    file = path / CONFIG
    if not file.is_file():
        raise MissingError(f"{path} has no {CONFIG}, so it is not a model directory.", hint=_adapter_hint(path))
    config = _json(file)
    if not isinstance(config.get("model_type"), str):
        raise FormatError(f"{file} names no 'model_type', such as \"llama\".")
    return config


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights; shards as the index names them. Raises MissingError and FormatError."""
    for name in SINGLE:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = _json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise FormatError(f"{index} has no 'weight_map' from tensor names to files.")
            return [path / shard for shard in sorted(set(shards.values()))]
    raise MissingError(f"{path} has no weights: neither {SINGLE[0]!r} nor its index is there.")


def check_safetensors(file: Path) -> None:
    """Raises FormatError when the header is broken or the file is shorter or longer than the header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise FormatError(f"{file} is truncated or no safetensors file: its header does not fit into {size} bytes.")
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise FormatError(f"{file} is corrupt: its safetensors header is not readable.") from None
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise FormatError(
            f"{file} is {'truncated' if size < wanted else 'corrupt'}: {size} bytes, and its header says {wanted}."
        )


def read_lineage(path: Path) -> dict[str, Any] | None:
    """What a directory says that its weights were made from; None where it says nothing. Raises FormatError."""
    file = path / LINEAGE
    return _json(file) if file.is_file() else None


def has_tokenizer(path: Path) -> bool:
    """Whether a tokenizer lies beside the weights."""
    return any((path / name).is_file() for name in TOKENIZERS)


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise FormatError(f"{file} is corrupt: it is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"{file} is corrupt: line {error.lineno} is not JSON ({error.msg}).") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file} is corrupt: it holds a {type(value).__name__}, not an object.")
    return value


def _adapter_hint(path: Path) -> str | None:
    if (path / "adapter_config.json").is_file():
        return "It looks like an adapter: load its base model first, then the adapter."
    return None
