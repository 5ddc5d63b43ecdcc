"""The folder that holds an adapter: written whole or not at all, read without trusting it.

In: named tensors and JSON records. Out: a folder of three files, or what such a folder holds, with every value finite.
Pickle is never read. Refuses to know methods, sites and what the names mean.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lorica.core.errors import ConfigError, FormatError, MissingError, StorageError
from lorica.core.storage import replacing_folder, storage
from lorica.core.update import all_finite

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
OWN = "lorica.json"


def write_folder(
    path: Path, tensors: Mapping[str, Tensor], records: Mapping[str, Mapping[str, Any]], *, weights: str = WEIGHTS
) -> Path:
    """Replace folder `path` by one with these tensors (in the file `weights`) and JSON records; other files in it are
    kept.

    It appears whole or not at all (`core.storage`), so a full disk leaves the previous folder as it was. Raises
    StorageError when the folder cannot be written, ConfigError for a value that is not JSON.
    """
    shown, path = path, path.resolve()
    contents = {name: _json_bytes(name, record) for name, record in records.items()}
    contents[weights] = save_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"format": "pt"})
    if path.exists() and not path.is_dir():
        raise StorageError(f"Cannot write {shown}: it is a file, and a folder is to be written.")
    with storage(shown), replacing_folder(path) as folder:
        if path.is_dir():
            _keep_others(path, folder, set(contents))
        for name, content in contents.items():
            (folder / name).write_bytes(content)
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


def read_folder(path: Path, *, finite: bool = True) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]:
    """The tensors, the PEFT config and Lorica's record (None in a folder that PEFT wrote).

    With `finite=False`, values that are not finite are given as they are, to be looked at. Raises MissingError when
    there is no such folder, FormatError for missing, corrupt or (else) non-finite content.
    """
    config, own = read_records(path)
    return _read_tensors(path, finite), config, own


def read_records(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The PEFT config and Lorica's record, without the tensors. Raises MissingError, FormatError as `read_folder`."""
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise MissingError(f"There is no adapter at {path}: it {what}.", hint=f"An adapter folder holds {CONFIG}.")
    if not (path / CONFIG).is_file():
        inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
        hint = f"Adapters are in its sub-folders: {', '.join(inside)}." if inside else None
        raise FormatError(f"{path} is no adapter folder: {CONFIG} is missing.", hint=hint)
    return read_json(path / CONFIG), read_json(path / OWN) if (path / OWN).is_file() else None


def base_name(path: Path) -> str:
    """The name of the base that an adapter folder was made on. Raises FormatError where it says none, and as above."""
    config, own = read_records(path)
    name = ((own or {}).get("base") or {}).get("name") or config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise FormatError(f"The adapter in {path} does not say which model it belongs to.", hint="Name it by --model.")
    return name


def _read_tensors(path: Path, finite: bool) -> dict[str, Tensor]:
    file = path / WEIGHTS
    if not file.is_file():
        pickled = sorted(p.name for p in path.glob("*.bin"))
        if pickled:
            raise FormatError(
                f"{path / pickled[0]} is a pickle, which can run code when it is read; Lorica reads {WEIGHTS} only.",
                hint="Load it with PEFT where you trust it, and save it again with safe_serialization=True.",
            )
        raise FormatError(f"{path} is no adapter folder: {WEIGHTS} is missing.")
    return read_tensors(file, finite=finite)


def read_tensors(file: Path, *, finite: bool = True) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises FormatError when it is corrupt or, with `finite`, a value is not."""
    try:
        tensors: dict[str, Tensor] = load_tensors(file.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise FormatError(f"{file} is corrupt or cut short: {str(error).splitlines()[0]}.") from None
    except OSError as error:
        raise FormatError(f"{file} cannot be read: {error.strerror or error}.") from None
    wrong = all_finite({k: v for k, v in tensors.items() if v.is_floating_point()}) if finite else None
    if wrong is not None:
        raise FormatError(f"Tensor {wrong!r} of {file} holds NaN or infinity; every value must be finite.")
    return tensors
