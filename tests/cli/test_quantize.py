"""`--quantize` wherever a model is loaded: train, sample, merge, models; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica.core.errors import ConfigError
from lorica.engine.settings import EngineSettings, parse
from lorica.recipes.config import SFTConfig, read_config
from lorica.server.settings import Settings

from .conftest import Run

Ask = Callable[..., Any]


@pytest.fixture
def adapter(ask: Ask, rows: Path) -> Path:
    """Trained for two steps beside nf4 weights."""
    found = ask("train", "--model", "nano", "--quantize", "nf4", "--data", rows, "--steps", 2, "--out", "run")
    return Path(found["adapter"])


@pytest.mark.slow
def test_train_sample_and_merge_on_packed_weights(ask: Ask, run: Run, refuse: Ask, adapter: Path) -> None:
    config = read_config("run/config.yaml")
    assert config.quantize is not None and str(config.quantize) == "nf4"
    base = json.loads((adapter / "lorica.json").read_text())["base"]
    assert base["quantization"] == "nf4" and base["origin"] != base["fingerprint"]
    packed = ("--model", "nano", "--quantize", "nf4", "--adapter", adapter)
    assert len(ask("sample", *packed, "--prompt", "hello", "--max-tokens", 3)["samples"]) == 1
    error = refuse("sample", "--model", "nano", "--adapter", adapter, "--prompt", "hello")
    assert error["code"] == "mismatch" and "trained beside nf4" in error["message"]
    merged = ask("merge", adapter, "--quantize", "nf4", "--out", "packed")
    assert len(merged["rounding"]) == merged["sites"] > 0
    result = run("merge", adapter, "--quantize", "nf4", "--out", "packed")
    assert "no exact merge" in result.stderr and "of the update" in result.stderr
    full = ask("merge", adapter, "--full", "--out", "full")
    assert full["rounding"] == {} and full["dtype"] == "bfloat16"
    assert ask("models", "packed")["quantization"] == "nf4"
    assert ask("models", "packed")["weight_bytes"] < ask("models", "full")["weight_bytes"]


def test_models_says_what_is_packed(ask: Ask, run: Run) -> None:
    assert ask("models", "tiny-llama")["quantization"] is None
    assert ask("models", "tiny-llama", "--quantize", "nvfp4")["quantization"] == "nvfp4"
    assert "packed as nf4,double=false" in run("models", "tiny-llama", "--quantize", "nf4,double=false").stdout


def test_a_setting_is_read_from_flags_and_files_alike() -> None:
    data = {"path": "rows.jsonl"}
    for value in ("nf4,block=128", {"kind": "nf4", "block": 128}):
        config = SFTConfig(data=data, quantize=value)
        assert config.quantize is not None and config.quantize.block == 128 and config.quantize.double
        assert SFTConfig.parse(config.model_dump(mode="json")) == config
    assert SFTConfig(data=data).quantize is None
    with pytest.raises(ConfigError, match="nf9"):
        SFTConfig(data=data, quantize="nf9")


def test_a_server_hands_the_setting_to_its_engines() -> None:
    assert Settings(models=("nano",), quantize="nf4").quantize == "nf4"
    settings = EngineSettings(model="nano", quantize="nf4,double=false")
    assert parse(["--fd=3", *settings.arguments()])[1].quantize == "nf4,double=false"
