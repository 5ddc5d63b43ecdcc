"""A folder of directions: `directions.safetensors` with a vector for each layer, `directions.json` with how they were
made.

In: directions, or a path. Out: the folder, or the directions bit for bit. Refuses to know models and what the values
say.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lorica.adapters.analysis.directions import Directions
from lorica.adapters.folder import read_json, read_tensors, write_folder
from lorica.core.errors import FormatError, MethodError, MissingError

WEIGHTS = "directions.safetensors"
RECORD = "directions.json"
VERSION = 1
PREFIX = "layer."


def save_directions(directions: Directions, path: Path) -> Path:
    """Write a folder, whole or not at all. Raises StorageError, and ConfigError for an `about` that is not JSON."""
    tensors = {f"{PREFIX}{layer}": directions.vectors[layer].double() for layer in directions.layers}
    record = {
        "format": VERSION,
        "layers": list(directions.layers),
        "norms": {str(layer): norm for layer, norm in directions.norms().items()},
        "about": dict(directions.about),
    }
    return write_folder(path, tensors, {RECORD: record}, weights=WEIGHTS)


def load_directions(path: Path) -> Directions:
    """Read such a folder. Raises MissingError where there is none, FormatError where a file is missing or corrupt."""
    if not (path / RECORD).is_file():
        raise MissingError(
            f"There are no directions at {path}: {RECORD} is missing.", hint="`lorica directions extract` makes some."
        )
    record, tensors = read_json(path / RECORD), read_tensors(path / WEIGHTS)
    if record.get("format") != VERSION:
        raise FormatError(f"{path / RECORD} has format {record.get('format')!r}; this Lorica reads {VERSION}.")
    layers, about = record.get("layers"), record.get("about")
    if not isinstance(layers, list) or set(tensors) != {f"{PREFIX}{n}" for n in layers} or not isinstance(about, dict):
        raise FormatError(f"{path / RECORD} does not describe what {WEIGHTS} holds.")
    try:
        return Directions({int(layer): tensors[f"{PREFIX}{layer}"].to(torch.float64) for layer in layers}, about)
    except (MethodError, ValueError) as error:
        raise FormatError(f"{path / WEIGHTS} holds no directions: {error}") from None
