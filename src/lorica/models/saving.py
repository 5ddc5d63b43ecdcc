"""Saving a backbone as a model directory: config, safetensors, generation settings, tokenizer.

In: a backbone and a path. Out: a directory that transformers and `models.load` read; it appears whole or not at all.
Refuses to know adapters, and to replace a directory that holds anything but a model.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from lorica.core.errors import FormatError, MethodError, StorageError
from lorica.core.storage import replacing_folder, storage
from lorica.models.backbone import Backbone
from lorica.models.directory import CONFIG, LINEAGE
from lorica.models.loading import quiet
from lorica.models.quantize.directory import described

KNOWN = frozenset(
    {CONFIG, LINEAGE, "generation_config.json", "model.safetensors.index.json", "chat_template.jinja", "tokenizer.json"}
    | {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"}
    | {"tokenizer.model", "preprocessor_config.json", "README.md"}
)
"""Files of a model directory, beside its weights, that a new one may replace."""


def save_backbone(backbone: Backbone, path: str | Path) -> Path:
    """Write the network as it is now, in its dtype and with packed weights packed, and return the directory. What is
    known of where its weights come from is beside them, in `lorica_lineage.json`.

    It is written beside `path` and renamed, so a full disk or a kill leaves what was there before. An earlier model
    directory is replaced. Raises MethodError for a network that is no transformers model, StorageError for a disk that
    is full, a path that cannot be written, or a directory that holds other files.
    """
    target = Path(path).expanduser()
    module = backbone.module
    if not hasattr(module, "save_pretrained"):
        raise MethodError(
            f"{backbone.name!r} is no transformers model, so there is no model directory for it.",
            hint="Save its state_dict() with torch or safetensors.",
        )
    odd = next((name for name, p in module.named_parameters() if p.device.type == "meta"), None)
    if odd is not None:
        raise StorageError(f"Parameter {odd!r} is on the meta device, so there are no values to save.")
    _check_target(target)
    tokenizer = backbone.tokenizer
    # safetensors reports a full disk in an error of its own
    with storage(target, SafetensorError), replacing_folder(target) as folder:
        try:
            with quiet(), torch.no_grad(), described(backbone):
                module.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
                if backbone.lineage is not None:
                    (folder / LINEAGE).write_text(json.dumps(backbone.lineage, indent=2) + "\n", encoding="utf-8")
        except (TypeError, ValueError, NotImplementedError) as error:
            raise FormatError(f"transformers cannot write {backbone.name!r}: {str(error).splitlines()[0]}") from error
    return target


def _check_target(path: Path) -> None:
    """Raises StorageError where something stands that is not ours to replace."""
    if path.exists() and not path.is_dir():
        raise StorageError(f"{path} is a file; a model is saved as a directory.", hint="Choose another path.")
    if path.is_dir():
        other = sorted(p.name for p in path.iterdir() if p.name not in KNOWN and not _is_weights(p))
        if other:
            raise StorageError(
                f"{path} holds {other[0]!r}, which is no part of a model, so it is not replaced.",
                hint="Choose a new or an empty directory.",
            )


def _is_weights(path: Path) -> bool:
    return path.is_file() and path.suffix == ".safetensors" and path.name.startswith("model")
