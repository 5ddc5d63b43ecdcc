"""Sites are listed as they are, for every family: names, kinds, shapes, flags; and every listed site acts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorica.core.errors import FormatError
from lorica.core.site import Site
from lorica.models import tiny, wrap
from lorica.models.factory import example_inputs
from lorica.models.sites import attention_heads, experts_transposed, layer_of

LM = ["llama", "qwen3", "qwen3-moe", "gemma", "gemma2", "gpt2"]
FAMILIES = [*LM, "bert", "vit", "mlp", "conv"]


def layer_table(index: int) -> list[Site]:
    """The sites of one block of the tiny Llama."""
    at = f"model.layers.{index}"
    return [
        Site(f"{at}.self_attn", "attention", (2, 16), layer=index, query_heads=4),
        Site(f"{at}.self_attn.q_proj", "linear", (64, 64), layer=index),
        Site(f"{at}.self_attn.k_proj", "linear", (32, 64), layer=index),
        Site(f"{at}.self_attn.v_proj", "linear", (32, 64), layer=index),
        Site(f"{at}.self_attn.o_proj", "linear", (64, 64), layer=index),
        Site(f"{at}.mlp.gate_proj", "linear", (96, 64), layer=index),
        Site(f"{at}.mlp.up_proj", "linear", (96, 64), layer=index),
        Site(f"{at}.mlp.down_proj", "linear", (64, 96), layer=index),
        Site(f"{at}.input_layernorm", "norm", (64,), layer=index),
        Site(f"{at}.post_attention_layernorm", "norm", (64,), layer=index),
    ]


def test_the_whole_site_table_of_a_llama() -> None:
    assert list(tiny("llama").sites.values()) == [
        Site("input", "input", (64,)),
        Site("model.embed_tokens", "embedding", (64, 128), transposed=True),
        *layer_table(0),
        *layer_table(1),
        Site("model.norm", "norm", (64,)),
        Site("lm_head", "linear", (128, 64), head=True),
    ]


EXPECTED: dict[str, list[Site]] = {
    "qwen3": [
        Site("model.embed_tokens", "embedding", (32, 128), transposed=True, tied=True),
        Site("model.layers.1.self_attn", "attention", (2, 16), layer=1, query_heads=4),
        Site("model.layers.1.self_attn.q_proj", "linear", (64, 32), layer=1),
        Site("model.layers.1.self_attn.o_proj", "linear", (32, 64), layer=1),
        Site("model.layers.1.self_attn.q_norm", "norm", (16,), layer=1),
        Site("model.layers.1.self_attn.k_norm", "norm", (16,), layer=1),
        Site("lm_head", "linear", (128, 32), tied=True, head=True),
    ],
    "qwen3-moe": [
        Site("model.layers.0.mlp.gate", "linear", (4, 32), layer=0, router=True),
        Site(
            "model.layers.0.mlp.experts.0.gate_up_proj",
            "expert",
            (48, 32),
            layer=0,
            expert=0,
            parts=(("gate", 24), ("up", 24)),
        ),
        Site("model.layers.1.mlp.experts.3.down_proj", "expert", (32, 24), layer=1, expert=3),
        Site("lm_head", "linear", (128, 32), head=True),
    ],
    "gemma": [
        Site(
            "model.embed_tokens", "embedding", (32, 128), transposed=True, tied=True, scale=float(torch.tensor(32**0.5))
        ),
        Site("lm_head", "linear", (128, 32), tied=True, head=True),
    ],
    "gpt2": [
        Site("transformer.wte", "embedding", (32, 128), transposed=True, tied=True),
        Site("transformer.wpe", "embedding", (32, 512), transposed=True),
        Site("transformer.h.1.attn", "attention", (4, 8), layer=1, query_heads=4),
        Site(
            "transformer.h.1.attn.c_attn",
            "linear",
            (96, 32),
            bias=True,
            layer=1,
            transposed=True,
            parts=(("q", 32), ("k", 32), ("v", 32)),
        ),
        Site("transformer.h.1.mlp.c_fc", "linear", (128, 32), bias=True, layer=1, transposed=True),
        Site("transformer.h.1.mlp.c_proj", "linear", (32, 128), bias=True, layer=1, transposed=True),
        Site("transformer.ln_f", "norm", (32,), bias=True),
        Site("lm_head", "linear", (128, 32), tied=True, head=True),
    ],
    "bert": [
        Site("input", "input", (32,)),
        Site("bert.embeddings.word_embeddings", "embedding", (32, 128), transposed=True, tied=True),
        Site("bert.encoder.layer.0.attention.self", "attention", (4, 8), layer=0, query_heads=4),
        Site("bert.encoder.layer.0.attention.self.query", "linear", (32, 32), bias=True, layer=0),
        Site("bert.encoder.layer.0.attention.output.LayerNorm", "norm", (32,), bias=True, layer=0),
        Site("cls.predictions.transform.dense", "linear", (32, 32), bias=True),
        Site("cls.predictions.decoder", "linear", (128, 32), bias=True, tied=True, head=True),
    ],
    "vit": [
        Site("vit.embeddings.patch_embeddings.projection", "conv", (32, 3, 8, 8), bias=True),
        Site("vit.layers.0.attention", "attention", (4, 8), layer=0, query_heads=4),
        Site("vit.layers.0.mlp.fc1", "linear", (64, 32), bias=True, layer=0),
        Site("classifier", "linear", (5, 32), bias=True, head=True),
    ],
    "mlp": [
        Site("embed", "embedding", (16, 50), transposed=True),
        Site("norm", "norm", (16,), bias=True),
        Site("fc1", "linear", (24, 16), bias=True),
        Site("fc2", "linear", (16, 24)),
        Site("out", "linear", (7, 16), bias=True),
    ],
    "conv": [
        Site("0", "conv", (8, 4, 3), bias=True, layer=0),
        Site("1", "norm", (8,), bias=True, layer=1),
        Site("2", "conv", (8, 2, 3), bias=True, layer=2),
        Site("5", "conv", (12, 4, 3, 3), bias=True, layer=5),
        Site("7", "conv", (6, 12, 2, 3), layer=7),
        Site("9", "linear", (7, 24), bias=True, layer=9),
    ],
}


@pytest.mark.parametrize("family", EXPECTED)
def test_each_family_lists_its_own_peculiarities(family: str) -> None:
    sites = tiny(family).sites
    assert [sites.get(site.name) for site in EXPECTED[family]] == EXPECTED[family]


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("llama", {"input": 1, "embedding": 1, "attention": 2, "linear": 15, "norm": 5}),
        ("qwen3", {"input": 1, "embedding": 1, "attention": 2, "linear": 15, "norm": 9}),
        ("qwen3-moe", {"input": 1, "embedding": 1, "attention": 2, "linear": 11, "expert": 16, "norm": 9}),
        ("gemma", {"input": 1, "embedding": 1, "attention": 2, "linear": 15, "norm": 5}),
        ("gpt2", {"input": 1, "embedding": 2, "attention": 2, "linear": 9, "norm": 5}),
        ("bert", {"input": 1, "embedding": 3, "attention": 2, "linear": 14, "norm": 6}),
        ("vit", {"conv": 1, "attention": 2, "linear": 13, "norm": 5}),
        ("mlp", {"embedding": 1, "linear": 3, "norm": 1}),
        ("conv", {"conv": 4, "linear": 1, "norm": 1}),
    ],
)
def test_nothing_is_listed_twice_or_left_out(family: str, counts: dict[str, int]) -> None:
    found: dict[str, int] = {}
    for site in tiny(family).sites.values():
        found[site.kind] = found.get(site.kind, 0) + 1
    assert found == counts


@pytest.mark.parametrize("family", FAMILIES)
def test_every_listed_module_is_called_in_a_forward_pass(family: str) -> None:
    backbone = tiny(family)
    called: set[str] = set()
    for site in backbone.sites.values():
        backbone.module_of(site.name).register_forward_hook(lambda *_, name=site.name: called.add(name))
    with torch.no_grad():
        backbone.module(**example_inputs(backbone))
    assert called == set(backbone.sites)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_of_sites_are_the_shapes_of_their_matrices(family: str) -> None:
    backbone = tiny(family)
    for site in backbone.sites.values():
        if site.kind not in ("input", "attention"):
            assert tuple(backbone.weight(site.name).matrix().shape) == site.shape, site.name
            bias = backbone.bias(site.name)
            assert (bias is not None) == site.bias, site.name
            assert bias is None or bias.shape == (site.shape[0],), site.name


def test_the_layer_is_the_first_number_of_a_path() -> None:
    assert layer_of("model.layers.11.mlp.experts") == 11
    assert layer_of("h.0.attn2.1") == 0
    assert layer_of("conv1.weight2") is None


def test_classifier_heads_of_sequence_models_are_heads() -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        pad_token_id=0,
    )
    backbone = wrap(transformers.LlamaForSequenceClassification(config))
    assert [site.name for site in backbone.sites.values() if site.head] == ["score"]
    assert not backbone.is_causal_lm


class TwoNames(nn.Module):
    """One linear under two names, and another that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.third = nn.Linear(4, 4, bias=False)
        self.third.weight = self.first.weight


