"""The script behind the figures of the method pages measures what it says."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

import lorica
from scripts.docs import measure_methods
from scripts.docs.markdown import put


@pytest.fixture
def rows(tmp_path):
    """A data file of a few conversations."""
    path = tmp_path / "rows.jsonl"
    talks = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{{n: {n}}}"}] for n in range(12)
    ]
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks), encoding="utf-8")
    return str(path)


def test_nano_with_zero_biases_is_the_same_function_and_can_be_bias_tuned(tmp_path):
    plain = lorica.load("nano", dtype="float32")
    biased = lorica.load(str(measure_methods.with_biases(tmp_path / "biased")), dtype="float32")
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        assert torch.equal(plain.module(input_ids=ids).logits, biased.module(input_ids=ids).logits)
    assert sum(site.bias for site in biased.sites.values()) > sum(site.bias for site in plain.sites.values())


def test_text_is_put_between_markers_and_nowhere_else():
    page = "a\n<!-- x:begin -->old<!-- x:end -->\nb\n"
    once = put(page, "x", "new")
    assert once == "a\n<!-- x:begin -->\n\nnew\n\n<!-- x:end -->\nb\n"
    assert put(once, "x", "new") == once
    with pytest.raises(ValueError, match="y:begin"):
        put(page, "y", "new")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ia3", "prompt", "bias"])
def test_a_method_is_measured_from_training_to_answers(name, rows, tmp_path):
    args = argparse.Namespace(steps=3, batch_size=4, rows=2, pairs=2, data=rows, test=rows)
    entry = measure_methods.measure(name, args, tmp_path)
    assert entry["parameters"] > 0 and 0 <= entry["exact"] <= entry["rows"] == 2
    assert entry["step_time_over_lora"] > 0 and entry["loss"] == pytest.approx(entry["first_loss"])  # three steps
