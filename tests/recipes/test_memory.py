"""The memory estimate against what a run then needs, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorica.cli.main import ENVIRONMENT
from lorica.recipes.config import SFTConfig, to_yaml

CODE = """
import json, sys
from lorica.recipes import memory, sft
from lorica.cli.main import ENVIRONMENT
from lorica.recipes.config import read_config
config = read_config(sys.argv[1])
if sys.argv[2] == "estimate":
    ready = sft.plan(config)
    print(memory.estimate(ready.client, ready.prepared.examples, config.batch_size).total)
else:
    print(sft.run(config).peak_bytes)
"""


@pytest.fixture
def long_rows(tmp_path: Path) -> Path:
    path = tmp_path / "long.jsonl"
    words = "tell me about the weather in the north and the south of the country please "
    turns = [
        [{"role": "user", "content": words * (1 + i % 4)}, {"role": "assistant", "content": words}] for i in range(96)
    ]
    path.write_text("\n".join(json.dumps({"messages": t}) for t in turns), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "lora"}},
        {"method": {"name": "lora"}, "token_budget": 512},
        {"method": {"name": "dora"}},
        {"method": {"name": "delta"}},
        {"method": {"name": "lora"}, "checkpointing": True},
    ],
    ids=["lora", "small micro-batches", "dora", "delta", "checkpointing"],
)
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(
    long_rows: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    values: dict[str, Any] = {"data": {"path": str(long_rows)}, "steps": 6, "batch_size": 48, "token_budget": 4096}
    config = SFTConfig.parse(values | changes | {"out": str(tmp_path / "run")})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    estimated, measured = (
        int(
            subprocess.run(
                [sys.executable, "-c", CODE, str(path), what],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, **ENVIRONMENT},
            ).stdout
        )
        for what in ("estimate", "run")
    )
    assert 0.8 <= estimated / measured <= 1.2
