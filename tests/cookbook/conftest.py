"""The cookbook's Python, the offline working directory, and a server over its two models."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.cookbook.offline import MODEL, TEACHER, build
from scripts.cookbook.served import Served, serve

NEEDED = "cookbook recipes need tinker_cookbook: see tests/requirements-slow.txt, or set LORICA_COOKBOOK_PYTHON"


@pytest.fixture(scope="session")
def python() -> str:
    """An interpreter with tinker-cookbook: the one that LORICA_COOKBOOK_PYTHON names, or this one."""
    named = os.environ.get("LORICA_COOKBOOK_PYTHON")
    if named is None:
        if importlib.util.find_spec("tinker_cookbook") is None:
            pytest.skip(NEEDED)
        return sys.executable
    found = subprocess.run([named, "-c", "import tinker_cookbook"], capture_output=True, check=False)
    assert found.returncode == 0, f"LORICA_COOKBOOK_PYTHON={named} cannot import tinker_cookbook: {found.stderr!r}"
    return named


@pytest.fixture(scope="session")
def folder(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Made once; a recipe runs with it as its working directory."""
    made = build(tmp_path_factory.mktemp("cookbook"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="session")
def served(folder: Path) -> Iterator[Served]:
    with serve([MODEL, TEACHER], folder) as server:
        yield server
