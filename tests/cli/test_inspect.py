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


# -- the analysis ---------------------------------------------------------------------------------------------------


def random_lora(folder: Path, seed: int) -> Path:
    """A LoRA of random values on a tiny model."""
    host = Host(load("tiny-llama"))
    made = host.add("a", make_method("lora", rank=3))
    made.flat.copy_(0.1 * torch.randn(made.flat.shape, generator=torch.Generator().manual_seed(seed)))
    return host.save(folder, "a")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return random_lora(tmp_path / "small", 0)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return random_lora(tmp_path / "other", 1)


def test_without_a_base_factors_are_measured_and_with_one_everything_is(ask: Ask, run: Run, adapter: Path) -> None:
    alone = ask("inspect", adapter)["analysis"]
    based = ask("inspect", adapter, "--base", "nano", "--dtype", "float32")["analysis"]
    assert alone["base"] is None and based["base"] == "nano"
    sizes = {site["site"]: site["norm"] for site in alone["sites"]}
    assert sizes == pytest.approx({site["site"]: site["norm"] for site in based["sites"]}, rel=1e-6)
    assert all(site["relative"] is None for site in alone["sites"]) and based["sites"][0]["relative"] > 0
    assert [group["name"] for group in based["layers"]] == ["0", "1", "2", "3", "4", "5"]
    text = run("inspect", adapter, "--sites").stdout
    assert "model.layers.5.mlp.down_proj" in text and "what this cannot say" in text
    assert max(map(len, text.partition("change of the weights")[2].splitlines())) <= 100


def test_an_adapter_that_needs_its_base_says_so_and_its_files_are_shown(ask: Ask, run: Run, tmp_path: Path) -> None:
    host = Host(load("tiny-llama"))
    host.add("v", make_method("vera", rank=4))
    host.add("d", make_method("dora", rank=2))
    text = run("inspect", host.save(tmp_path / "v", "v")).stdout
    assert "VERA" in text or "vera" in text
    assert "not analysed: The files in" in text and "Give the base (`--base`)." in text
    assert ask("inspect", tmp_path / "v")["analysis"] is None
    text = run("inspect", host.save(tmp_path / "d", "d")).stdout
    assert "14 sites changed in a way that depends on the base: not measured without --base." in text
    assert "no change was measured" in text


def test_values_that_are_not_finite_are_reported_and_nothing_crashes(ask: Ask, run: Run, tmp_path: Path) -> None:
    host = Host(load("tiny-llama"))
    made = host.add("a", make_method("lora", rank=2))
    made.flat.fill_(0.01)
    site = list(made.layout.sites)[3]
    made.tensors(site)["B"].data[0] = float("nan")
    folder = host.save(tmp_path / "broken", "a")
    for more in ((), ("--base", "tiny-llama", "--intruders", "--no-cache")):
        found = ask("inspect", folder, *more)
        (wrong,) = [one for one in found["analysis"]["anomalies"] if one["kind"] == "not finite"]
        assert wrong["site"] == site and wrong["says"].startswith("2 NaN of ")
        assert sum(group["not_finite"] for group in found["groups"]) == 2
        assert len(found["analysis"]["sites"]) == 13
    text = run("inspect", folder).stdout
    assert f"{site}: 2 NaN of" in text and "not finite" in text


def test_adapters_are_compared_and_everything_is_drawn(ask: Ask, run: Run, small: Path, other: Path) -> None:
    words = ("inspect", small, "--against", other, "--base", "tiny-llama", "--intruders", "--cache", "kept")
    found = ask(*words, "--plots", "drawn")
    (pair,) = found["analysis"]["similarity"]
    assert (pair["first"], pair["second"], pair["shared"]) == (str(small), str(other), 14)
    names = ["spectrum", "norms", "similarity", "intruders"]
    assert found["plots"] == [f"drawn/{name}.png" for name in names]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in found["plots"])
    assert len(list(Path("kept").glob("*/*.safetensors"))) == 14
    text = run(*words).stdout
    assert "φ output (chance)" in text and "intruder dimensions: " in text and f"B  {other}" in text
    alone = ask("inspect", small, "--against", other)["analysis"]["similarity"]
    assert alone[0]["cosine"] == pytest.approx(pair["cosine"], abs=1e-6)


def test_scaled_intruders_are_written_as_an_adapter_that_knows_its_parent(ask: Ask, other: Path) -> None:
    words = ("inspect", other, "--base", "tiny-llama", "--no-cache", "--scale-intruders", "0.5", "--out", "damped")
    found = ask(*words)
    assert found["analysis"]["intruders"]["count"] == found["rescaled"]["scaled"] > 0
    assert found["rescaled"]["path"] == "damped" and found["rescaled"]["rank"] == 3
    again = ask("inspect", "damped", "--base", "tiny-llama", "--against", other, "--no-cache")
    assert again["meta"]["intruders"]["scaled_by"] == 0.5
    assert again["meta"]["lineage"]["parents"][0]["path"] == str(other)
    assert 0.5 < again["analysis"]["similarity"][0]["cosine"] < 1
    assert ask(*words, "--exact")["rescaled"]["lost"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--intruders",), "give --base"),
        (("--base", "nano", "--out", "x"), "belong to --scale-intruders"),
        (("--base", "nano", "--scale-intruders", "0.5"), "needs --out"),
        (("--base", "nano", "--scale-intruders", "1", "--out", "x", "--exact", "--rank", "2"), "exclude each other"),
        (("--cache", "x", "--no-cache"), "exclude each other"),
    ],
)
def test_options_that_do_not_go_together_are_refused(run: Run, other: Path, words: tuple[str, ...], said: str) -> None:
    result = run("inspect", other, *words)
    assert result.exit_code == 2 and said in result.stderr


def test_wrong_numbers_and_adapters_of_other_bases_are_one_sentence(
    refuse: Callable[..., dict[str, Any]], other: Path, tmp_path: Path
) -> None:
    based = ("inspect", other, "--base", "tiny-llama", "--no-cache")
    assert "threshold" in refuse(*based, "--intruders", "--threshold", "2")["message"]
    assert "scaled by -1" in refuse(*based, "--scale-intruders", "-1", "--out", "x")["message"]
    assert refuse("inspect", other, "--against", tmp_path / "absent")["code"] == "missing"
    assert refuse("inspect", other, "--base", "tiny-gpt2")["code"] == "mismatch"
