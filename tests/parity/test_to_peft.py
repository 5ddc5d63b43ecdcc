"""Ours to PEFT: every registered method on every family, in files that PEFT reads with the same logits, or refuses."""

from __future__ import annotations

import json
import re
import tempfile
from collections import OrderedDict
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lorica.adapters.peft_format import OWN_TYPE, why_not
from lorica.adapters.peft_keys import OWN
from lorica.adapters.targets import Targets
from lorica.methods import all_methods, make_method
from lorica.models import Backbone, wrap
from tests.contract.cases import Case, marked
from tests.parity.both import (
    CONV1D,
    GROUPS,
    NO_BIAS,
    ODD_NORM,
    OLD_CACHE,
    OLD_CHECKPOINTING,
    SHARDS,
    TIED,
    UNMATCHED,
    close,
    differ,
    in_peft,
    of_family,
    ours,
    run,
    to_peft,
)
from tests.parity.cases import NAMED, REGISTERED, SETTINGS, fresh, held, in_pefts_words, made, slowly

pytestmark = [OLD_CHECKPOINTING, OLD_CACHE, CONV1D, TIED, ODD_NORM, NO_BIAS, SHARDS, UNMATCHED, GROUPS]

BIASED = [Case(family, "lora", (("lora_bias", True),)) for family in ("llama", "gpt2", "bert", "vit")]
EVERY = [*REGISTERED, *BIASED]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """PEFT's tensors in a folder."""
    found = load_file(folder / "adapter_model.safetensors")
    return {key: tensor for key, tensor in found.items() if not key.startswith(OWN)}


@pytest.mark.parametrize("case", [*marked(held(EVERY)), *slowly(held(SETTINGS))], ids=str)
def test_peft_reads_our_folder_with_the_same_logits_and_saves_it_again_as_it_is(case: Case, tmp_path: Path) -> None:
    host = made(case)
    y = differ(host)
    written = stored(host.save(tmp_path / "ours"))
    theirs = in_peft(fresh(case).module, tmp_path / "ours")
    with torch.no_grad():
        close(y, run(theirs, host.backbone))
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    again = stored(tmp_path / "theirs")
    assert again.keys() == written.keys()
    for key, tensor in written.items():
        assert again[key].dtype == tensor.dtype and torch.equal(again[key], tensor), key


@pytest.mark.parametrize("case", marked([case for case in EVERY if not in_pefts_words(case)]), ids=str)
def test_what_peft_cannot_hold_is_of_a_type_that_peft_refuses(case: Case, tmp_path: Path) -> None:
    host = made(case)
    folder = host.save(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == OWN_TYPE
    with pytest.raises((KeyError, ValueError), match=OWN_TYPE):
        in_peft(fresh(case).module, folder)
    reason = why_not(host.adapter("a"), host.backbone)
    assert reason and "\n" not in reason and not reason.endswith(".")
    assert json.loads((folder / "lorica.json").read_text())["not_peft"] == reason


@pytest.mark.parametrize("name", NAMED)
def test_a_method_that_names_its_peft_type_is_written_under_its_names(name: str, tmp_path: Path) -> None:
    cases = held([case for case in REGISTERED if case.method == name])
    assert cases, "PEFT takes it over nowhere"
    cls = all_methods()[name]
    assert cls.peft is not None
    host = made(cases[0])
    config = json.loads((host.save(tmp_path) / "adapter_config.json").read_text())
    assert config["peft_type"] == cls.peft.peft_type
    assert all(config.get(field) == value for field, value in cls.peft.fixed.items())
    keys = {key.removesuffix(".weight") for key in stored(tmp_path)}
    for param, ending in cls.peft.tensors.items():
        there = any(param in owned for owned in host.adapter("a").layout.specs.values())
        assert there == any(key.endswith(ending.removesuffix(".weight")) for key in keys), param


@pytest.mark.parametrize("name", NAMED)
def test_peft_knows_every_field_of_the_config_that_we_write(name: str, tmp_path: Path) -> None:
    case = held([case for case in REGISTERED if case.method == name])[0]
    made(case).save(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    config = peft.PeftConfig.from_pretrained(str(tmp_path))  # it warns of fields that it does not know
    assert written.keys() <= config.to_dict().keys()
    assert config.inference_mode and config.task_type == ("CAUSAL_LM" if fresh(case).is_causal_lm else None)


# -- targets, patterns, numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_ranks_and_alphas_of_single_sites_become_patterns(method: str, rslora: bool, tmp_path: Path) -> None:
    targets = Targets(
        include=("all-linear",),
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 2, "v_proj": 5},
        alpha_pattern={r"layers\.1\.mlp\..*": 3.5, "q_proj": 7.0},
    )
    host = ours(of_family("llama")(), make_method(method, rank=3, alpha=9.0, rslora=rslora), targets)
    close(*to_peft(host, of_family("llama"), tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    times = 2 if method == "pissa" else 1
    assert config["rank_pattern"][r"^model\.layers\.0\.self_attn\.q_proj"] == 2 * times
    assert config["use_rslora"] is rslora


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "model.layers.1.self_attn.q_proj"),
        ("llama", ["q_proj", "model.layers.0.mlp.down_proj"]),
        ("gpt2", "mlp.c_proj"),
        ("gpt2", ["attn.c_proj", "lm_head"]),
        ("bert", ["attention.output.dense"]),
        ("qwen3", {"include": "all-linear", "exclude": "o_proj", "layers": "1"}),
        ("mlp", "fc2"),
        ("vit", ["classifier", "projection"]),
    ],
    ids=str,
)
def test_target_modules_select_the_sites_and_no_others(family: str, targets: object, tmp_path: Path) -> None:
    host = ours(of_family(family)(), make_method("lora", rank=3), targets)
    close(*to_peft(host, of_family(family), tmp_path))
    adapted = {key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in stored(tmp_path)}
    assert adapted == set(host.adapter("a").layout.sites)


