"""Configs: one YAML and overrides, and errors that say what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorica.core.errors import ConfigError, MethodError, MissingError
from lorica.recipes.config import SFTConfig, read_config, to_yaml

DATA = {"data": {"path": "rows.jsonl"}}


def test_overrides_reach_nested_fields_and_keep_their_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: {path: rows.jsonl}\noptimizer: {lr: 0.5, clip: 2.0}\n")
    config = read_config(path, ["optimizer.lr=1e-3", "method.name=dora", "method.rank=4", "steps=7"])
    assert (config.optimizer.lr, config.optimizer.clip) == (1e-3, 2.0)
    assert config.make_method().name == "dora"
    assert config.steps == 7


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-3", 1e-3), ("null", None), ("[a, b]", ["a", "b"]), ("true", True), ("q_proj", "q_proj")],
)
def test_override_values_are_yaml(text: str, value: object) -> None:
    assert (
        read_config(None, [f"method.x={text}", "method.name=lora"][1:], DATA | {"method": {"rank": 1}}).method["rank"]
        == 1
    )
    got = yaml.safe_load(to_yaml(SFTConfig.parse(DATA)))
    assert "x" not in got["method"]
    from lorica.recipes import config as module

    assert module.read_value(text) == value


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("optimizer.learning_rate=1", "lr"),
        ("optimiser.lr=1", "optimizer"),
        ("stepz=3", "steps"),
        ("data.pth=x", "path"),
    ],
)
def test_an_unknown_key_names_its_nearest_neighbour(override: str, near: str) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean|Its settings are") as caught:
        read_config(None, [override], DATA)
    assert near in str(caught.value)


@pytest.mark.parametrize("override", ["steps", "=3", "optimizer.lr.deep=1"])
def test_a_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"key=value|holds a plain value"):
        read_config(None, [override], DATA | {"optimizer": {"lr": 0.1}})


def test_an_unknown_method_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises((ConfigError, MethodError), match="lora"):
        read_config(None, ["method.name=loar"], DATA)


def test_a_method_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs 'name'"):
        SFTConfig.parse(DATA | {"method": {"rank": 4}})


def test_a_missing_file_and_broken_yaml_are_one_sentence_each(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no config file"):
        read_config(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_config(bad)
    bad.write_text("- a")
    with pytest.raises(ConfigError, match="must hold settings"):
        read_config(bad)


def test_the_resolved_config_reads_back_as_itself() -> None:
    config = SFTConfig.parse(DATA | {"method": {"name": "vera", "rank": 8}, "steps": 3})
    assert SFTConfig.parse(yaml.safe_load(to_yaml(config))) == config
