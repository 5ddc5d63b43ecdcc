"""A plain LoRA folder of PEFT, made once and copied for each test that spoils it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest

from tests.parity.both import lora, of_family, peft_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    with warnings.catch_warnings():
        # OLD_CHECKPOINTING: marks do not reach a module's fixtures
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        peft_model(lora("q_proj", "v_proj"), of_family("llama")).save_pretrained(str(folder))
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A plain LoRA folder of PEFT."""
    return shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
