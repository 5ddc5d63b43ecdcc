"""A small data file and a small run's config, for every test of the recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica.recipes.config import SFTConfig

TIMES = ("7 pm", "8 am", "noon", "half past six")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of 24 chat rows of several lengths."""
    path = tmp_path / "rows.jsonl"
    lines = []
    for i in range(24):
        time = TIMES[i % 4]
        words = f"please wake me at {time}" + " tomorrow" * (i % 3)
        turns = [{"role": "user", "content": words}, {"role": "assistant", "content": f"alarm {time}"}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def config(rows: Path, tmp_path: Path, small: str) -> Callable[..., SFTConfig]:
    """Make a config of a few steps on a small model; keywords change it."""

    def make(**changes: Any) -> SFTConfig:
        values: dict[str, Any] = {
            "model": small,
            "data": {"path": str(rows)},
            "method": {"name": "lora", "rank": 4, "dropout": 0.1},
            "out": str(tmp_path / "run"),
            "steps": 6,
            "batch_size": 4,
            "token_budget": 64,
            "save_every": 2,
        }
        return SFTConfig.parse(values | changes)

    return make
