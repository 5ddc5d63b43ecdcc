"""What must be refused: an error of one sentence that names the folder, and a plain folder to spoil.

In: a folder of PEFT's. Out: the error, edits of its config and tensors. Refuses to know which edits there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorica.core.errors import LoricaError
from tests.parity.both import Make, loaded, of_family

LLAMA = of_family("llama")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
"""The name in a file of the first projection of Llama."""


def refused(error: type[LoricaError], words: str, folder: Path, make: Make = LLAMA) -> LoricaError:
    """The error of loading a folder: one sentence, which names it."""
    with pytest.raises(error, match=words) as caught:
        loaded(folder, make)
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?")) and str(folder) in message
    return caught.value


def configure(folder: Path, **fields: Any) -> None:
    written = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**written, **fields}))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
