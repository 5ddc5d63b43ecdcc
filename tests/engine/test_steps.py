"""Steps of one token a row: known blocks and whole trunks are found by asking them, and only rounding changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from lorica.engine import decode
from lorica.engine.chain import chain_of
from lorica.engine.decode import Step, step_of
from lorica.engine.host import Host
from lorica.engine.sample import generate
from lorica.engine.step_blocks import rotary_parts
from lorica.engine.trunk import Trunk
from lorica.engine.updates import Updates
from lorica.methods.norm import Norm
from lorica.models.builtin import FAMILIES
from lorica.models.factory import make_tiny
from lorica.sampling.params import SamplingParams
from tests.engine.test_sample import SPECS, prompts, served
from tests.tiny import original, tiny

CAUSAL = [family for family in FAMILIES if original(family).is_causal_lm]
CHAINS = ["gemma", "llama", "qwen3", "qwen3-moe"]


def step(host: Host) -> Step:
    """The step of one row of the base and one of each adapter."""
    stacks = host.stacks([None, *host.adapters])
    with Trunk(host).modes(training=False), torch.no_grad(), host.rows(stacks):
        return step_of(host.executor, stacks, Updates())


def test_every_causal_family_but_those_of_other_form_walks():
    walking = [family for family in CAUSAL if step(Host(tiny(family))).walk is not None]
    assert sorted(walking) == CHAINS
    assert set(CAUSAL) - set(walking) == {"gpt2"}, "which adds vectors of positions and names its parts otherwise"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", CHAINS)
def test_a_walk_samples_as_the_trunks_own_pass_does(family, dtype, monkeypatch):
    names = ("lora", "prefix", "soft", "dora", "ia3", "vera", "norm", "delta", "wide")
    host = served(family, names, dtype=dtype)
    rows = list(zip(prompts(len(SPECS)), SPECS, strict=True))
    params = SamplingParams(max_tokens=6)
    walked = generate(host, rows, params)
    monkeypatch.setattr(decode, "walk_of", lambda executor, forwards: None)
    monkeypatch.setattr(decode, "_blocks", lambda executor, whole, plain, kernels: [])
    usual = generate(host, rows, params)
    close = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.1}[dtype]
    same = 0
    for one, other in zip(walked, usual, strict=True):
        # a greedy choice between near equals may fall otherwise by rounding, and everything behind it with it
        until = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b), 6)
        assert one.logprobs[:until] == pytest.approx(other.logprobs[:until], abs=close)
        same += until
    assert same >= (6 if dtype != torch.bfloat16 else 3) * len(rows)


def test_an_adapter_of_a_norm_has_the_norm_called_and_the_rest_stands():
    host = Host(tiny("qwen3"))
    host.add("norms", Norm())
    found = step(host)
    norms = {module for module in host.model.modules() if type(module).__name__.endswith("RMSNorm")}
    assert found.walk is not None and norms.isdisjoint(module for module, _ in found.forwards)
    standing = {type(module).__name__ for module, _ in found.forwards}
    assert "Qwen3Attention" not in standing, "its inner norms are changed"


def test_who_listens_to_a_layer_or_a_map_hears_every_token():
    host = Host(tiny("qwen3"))
    layer, q = host.model.model.layers[0], host.model.model.layers[1].self_attn.q_proj
    plain = generate(host, [([3, 4, 5], None)], SamplingParams(max_tokens=5))
    heard: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda module, args, out: heard.append(module)) for m in (layer, q)]
    assert step(host).walk is None
    listened = generate(host, [([3, 4, 5], None)], SamplingParams(max_tokens=5))
    assert heard.count(layer) == heard.count(q) == 5, "the prompt's pass, and four steps"
    for handle in handles:
        handle.remove()
    assert listened[0].tokens == plain[0].tokens
    assert listened[0].logprobs == pytest.approx(plain[0].logprobs, abs=1e-5)


def _turn_pairs(q, k, cos, sin, unsqueeze_dim=1):
    """The other rotation: neighbours against each other, not halves."""

    def swap(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + swap(q) * sin, k * cos + swap(k) * sin


def test_an_attention_that_turns_otherwise_keeps_its_forward(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", _turn_pairs)
    host = Host(make_tiny("llama"))
    Trunk(host)
    host.model.eval()
    assert rotary_parts(host.executor) == {}
    assert step(host).walk is not None, "the chain of its layers is what it was"


def test_a_layer_that_adds_otherwise_is_no_chain(monkeypatch):
    usual = modeling_qwen3.Qwen3DecoderLayer.forward
    monkeypatch.setattr(
        modeling_qwen3.Qwen3DecoderLayer, "forward", lambda self, x, **given: x + 0.5 * (usual(self, x, **given) - x)
    )
    host = Host(make_tiny("qwen3"))
    host.model.eval()
    assert chain_of(host.executor) is None
    assert len(generate(host, [([3, 4], None)], SamplingParams(max_tokens=3))[0].tokens) == 3


def test_what_was_found_is_asked_again_when_the_weights_change():
    host = Host(tiny("qwen3"))
    host.backbone.refresh()
    step(host)
    before = rotary_parts(host.executor)
    with torch.no_grad():
        host.model.model.layers[0].self_attn.q_norm.weight.mul_(3.0)
    host.backbone.refresh()
    queries_SK, earlier_SK = (next(iter(found.values())).norm_SK for found in (rotary_parts(host.executor), before))
    assert torch.equal(queries_SK[0], 3 * earlier_SK[0])
