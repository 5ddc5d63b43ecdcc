"""`lorica methods`, `lorica models`, `lorica data show`: what they list is what there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica.methods import all_methods
from lorica.models import load, names

from .conftest import Run

Ask = Callable[..., Any]


def test_methods_lists_the_registry(ask: Ask, run: Run) -> None:
    found = ask("methods")
    assert [m["name"] for m in found] == list(all_methods())
    text = run("methods").stdout
    for method in found:
        assert method["name"] in text
        assert method["paper"]["arxiv"] in text


@pytest.mark.parametrize("name", list(all_methods()))
def test_a_method_shows_every_setting_with_default_and_description(ask: Ask, run: Run, name: str) -> None:
    found, text = ask("methods", name), run("methods", name).stdout
    fields = all_methods()[name].model_fields
    assert [f["name"] for f in found["fields"]] == list(fields)
    for field in found["fields"]:
        assert field["description"] == fields[field["name"]].description
        assert field["description"] in text
        assert field["type"] not in ("None", "?")


def test_a_method_that_does_not_merge_says_so(ask: Ask) -> None:
    merges = {m["name"]: m["merges"] for m in ask("methods")}
    assert merges["lora"] and merges["norm"]
    assert not merges["prefix"] and not merges["prompt"]


def test_models_lists_the_built_in_names(ask: Ask, run: Run) -> None:
    assert ask("models")["builtin"] == names()
    assert all(name in run("models").stdout for name in names())


def test_a_model_shows_its_sites(ask: Ask, run: Run) -> None:
    backbone = load("tiny-llama")
    found = ask("models", "tiny-llama")
    assert [s["name"] for s in found["sites"]] == list(backbone.sites)
    assert found["fingerprint"] == backbone.fingerprint()
    assert found["parameters"] == sum(p.numel() for p in backbone.module.parameters())
    assert "q_proj" in run("models", "tiny-llama").stdout
    assert "model.layers.0.self_attn.q_proj" in run("models", "tiny-llama", "--all").stdout


def test_data_show_tells_shape_statistics_and_the_first_row(ask: Ask, run: Run, rows: Path) -> None:
    found = ask("data", "show", rows)
    assert (found["shape"], found["rows"]) == ("messages", 16)
    assert 0 < found["trained_tokens"] < found["tokens"]
    assert found["truncation"]["tokens_lost"] == 0
    text = run("data", "show", rows).stdout
    assert "because all 16 rows have 'messages'" in text
    assert "⟦alarm 0<|im_end|>⟧" in text


def test_data_show_tokens_marks_what_is_trained(ask: Ask, run: Run, rows: Path) -> None:
    found = ask("data", "show", rows, "--tokens", "-n", 2)
    assert len(found["examples"]) == 2
    example = found["examples"][1]
    trained = "".join(p for p, w in zip(example["pieces"], example["weights"], strict=True) if w)
    assert trained == "alarm 1<|im_end|>"
    assert run("data", "show", rows, "--tokens", "-n", 5).stdout.count("⟦") == 5


def test_data_show_reports_what_a_limit_costs(ask: Ask, rows: Path) -> None:
    found = ask("data", "show", rows, "--max-length", 16)
    assert found["truncation"]["tokens_lost"] > 0
    assert len(found["truncation"]["rows"]) + len(found["truncation"]["dropped"]) == 16
