"""Experts in PEFT's folders: separate linears as transformers 4 had them, and stacked files that are incomplete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorica.core.errors import FormatError
from lorica.models import Backbone, wrap
from lorica.models.factory import _fill
from tests.parity.both import (
    OLD_CHECKPOINTING,
    TOLERANCE,
    UNMATCHED,
    Make,
    close,
    from_peft,
    in_peft,
    loaded,
    lora,
    of_family,
    peft_model,
    reads,
    run,
)
from tests.parity.spoiled import CONFIG, WEIGHTS, configure

pytestmark = [OLD_CHECKPOINTING, UNMATCHED]

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
}


def mixtral() -> Backbone:
    module = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL))
    _fill(module, torch.Generator().manual_seed(0))
    return wrap(module.float(), name="mixtral")


QWEN = of_family("qwen3-moe")
V4: dict[str, tuple[Make, str, tuple[str, str, str]]] = {
    "qwen3-moe": (QWEN, "mlp", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": (mixtral, "block_sparse_moe", ("w1", "w3", "w2")),
}
"""Base, block and the three maps of an expert, as transformers 4 called them."""


def separate(family: str, folder: Path, *, left_out: str = "", ranks: dict[str, int] | None = None) -> None:
    """A LoRA folder as PEFT wrote it on transformers 4, with a linear for every map of every expert."""
    _, block, (gate, up, down) = V4[family]
    rng, tensors, ranks = torch.Generator().manual_seed(0), {}, ranks or {}
    for layer in range(2):
        for expert in range(4):
            for role, (rows, columns) in {gate: (24, 32), up: (24, 32), down: (32, 24)}.items():
                name = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{role}"
                rank = ranks.get(role, 4)
                if role != left_out:
                    tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=rng) / 4
                    tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=rng) / 4
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    config = lora(*(role for role in (gate, up, down) if role != left_out)).to_dict()
    config |= {"target_modules": sorted(config["target_modules"]), "rank_pattern": ranks, "peft_type": "LORA"}
    config = {key: value for key, value in config.items() if key != "runtime_config"}
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("family", V4)
@torch.no_grad()
def test_experts_of_transformers_4_are_fused_as_peft_fuses_them(family: str, tmp_path: Path) -> None:
    make = V4[family][0]
    separate(family, tmp_path)
    theirs = in_peft(make().module, tmp_path)
    adapter = reads(tmp_path, make, run(theirs, make()))
    ranks = {site.rpartition(".")[2]: m.rank for site, m in adapter.layout.methods.items()}  # type: ignore[attr-defined]
    assert ranks == {"gate_up_proj": 8, "down_proj": 4}


@pytest.mark.parametrize("family", V4)
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@torch.no_grad()
def test_fused_experts_change_each_map_by_its_own_factors(family: str, rslora: bool, tmp_path: Path) -> None:
    """Also with rsLoRA, other ranks and gate alone: there PEFT scales by √2 too much, and refuses the others."""
    make, block, (gate, up, down) = V4[family]
    separate(family, tmp_path, left_out=down, ranks={gate: 4, up: 2})
    configure(tmp_path, use_rslora=rslora, alpha_pattern={up: 3.0})
    host = loaded(tmp_path, make)
    held, base = load_file(tmp_path / WEIGHTS), host.backbone
    for name in host.adapter().layout.sites:
        layer, expert = name.split(".")[2], name.split(".")[5]
        where = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}"
        rows = []
        for role, rank, alpha in ((gate, 4, 6.0), (up, 2, 3.0)):
            A, B = held[f"{where}.{role}.lora_A.weight"], held[f"{where}.{role}.lora_B.weight"]
            rows.append(alpha / (rank**0.5 if rslora else rank) * B @ A)
        update: Any = host.adapter().update(name, base.weight(name))
        close(update.effective(base.weight(name).matrix()) - base.weight(name).matrix(), torch.cat(rows), TOLERANCE)


def test_experts_whose_up_map_alone_is_adapted_leave_the_gate_as_it_is(tmp_path: Path) -> None:
    separate("qwen3-moe", tmp_path, left_out="gate_proj")
    host = loaded(tmp_path, QWEN)
    name = "model.layers.1.mlp.experts.2.gate_up_proj"
    update: Any = host.adapter().update(name, host.backbone.weight(name))
    delta = update.factors[0].dense()
    assert not delta[:24].any() and delta[24:].any()


def test_a_stacked_file_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    peft_model(lora(target_parameters=["experts.down_proj"]), QWEN).save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({key: tensor for key, tensor in tensors.items() if "layers.1." not in key}, tmp_path / WEIGHTS)
    with pytest.raises(FormatError, match=r"lacks the tensors of 'model.layers.1.mlp.experts.0.down_proj'"):
        loaded(tmp_path, QWEN)


@pytest.mark.parametrize(
    "config",
    [
        lora(target_parameters=["mlp.gate.weight"], rank_pattern={r"layers\.1\.mlp\.gate\.weight": 2}),
        lora("q_proj", target_parameters=["mlp.gate.weight", "mlp.experts.down_proj"]),
        lora(target_modules="all-linear"),
    ],
    ids=["router", "router and experts", "all-linear"],
)
def test_routers_are_read_and_written_as_parameters(config: Any, tmp_path: Path) -> None:
    from_peft(config, QWEN, tmp_path)