def test_a_shared_module_is_one_site_and_a_shared_weight_is_tied() -> None:
    sites = wrap(TwoNames()).sites
    assert sites == {
        "first": Site("first", "linear", (4, 4), bias=True, tied=True),
        "third": Site("third", "linear", (4, 4), tied=True),
    }


def test_the_insides_of_multihead_attention_are_no_sites_and_transformer_layers_take_no_fused_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    backbone = wrap(module)
    roles = ["linear1", "linear2", "norm1", "norm2"]
    assert list(backbone.sites) == [f"layers.{i}.{role}" for i in range(2) for role in roles]
    called = []
    for name in backbone.sites:
        # an instance forward, not a hook: torch takes the slow path by itself where there are hooks
        part: Any = backbone.module_of(name)
        part.forward = lambda x, part=part, name=name: called.append(name) or type(part).forward(part, x)
    with torch.no_grad():
        module(torch.randn(2, 3, 8))
    assert set(called) == set(backbone.sites)


class Doubling(nn.Linear):
    """A linear that is not x Wᵀ."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Shifted(nn.Embedding):
    """An embedding whose forward is its own and that names no scale."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input + 1)


def test_modules_whose_weight_does_not_mean_what_it_says_are_no_sites() -> None:
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    module = nn.Sequential(
        Doubling(3, 3),
        Shifted(5, 3),
        nn.Embedding(5, 3, max_norm=1.0),
        nn.LayerNorm(3, elementwise_affine=False),
        nn.LayerNorm((2, 3)),
        nn.ConvTranspose1d(3, 3, 2),
        nn.BatchNorm1d(3),
        parametrised,
    )
    assert wrap(module).sites == {}


