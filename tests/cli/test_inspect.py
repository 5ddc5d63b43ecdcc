"""`lorica inspect`: it tells what is in the files, with and without the base, for Lorica's folders and PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.engine.host import Host
from lorica.methods import all_methods, get_method, make_method
from lorica.models import load

from .conftest import Run

Ask = Callable[..., Any]


@pytest.mark.parametrize("name", list(all_methods()))
def test_the_values_of_any_method_are_counted_without_its_base(ask: Ask, tmp_path: Path, name: str) -> None:
    host = Host(load("tiny-gpt2"))  # it has biases, which bias tuning needs
    small = {"rank": 4} if "rank" in get_method(name).model_fields else {}
    adapter = host.add("a", make_method(name, **small))
    found = ask("inspect", host.save(tmp_path / name, "a"))
    assert found["method"] == name
    assert found["base"]["fingerprint"] == host.backbone.fingerprint()
    assert found["sites"] == len(adapter.layout.sites)
    assert found["values"] == sum(group["values"] for group in found["groups"]) >= adapter.layout.size
    assert (found["peft_type"] is None) == (found["not_peft"] is not None)
    assert found["changes"] is None


def test_the_change_of_the_weights_is_that_of_merging(ask: Ask, run: Run, adapter: Path) -> None:
    found = ask("inspect", adapter, "--model", "nano", "--dtype", "float32")
    backbone = load("nano", dtype="float32")
    before = {name: backbone.weight(name).matrix().clone() for name in backbone.sites if name.endswith("q_proj")}
    host = Host(backbone)
    host.load(adapter, "a")
    host.merge("a")
    moved = [float((backbone.weight(n).matrix() - w).norm() / w.norm()) for n, w in before.items()]
    (change,) = [c for c in found["changes"] if c["role"] == "q_proj"]
    assert change["sites"] == len(moved)
    assert change["largest"] == pytest.approx(max(moved), rel=1e-3)
    assert change["mean"] == pytest.approx(sum(moved) / len(moved), rel=1e-3)
    text = run("inspect", adapter, "--model", "nano", "--dtype", "float32").stdout
    assert "q_proj" in text and "change of the weights" in text


def test_a_prompt_changes_no_weight_and_says_so(run: Run, tmp_path: Path) -> None:
    host = Host(load("tiny-llama"))
    host.add("a", make_method("prompt", tokens=3))
    text = run("inspect", host.save(tmp_path / "p", "a"), "--model", "tiny-llama").stdout
    assert "It changes no weight" in text


def test_a_folder_of_peft_is_shown_with_its_own_settings(ask: Ask, run: Run, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load("tiny-llama")
    torch.manual_seed(0)
    model = peft.get_peft_model(base.module, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "theirs"))
    found = ask("inspect", tmp_path / "theirs")
    assert (found["method"], found["peft_type"], found["sites"]) == (None, "LORA", None)
    assert (found["settings"]["r"], found["settings"]["lora_alpha"]) == (3, 6)
    names = [group["name"] for group in found["groups"]]
    assert names == [
        "model.layers.*.self_attn.q_proj.lora_A.weight",
        "model.layers.*.self_attn.q_proj.lora_B.weight",
    ]
    assert "LORA (written by PEFT)" in run("inspect", tmp_path / "theirs").stdout
