"""LoRA inside fused weights: which rows change, and that it is LoRA on the separate maps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

from lorica.core.errors import MethodError
from lorica.core.site import Site
from lorica.engine.host import Host
from lorica.methods.lora import LoRA
from lorica.methods.lora_fused import FusedLoRA
from lorica.models import wrap
from tests.methods.one import matrix
from tests.tiny import tiny

QKV = Site("h.0.attn.c_attn", "linear", (12, 4), parts=(("q", 4), ("k", 4), ("v", 4)))


class Fused(nn.Module):
    """q, k and v of one input, in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 15, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(x)


def test_the_delta_is_zero_in_the_slices_that_are_left_out() -> None:
    method = FusedLoRA(rank=2, slices=("q", "v"))
    shapes = {name: spec.shape for name, spec in method.params(QKV).items()}
    assert shapes == {"A": (2, 2, 4), "B": (8, 2)}
    update = method.lower(QKV, {name: matrix(*shape) for name, shape in shapes.items()}, None)  # type: ignore[arg-type]
    delta_OI = update.factors[0].dense()
    assert torch.count_nonzero(delta_OI[4:8]) == 0
    assert all(torch.linalg.matrix_rank(delta_OI[rows]) == 2 for rows in (slice(0, 4), slice(8, 12)))


def test_it_is_lora_on_the_maps_held_apart() -> None:
    fused, x = Fused(), matrix(7, 5, seed=3)
    apart = nn.ModuleDict({name: nn.Linear(5, 5, dtype=torch.float64) for name in "qkv"})
    for i, layer in enumerate(apart.values()):
        layer.weight.data.copy_(fused.qkv.weight[5 * i : 5 * i + 5])
        layer.bias.data.copy_(fused.qkv.bias[5 * i : 5 * i + 5])
    one, three = Host(wrap(fused)), Host(wrap(apart))
    a = one.add("a", FusedLoRA(rank=2, slices=("k", "v")), dtype=torch.float64)
    b = three.add("b", LoRA(rank=2), ["k", "v"], dtype=torch.float64)
    for i, name in enumerate("kv"):
        A, B = matrix(2, 5, seed=i), matrix(5, 2, seed=9 + i)
        a.tensors("qkv")["A"].data[i] = A
        a.tensors("qkv")["B"].data[5 * i : 5 * i + 5] = B
        b.set(name, "A", A)
        b.set(name, "B", B)
    one.activate("a")
    three.activate("b")
    y = one(x)
    torch.testing.assert_close(y, torch.cat([layer(x) for layer in apart.values()], dim=1), rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    sum(layer(x).square().sum() for layer in apart.values()).backward()
    for i, name in enumerate("kv"):
        own, theirs = a.gradients("qkv"), b.gradients(name)
        torch.testing.assert_close(own["A"][i], theirs["A"])
        torch.testing.assert_close(own["B"][5 * i : 5 * i + 5], theirs["B"])


def test_fused_weights_of_every_family_are_told() -> None:
    gpt2 = tiny("gpt2").sites
    assert {site.parts for site in gpt2.values() if site.role == "c_attn"} == {(("q", 32), ("k", 32), ("v", 32))}
    moe = tiny("qwen3-moe").sites
    assert {tuple(name for name, _ in site.parts) for site in moe.values() if site.role == "gate_up_proj"} == {
        ("gate", "up")
    }
    assert not any(site.parts for family in ("llama", "qwen3", "gemma", "bert") for site in tiny(family).sites.values())


def test_grouped_queries_fused_with_their_keys_and_values_are_told() -> None:
    config = Phi3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    sites = wrap(Phi3ForCausalLM(config)).sites
    assert sites["model.layers.0.self_attn.qkv_proj"].parts == (("q", 16), ("k", 8), ("v", 8))
    assert sites["model.layers.0.mlp.gate_up_proj"].parts == (("gate", 24), ("up", 24))


def test_a_site_of_one_map_is_refused_and_an_unknown_slice_names_its_neighbours() -> None:
    with pytest.raises(MethodError, match="is one map"):
        FusedLoRA(rank=2).params(Site("fc", "linear", (4, 4)))
    with pytest.raises(MethodError, match="holds q, k, v; it has no slice 'qq'"):
        FusedLoRA(rank=2, slices=("qq",)).params(QKV)
    with pytest.raises(MethodError, match="larger than slice 'q'"):
        FusedLoRA(rank=5).params(QKV)


def test_by_default_the_fused_attention_of_gpt2_is_adapted() -> None:
    host = Host(tiny("gpt2"))
    assert {site.role for site in host.add("a", FusedLoRA(rank=2, slices=("q", "v"))).layout.sites.values()} == {
        "c_attn"
    }
