"""Saving a merged model as an ordinary model directory.

In: a backbone whose weights an adapter was merged into. Out: a directory that loads without Lorica.
Refuses to know how a model directory is written: `models` does.
"""

from __future__ import annotations

from pathlib import Path

from lorica.models.backbone import Backbone
from lorica.models.saving import save_backbone


def save_merged(backbone: Backbone, path: str | Path) -> Path:
    """Write the backbone's weights as they are now, with config, generation settings and tokenizer; returns the path.

    `transformers.AutoModelForCausalLM.from_pretrained` and `lorica.load` read it with the same logits, in the dtype it
    was saved in. The directory appears whole or not at all. Raises MethodError for a network that is no transformers
    model, StorageError for a full disk or a path that cannot be written.
    """
    return save_backbone(backbone, path)
