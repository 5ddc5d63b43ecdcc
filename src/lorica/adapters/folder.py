"""The folder that holds an adapter: written whole or not at all, read without trusting it.

In: named tensors and JSON records. Out: a folder of three files, or what such a folder holds, with every value finite.
Pickle is never read. Refuses to know methods, sites and what the names mean.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lorica.core.errors import ConfigError, FormatError, MissingError, StorageError
from lorica.core.update import all_finite

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
OWN = "lorica.json"


def write_folder(path: Path, tensors: Mapping[str, Tensor], records: Mapping[str, Mapping[str, Any]]) -> Path:
    """Replace folder `path` by one with these tensors and JSON records; other files in it are kept.

    Everything goes to a hidden sibling folder first, is flushed to the disk, and is renamed into place last, so a full
    disk leaves the previous folder as it was. A kill between the two renames leaves it as `.<name>.….previous`.
    Raises StorageError when the folder cannot be written, ConfigError for a value that is not JSON.
    """
    shown, path = path, path.resolve()
    contents = {name: _json_bytes(name, record) for name, record in records.items()}
    contents[WEIGHTS] = save_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"format": "pt"})
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise StorageError(f"Cannot save the adapter to {shown}: it is a file, not a folder.")
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        if path.is_dir():
            shutil.copymode(path, partial)
            _keep_others(path, partial, set(contents))
        else:
            partial.chmod(0o777 & ~_umask())
        for name, content in contents.items():
            _write(partial / name, content)
        _sync(partial)
        _swap(partial, path)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        cause = error.strerror or type(error).__name__
        raise StorageError(
            f"Cannot save the adapter to {shown}: {cause}; what was there before is untouched.",
            hint="Free some space, or choose another folder.",
        ) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return shown


def _json_bytes(name: str, record: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} cannot hold this adapter's settings or meta: {error}.") from None


def _keep_others(old: Path, new: Path, replaced: set[str]) -> None:
    """Hard links to the files of the old folder that are not written anew: nothing is copied."""
    shutil.copytree(
        old,
        new,
        dirs_exist_ok=True,
        symlinks=True,
        copy_function=os.link,
        ignore=lambda folder, names: replaced & set(names) if Path(folder) == old else set(),
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make a folder's entries durable, where the system can (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`. No folder can replace another at once: the old one steps aside, and returns on
    failure.
    """
    if not path.exists():
        partial.rename(path)
    else:
        aside = path.rename(partial.with_suffix(".previous"))
        try:
            partial.rename(path)
        except OSError:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FormatError naming the file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(record, dict):
        raise FormatError(f"{path} holds a {type(record).__name__}; a JSON object is right.")
    return record


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]:
    """The tensors, the PEFT config and Lorica's record (None in a folder that PEFT wrote).

    Raises MissingError when there is no such folder, FormatError for missing, corrupt or non-finite content.
    """
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise MissingError(f"There is no adapter at {path}: it {what}.", hint=f"An adapter folder holds {CONFIG}.")
    if not (path / CONFIG).is_file():
        inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
        hint = f"Adapters are in its sub-folders: {', '.join(inside)}." if inside else None
        raise FormatError(f"{path} is no adapter folder: {CONFIG} is missing.", hint=hint)
    config = read_json(path / CONFIG)
    own = read_json(path / OWN) if (path / OWN).is_file() else None
    return _read_tensors(path), config, own


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS
    if not file.is_file():
        pickled = sorted(p.name for p in path.glob("*.bin"))
        if pickled:
            raise FormatError(
                f"{path / pickled[0]} is a pickle, which can run code when it is read; Lorica reads {WEIGHTS} only.",
                hint="Load it with PEFT where you trust it, and save it again with safe_serialization=True.",
            )
        raise FormatError(f"{path} is no adapter folder: {WEIGHTS} is missing.")
    try:
        tensors: dict[str, Tensor] = load_tensors(file.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise FormatError(f"{file} is corrupt or cut short: {str(error).splitlines()[0]}.") from None
    except OSError as error:
        raise FormatError(f"{file} cannot be read: {error.strerror or error}.") from None
    wrong = all_finite({k: v for k, v in tensors.items() if v.is_floating_point()})
    if wrong is not None:
        raise FormatError(f"Tensor {wrong!r} of {file} holds NaN or infinity; every value must be finite.")
    return tensors
