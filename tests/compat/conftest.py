"""A server for each file of tests, over a small Qwen3 with nano's tokenizer: SDKs before 0.28 cannot read a list that
holds an exported checkpoint, so tests that export have another one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from scripts.cookbook.offline import MODEL, build
from scripts.cookbook.served import Served, serve


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("served")
    build(home, lessons=20)
    with serve([MODEL], home) as server:
        yield server
    shutil.rmtree(home, ignore_errors=True)
