from __future__ import annotations

from pathlib import Path

import pytest

from lorica.core.errors import DataError
from lorica.data.everyday import SPLITS, everyday_path, resolve
from lorica.data.records import load_records
from lorica.data.render import Renderer


@pytest.mark.parametrize("split", SPLITS)
def test_every_shipped_split_loads_by_name_and_renders(renderer: Renderer, split: str) -> None:
    data = load_records(f"everyday:{split}")
    assert data.path == str(everyday_path(split))
    assert data.shape.name == "messages"
    assert all(renderer.example(record).trained for record in data.records[:50])


def test_the_bare_name_is_the_training_split_and_paths_stay_paths() -> None:
    assert resolve("everyday") == everyday_path("train")
    assert resolve("data/x.jsonl") == Path("data/x.jsonl")


def test_an_unknown_split_names_its_nearest_neighbour() -> None:
    with pytest.raises(DataError, match="no split 'tran'.*Did you mean 'train'"):
        load_records("everyday:tran")
