"""Merging parity: the weights of PEFT's `merge_and_unload`, where PEFT can merge at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from lorica.core.update import LinearUpdate
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import Backbone, wrap
from lorica.models.factory import _fill
from tests.contract.cases import Case, holds_weights, known, marked
from tests.parity.both import (
    CONV1D,
    GROUPS,
    NO_BIAS,
    ODD_NORM,
    OLD_CHECKPOINTING,
    SHARDS,
    TIED,
    UNMATCHED,
    close,
    in_peft,
    loaded,
    lora,
    of_family,
    ours,
    peft_model,
    run,
)
from tests.parity.cases import REGISTERED, SETTINGS, fresh, held, sites, slowly

pytestmark = [OLD_CHECKPOINTING, CONV1D, TIED, ODD_NORM, NO_BIAS, UNMATCHED, GROUPS, SHARDS]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def untied(case: Case, base: Backbone) -> list[str]:
    """Sites that may be merged: the weight is no other's, and a bias has a place."""
    biased = dict(case.settings).get("lora_bias", False)
    return [n for n in sites(case) if not base.sites[n].tied and (base.sites[n].bias or not biased)]


def mergeable(cases: list[Case]) -> list[Case]:
    """Those with a site that may be merged."""
    return [case for case in held(cases) if holds_weights(case.make()) and untied(case, known(case.family))]


CASES, MORE = mergeable(REGISTERED), mergeable(SETTINGS)
BIASED = [Case(family, "lora", (("lora_bias", True),)) for family in ("gpt2", "bert", "vit")]


def same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Equal names, equal values up to rounding, and something changed."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        close(ours[name], tensor, 2e-6)
    assert any(not torch.equal(ours[name], tensor) for name, tensor in start.items())


@pytest.mark.parametrize("case", [*marked(CASES), *BIASED, *slowly(MORE)], ids=str)
def test_merged_weights_are_those_of_peft(case: Case, tmp_path: Path) -> None:
    base = fresh(case)
    start, method = weights(base.module), case.make()
    host = ours(base, method, untied(case, base))
    theirs = in_peft(fresh(case).module, host.save(tmp_path)).merge_and_unload()
    host.merge()
    same_weights(weights(base.module), weights(theirs), start)
    host.unmerge()
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(base.module).items())


EXTRAS: dict[str, tuple[str, Any]] = {
    "biases, PEFT": ("gpt2", lora("c_attn", bias="all")),
    "lora_bias beside a bias": ("gpt2", lora("c_attn", bias="lora_only", lora_bias=True)),
    "a head": ("llama", lora("q_proj", modules_to_save=["lm_head", "norm"])),
    "a classifier": ("vit", lora("q_proj", modules_to_save=["classifier"], task_type=None)),
    "PiSSA": ("llama", lora("q_proj", "v_proj", init_lora_weights="pissa")),
    "experts": ("qwen3-moe", lora(target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    "an embedding, DoRA": ("llama", lora("embed_tokens", use_dora=True)),
    "VeRA and a head": (
        "llama",
        peft.VeraConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    ),
    "a Conv1D called a norm": ("gpt2", peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["attn.c_proj"])),
}


@pytest.mark.parametrize("row", EXTRAS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")  # as everywhere
def test_what_peft_trained_merges_here_as_it_does_there(row: str, tmp_path: Path) -> None:
    family, config = EXTRAS[row]
    make = of_family(family)
    theirs = peft_model(config, make)
    theirs.save_pretrained(str(tmp_path))
    start = weights(make().module)
    host = loaded(tmp_path, make)
    host.merge()
    same_weights(weights(host.model), weights(theirs.merge_and_unload()), start)


def test_a_grouped_convolution_which_peft_cannot_merge_is_merged(tmp_path: Path) -> None:
    def make() -> Backbone:
        torch.manual_seed(0)
        return wrap(nn.Sequential(nn.Conv1d(4, 8, 3, groups=2, padding=1)))

    host = ours(make(), make_method("lora", rank=2), "all-conv")
    theirs = in_peft(make().module, host.save(tmp_path))
    y = run(theirs, host.backbone)
    host.merge()
    close(run(host, host.backbone), y)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        theirs.merge_and_unload()


SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "pad_token_id": 0,
}


def transposed(kind: str) -> Backbone:
    """A mixture whose experts store [in, out]; GPT-OSS says so in `is_transposed`, Llama-4 does not."""
    config, model = {
        "gpt-oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
        "llama-4": (transformers.Llama4TextConfig, transformers.Llama4ForCausalLM),
    }[kind]
    torch.manual_seed(0)  # sinks and router biases start at random
    module = model(config(**SMALL))
    _fill(module, torch.Generator().manual_seed(0))
    return wrap(module.float(), name=kind)


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"]], ids=["both", "down"])
@pytest.mark.parametrize("kind", ["gpt-oss", "llama-4"])
def test_experts_that_are_stored_transposed_merge_as_in_peft_both_ways(
    kind: str, parameters: list[str], tmp_path: Path
) -> None:
    def make() -> Backbone:
        return transposed(kind)

    start = weights(make().module)
    theirs = peft_model(lora("q_proj", target_parameters=[f"experts.{name}" for name in parameters]), make)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    host = loaded(tmp_path / "theirs", make)
    host.save(tmp_path / "ours")
    merged = weights(theirs.merge_and_unload())
    host.merge()
    same_weights(weights(host.model), merged, start)
    same_weights(weights(in_peft(make().module, tmp_path / "ours").merge_and_unload()), merged, start)


def test_several_adapters_merge_into_one_weight_as_in_peft(tmp_path: Path) -> None:
    make = of_family("llama")
    host = ours(make(), make_method("lora", rank=3), ["q_proj", "v_proj"])
    host.add("b", make_method("lora", rank=2, rslora=True), ["v_proj", "up_proj"], seed=4).flat.add_(0.05)
    theirs = in_peft(make().module, host.save(tmp_path / "a", "a"), adapter_name="a")
    theirs.load_adapter(str(host.save(tmp_path / "b", "b")), "b")
    start = weights(make().module)
    host.merge("a", "b")
    same_weights(weights(host.model), weights(theirs.merge_and_unload(adapter_names=["a", "b"])), start)


def exact(host: Host) -> dict[str, Tensor]:
    """The folded weights in float64, by site."""
    found = {}
    for name in host.adapter("a").layout.sites:
        update: Any = host.adapter("a").update(name, host.backbone.weight(name))
        assert isinstance(update, LinearUpdate)
        doubled = LinearUpdate(
            factors=tuple(type(f)(f.A_RI.double(), f.B_OR.double(), f.scale) for f in update.factors),
            out_scale_O=None if update.out_scale_O is None else update.out_scale_O.double(),
        )
        found[name] = doubled.effective(host.backbone.weight(name).matrix().double()).detach()
    return found


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_half_precision_merge_is_nowhere_farther_from_the_truth_than_pefts(method: str, tmp_path: Path) -> None:
    make = of_family("llama", dtype=torch.bfloat16)
    host = ours(make(), make_method(method, rank=4), ["q_proj", "up_proj"])
    truth = exact(host)
    theirs = weights(in_peft(make().module, host.save(tmp_path)).merge_and_unload())
    host.merge()
    merged = weights(host.model)
    for name, weight in truth.items():
        mine, other = (merged[f"{name}.weight"].double(), theirs[f"{name}.weight"].double())
        assert float((mine - weight).abs().max()) <= float((other - weight).abs().max()) * (1 + 1e-3)
        assert float((mine - weight).norm()) <= float((other - weight).norm()) * (1 + 1e-6)
