"""Every benchmark runs, and says what it measured with which versions. How fast anything is, no test asserts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "agreement": ["--samples=2", "--tokens=2"],
    "train": ["--width=128", "--rows=2", "--tokens=8", "--rounds=1", "--methods=lora,vera"],
    "native": ["--tenants=2", "--tokens=2", "--rounds=1"],
    "packing": ["--width=128", "--sequences=3", "--rounds=1"],
    "tenants": ["--width=128", "--batches=2x8", "--rounds=1", "--methods=lora,dora"],
    "decode": ["--width=128", "--tokens=2", "--rounds=1", "--tenants=2"],
    "loss_head": ["--vocabularies=500", "--rounds=1"],
    "merging": ["--width=128", "--layers=1"],
    "methods": ["--width=128", "--layers=2", "--rows=2", "--tokens=8", "--rounds=1", "--methods=lora,norm"],
    "quantize": ["--size=128", "--width=128", "--rows=1", "--tokens=8", "--rounds=1"],
    "scale": ["--count=20", "--peft=2", "--rounds=1"],
    "server": ["--tenants=1,2", "--steps=1", "--idle=2", "--samplers=2", "--tokens=2", "--rounds=1"],
}
"""Flags that make each benchmark quick."""


def test_no_benchmark_is_left_out() -> None:
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert files - {"__init__", "models", "timing"} == set(SMALL)


def nested(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of several values."""
    return [value for value in report.values() if isinstance(value, dict)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs_and_prints_one_document(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *SMALL[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {"benchmark", "flags", "device", "threads", "torch", "transformers", "peft"} <= report.keys()
    peers = ("PEFT", "peft", "two products", "bitsandbytes", "torch's operations")
    assert any(peer in key for own in [report, *nested(report)] for key in own for peer in peers)


@pytest.mark.parametrize("name", SMALL)
def test_the_results_name_the_command_that_made_them(name: str) -> None:
    assert f"python -m benchmarks.{name}" in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
