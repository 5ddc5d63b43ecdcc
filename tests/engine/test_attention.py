"""Prefixes at attention sites under every kernel, mask and family; the model's own kernel where there is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.core.errors import MethodError
from lorica.core.update import PrefixKV
from lorica.engine.attention import attend_with_prefix
from lorica.engine.host import Host
from lorica.engine.sample import generate
from lorica.methods import make_method
from lorica.models import Backbone
from lorica.models.attention import set_attention
from lorica.sampling.params import SamplingParams
from tests.contract.cases import close, inputs, output
from tests.tiny import tiny

IDS = torch.tensor([[5, 9, 20, 7, 8, 3], [30, 11, 6, 8, 40, 41], [9, 9, 5, 5, 7, 7]])


def host_on(base: Backbone, kernel: str | None = None, tokens: int = 3) -> Host:
    if kernel is not None:
        set_attention(base.module, kernel)
    host = Host(base)
    host.add("a", make_method("prefix", tokens=tokens, init_std=1.0), dtype=torch.float64)
    host.activate("a")
    return host


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2", "bert", "vit"])
def test_the_eager_kernel_gives_what_the_fused_one_gives(family: str) -> None:
    results = []
    for kernel in ("eager", "sdpa"):
        host = host_on(tiny(family, dtype=torch.float64), kernel)
        given = inputs(host, rows=3)
        with host.rows(["a", None, "a"]):
            results.append(output(host, given))
    close(results[1], results[0], 1e-5)  # the eager softmax of transformers is in float32


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_with_and_without_a_prefix_keep_their_padding_masks(family: str, side: str) -> None:
    # in float64 the eager kernel's own padded rows are NaN: it adds float64's least number and rounds to float32
    host = host_on(tiny(family, dtype=torch.float32 if family == "gemma2" else torch.float64))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3])
    mask = mask.flip(1) if side == "left" else mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    rows = ["a", None, "a"]
    with host.rows(rows):
        y = host(input_ids=IDS, attention_mask=mask, position_ids=positions).logits
    for row, name in enumerate(rows):
        host.activate(*([name] if name else []))
        real = mask[row].bool()
        alone = host(input_ids=IDS[row : row + 1, real]).logits[0]
        close(y[row, real], alone, 1e-5 if family == "gemma2" else 1e-10)


def test_a_softcap_acts_on_the_prefixes_scores_too() -> None:
    q, k, v = (torch.randn(2, 4, 8, dtype=torch.float64) for _ in range(3))
    pk, pv = (torch.randn(3, 2, 8, dtype=torch.float64) for _ in range(2))
    y = attend_with_prefix(nn.Identity(), q, k, v, None, [PrefixKV(pk, pv)], scaling=2.0, softcap=1.5)
    scores = 1.5 * torch.tanh(2.0 * q @ torch.cat([pk.transpose(0, 1), k], dim=1).transpose(1, 2) / 1.5)
    mask = torch.cat([torch.ones(4, 3), torch.ones(4, 4).tril()], dim=1).bool()
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ torch.cat([pv.transpose(0, 1), v], dim=1)
    close(y, expected.transpose(0, 1), 1e-12)


def test_attention_sinks_are_refused() -> None:
    x = torch.randn(2, 4, 8)
    with pytest.raises(MethodError, match="attention sinks"):
        attend_with_prefix(nn.Identity(), x, x, x, None, [], s_aux=torch.zeros(2))


def test_a_window_narrows_the_text_and_never_the_prefix() -> None:
    base = tiny("gemma2", dtype=torch.float64, sliding_window=3, attn_logit_softcapping=None)
    host = host_on(base)
    site = "model.layers.0.self_attn"
    assert base.module_of(site).sliding_window == 3
    seen: dict[str, Tensor] = {}
    inner = base.module.config._attn_implementation
    assert inner.startswith("lorica-")
    prefix = host.adapter().update(site, base.weight(site))
    assert isinstance(prefix, PrefixKV)

    def watch(module: nn.Module, args: tuple[Tensor, ...], out: object) -> None:
        seen["out"] = args[0]

    base.module_of("model.layers.0.self_attn.o_proj").register_forward_hook(watch)
    host(input_ids=IDS[:1])
    attention = base.module_of(site)
    h = base.module_of("model.layers.0.input_layernorm")(base.module_of("input")(IDS[:1]))
    positions = torch.arange(6)[None] + 3
    rope = base.trunk.rotary_emb(h, positions) if base.trunk is not None else None
    from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

    q, k, v = (getattr(attention, f"{n}_proj")(h).view(1, 6, -1, attention.head_dim).transpose(1, 2) for n in "qkv")
    q, k = apply_rotary_pos_emb(q, k, *rope)
    own = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)
    mask = torch.cat([torch.ones(6, 3, dtype=torch.bool), own], dim=1)
    keys = torch.cat([prefix.key_PHK.transpose(0, 1)[None], k], dim=2).repeat_interleave(2, 1)
    values = torch.cat([prefix.value_PHK.transpose(0, 1)[None], v], dim=2).repeat_interleave(2, 1)
    expected = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=attention.scaling)
    close(seen["out"], expected.transpose(1, 2).reshape(1, 6, -1), 1e-6)


def test_without_an_active_prefix_the_models_own_kernel_runs() -> None:
    base = tiny("llama", dtype=torch.float64)
    before = base.module(input_ids=IDS).logits
    host = host_on(base)
    host.add("l", make_method("lora", rank=2), dtype=torch.float64)
    host.activate("l")
    assert torch.equal(host(input_ids=IDS).logits, before)
    host.detach()
    assert base.module.config._attn_implementation == "sdpa"
    assert torch.equal(base.module(input_ids=IDS).logits, before)


def test_models_that_share_a_config_are_not_mixed_up() -> None:
    first = tiny("llama", dtype=torch.float64)
    second = type(first.module)(first.module.config).double().eval()
    expected = second(input_ids=IDS).logits
    host = host_on(first)
    assert torch.equal(second(input_ids=IDS).logits, expected)
    host.detach()
    assert torch.equal(second(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_text_starts_behind_a_prefix_whichever_layers_have_it_and_whoever_else_is_resident(family: str) -> None:
    outputs = []
    for crowded in (False, True):
        host = Host(tiny(family, dtype=torch.float64))
        for name, layer in (("low", "0"), ("high", "1")):
            if crowded or name == "high":
                method = make_method("prefix", tokens=2, init_std=1.0)
                host.add(name, method, {"include": ["default"], "layers": layer}, dtype=torch.float64)
        host.activate("high")
        outputs.append(host(input_ids=IDS).logits)
        assert host.attention_hub().prefix_lengths(2) == [2, 2]
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_at_some_layers_is_the_same_packed_and_sampled(family: str) -> None:
    host = Host(tiny(family, dtype=torch.float64))
    method = make_method("prefix", tokens=2, init_std=2.0)
    host.add("low", method, {"include": ["default"], "layers": "0"}, dtype=torch.float64)
    host.add("high", method, {"include": ["default"], "layers": "1"}, seed=1, dtype=torch.float64)
    owners: list[str | list[str]] = ["high", "low", ["low", "high"]]
    samples = generate(host, [((5, 9, 20), owner) for owner in owners], SamplingParams(max_tokens=4))
    for owner, sample in zip(owners, samples, strict=True):
        ids = torch.tensor([[5, 9, 20, *sample.tokens]])
        with host.rows([owner]), torch.no_grad():
            expected = host(input_ids=ids[:, :-1]).logits[0, 2:].log_softmax(-1)
        assert sample.tokens == tuple(expected.argmax(-1).tolist())
        assert sample.logprobs == pytest.approx(expected.max(-1).values.tolist(), rel=1e-5)