def test_a_lone_module_is_a_site_too() -> None:
    assert wrap(nn.Linear(3, 2)).sites == {"root": Site("root", "linear", (2, 3), bias=True)}


def test_lazy_modules_are_refused_with_their_name() -> None:
    with pytest.raises(FormatError, match=r"Parameter '0\.weight' is lazy"):
        wrap(nn.Sequential(nn.LazyLinear(3)))


def test_experts_stored_the_other_way_round_are_normalised() -> None:
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    config = transformers.GptOssConfig(hidden_size=6, intermediate_size=5, num_local_experts=3, num_experts_per_tok=1)
    module = GptOssExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    backbone = wrap(nn.ModuleDict({"experts": module}))
    assert backbone.sites["experts.2.gate_up_proj"] == Site(
        "experts.2.gate_up_proj", "expert", (10, 6), bias=True, transposed=True, expert=2
    )
    x_NI = torch.randn(4, 6)
    up_NF = x_NI @ backbone.weight("experts.2.gate_up_proj").matrix().T + backbone.bias("experts.2.gate_up_proj")
    out_NO = module._apply_gate(up_NF) @ backbone.weight("experts.2.down_proj").matrix().T
    out_NO = out_NO + backbone.bias("experts.2.down_proj")
    config._experts_implementation = "eager"
    torch.testing.assert_close(module(x_NI, torch.full((4, 1), 2), torch.ones(4, 1)), out_NO)

    text = transformers.Llama4TextConfig(hidden_size=6, intermediate_size=5, num_local_experts=3)
    llama4 = Llama4TextExperts(text)
    assert experts_transposed(llama4) is True
    assert wrap(nn.ModuleDict({"experts": llama4})).sites["experts.0.down_proj"].shape == (6, 5)


def test_cross_attention_and_foreign_modules_are_no_attention_sites() -> None:
    import transformers

    config = transformers.BertConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=8,
        is_decoder=True,
        add_cross_attention=True,
    )
    found = [
        site.name for site in wrap(transformers.BertLMHeadModel(config)).sites.values() if site.kind == "attention"
    ]
    assert found == ["bert.encoder.layer.0.attention.self"]
    assert attention_heads(nn.MultiheadAttention(8, 2)) is None