GPT2 = [name for name, site in of_family("gpt2")().sites.items() if site.kind in ("linear", "embedding")]
SIZES = st.tuples(st.integers(1, 5), st.sampled_from([1.0, 3.5, 8.0]))


@given(st.dictionaries(st.sampled_from(GPT2), SIZES, min_size=1, max_size=6), st.booleans())
@settings(max_examples=12)
def test_any_choice_of_sites_ranks_and_alphas_is_pefts(sizes: dict[str, tuple[int, float]], rslora: bool) -> None:
    targets = Targets(
        include=tuple(sizes),
        rank_pattern={re.escape(name): rank for name, (rank, _) in sizes.items()},
        alpha_pattern={re.escape(name): alpha for name, (_, alpha) in sizes.items()},
    )
    host = ours(of_family("gpt2")(), make_method("lora", rank=3, rslora=rslora), targets)
    with tempfile.TemporaryDirectory() as folder:
        close(*to_peft(host, of_family("gpt2"), Path(folder)))


@pytest.mark.parametrize("target", ["sub.fc", "re:fc", "f+", ["re:fc", "f+"]], ids=str)
def test_a_module_whose_name_ends_like_another_or_looks_like_a_pattern_is_told_apart(
    target: object, tmp_path: Path
) -> None:
    def make() -> Backbone:
        torch.manual_seed(0)
        inner = nn.Sequential(OrderedDict({"fc": nn.Linear(6, 6), "ff": nn.Linear(6, 6)}))
        return wrap(nn.Sequential(OrderedDict({"fc": nn.Linear(5, 6), "sub": inner, "f+": nn.Linear(6, 6)})))

    host = ours(make(), make_method("lora", rank=2), target)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    theirs = in_peft(make().module, host.save(tmp_path))
    close(theirs(x), host(x))
    assert len(stored(tmp_path)) == 2 * len(host.adapter("a").layout.sites)


def test_experts_that_are_not_adapted_are_zero_in_the_file(tmp_path: Path) -> None:
    names = [
        "model.layers.0.mlp.experts.1.gate_up_proj",
        "model.layers.0.mlp.experts.3.gate_up_proj",
        "model.layers.1.mlp.experts.0.down_proj",
    ]
    host = ours(of_family("qwen3-moe")(), make_method("lora", rank=3), names)
    close(*to_peft(host, of_family("qwen3-moe"), tmp_path))
    B = stored(tmp_path)["base_model.model.model.layers.0.mlp.experts.lora_B.weight"].view(48, 3, 4)
    assert [bool(B[:, :, expert].any()) for expert in range(4)] == [False, True, False, True]


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_a_grouped_convolution_stays_within_its_groups_in_peft_too(rslora: bool, tmp_path: Path) -> None:
    def make() -> Backbone:
        torch.manual_seed(0)
        return wrap(
            nn.Sequential(nn.Conv1d(4, 8, 3, groups=4, padding=1), nn.Tanh(), nn.Conv1d(8, 6, 3, groups=2, stride=2))
        )

    host = ours(make(), make_method("lora", rank=1, alpha=3.0, rslora=rslora), "all-conv")
    close(*to_peft(host, make, tmp_path))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "norm", "prompt"])
def test_a_half_precision_base_keeps_float32_in_the_file(method: str, tmp_path: Path) -> None:
    def make() -> Backbone:
        return of_family("llama", dtype=torch.bfloat16)()

    host = ours(make(), make_method(method))
    host.set_compute(torch.float32)
    y, theirs = to_peft(host, make, tmp_path)
    assert {tensor.dtype for tensor in stored(tmp_path).values()} == {torch.float32}
    close(y.float(), theirs.float(), 3e-2)


# -- what PEFT does with a folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "vera", "ia3", "norm"])
@pytest.mark.parametrize("options", [{"adapter_name": "q_proj"}, {"low_cpu_mem_usage": True}], ids=str)
def test_peft_may_name_and_load_it_as_it_likes(method: str, options: dict[str, object], tmp_path: Path) -> None:
    host = ours(of_family("llama")(), make_method(method))
    theirs = in_peft(of_family("llama")().module, host.save(tmp_path), **options)
    close(differ(host), run(theirs, host.backbone))


def test_peft_switches_between_our_adapters_as_we_do(tmp_path: Path) -> None:
    host = ours(of_family("gpt2")(), make_method("lora", rank=2), ["c_attn"])
    second = host.add("b", make_method("dora", rank=3), ["c_attn", "c_fc"], seed=5)
    second.flat += 0.1
    for name in ("a", "b"):
        host.save(tmp_path / name, name)
    theirs = in_peft(of_family("gpt2")().module, tmp_path / "a", adapter_name="a")
    theirs.load_adapter(str(tmp_path / "b"), "b")
    for name in ("b", "a", "b"):
        host.activate(name)
        theirs.set_adapter(name)
        close(differ(host), run(theirs, host.backbone))
    with theirs.disable_adapter(), host.disabled():
        assert torch.equal(run(theirs, host.backbone), run(host, host.backbone))


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "ia3", "norm"])
def test_peft_trains_on_exactly_what_we_trained(name: str, tmp_path: Path) -> None:
    case = Case("gpt2", name)
    host = made(case)
    theirs = in_peft(fresh(case).module, host.save(tmp_path), is_trainable=True)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count == host.adapter("a").layout.trainable_count()
