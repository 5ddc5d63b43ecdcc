"""Sampling mixed adapters, ragged prompts, virtual tokens, stops and limits, against the engine's own forward pass."""

from __future__ import annotations

import pytest
import torch

from lorica.core.errors import DataError, MethodError, RouteError
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.engine.sample import generate
from lorica.methods.delta import Delta
from lorica.methods.dora import DoRA
from lorica.methods.ia3 import IA3
from lorica.methods.lora import LoRA
from lorica.methods.norm import Norm
from lorica.methods.prefix import Prefix
from lorica.methods.prompt import Prompt
from lorica.methods.vera import VeRA
from lorica.models.factory import make_tiny
from lorica.sampling.params import SamplingParams

METHODS = {
    "lora": LoRA(rank=4),
    "wide": LoRA(rank=12, lora_bias=True),
    "prefix": Prefix(tokens=3),
    "soft": Prompt(tokens=5),
    "dora": DoRA(rank=4),
    "ia3": IA3(),
    "vera": VeRA(rank=6),
    "norm": Norm(),
    "delta": Delta(),
}
SPECS = [
    *("lora", None, "prefix", "soft", "dora", "ia3", "vera", "norm", "delta", "wide", "lora", "lora"),
    *(("lora", "dora"), ("lora", "wide"), ("prefix", "lora"), ("soft", "wide")),
]


def served(family="qwen3", names=tuple(METHODS), **overrides):
    host = Host(make_tiny(family, **overrides))
    for seed, name in enumerate(names):
        adapter = host.add(name, METHODS[name], seed=seed)
        noise = torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed))
        adapter.flat.add_(0.1 * noise)
    return host


def prompts(count, longest=9):
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(3, 128, (1 + (5 * k) % longest,), generator=rng).tolist() for k in range(count)]


def forced(host, prompt, spec, sample):
    """The engine's log-probabilities of a sample's tokens, alone in its batch."""
    tokens = (*prompt, *sample.tokens)
    result = Engine(host).forward([Item(Example.whole(tokens), spec)])[0]
    return result.logprobs[-len(sample.tokens) :]


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma", "gpt2", "qwen3-moe"])
def test_log_probabilities_of_a_mixed_ragged_batch_are_those_of_the_engines_forward(family):
    host = served(family)
    rows = list(zip(prompts(len(SPECS)), SPECS, strict=True))
    params = SamplingParams(max_tokens=7, temperature=1.0, seed=3, stop_ids=(5, 7, 9, 11))
    for (prompt, spec), sample in zip(rows, generate(host, rows, params), strict=True):
        assert torch.tensor(sample.logprobs) == pytest.approx(
            torch.tensor(forced(host, prompt, spec, sample)), abs=1e-4
        )
        assert sample.stopped == (sample.tokens[-1] in params.stop_ids)
        assert sample.stopped or len(sample.tokens) == 7


def test_a_row_samples_the_same_tokens_alone_and_in_any_batch():
    host = served()
    rows = list(zip(prompts(len(SPECS)), SPECS, strict=True))
    params = SamplingParams(max_tokens=6, temperature=0.8, top_p=0.95, stop_ids=(5, 7, 9))
    seeds = list(range(100, 100 + len(rows)))
    together = generate(host, rows, params, seeds=seeds)
    backwards = generate(host, rows[::-1], params, seeds=seeds[::-1])[::-1]
    alone = [generate(host, [row], params, seeds=[seed])[0] for row, seed in zip(rows, seeds, strict=True)]
    assert [s.tokens for s in together] == [s.tokens for s in backwards] == [s.tokens for s in alone]


def test_the_seed_of_the_settings_decides_and_greedy_sampling_needs_none():
    host, row = served(names=("lora",)), ([4, 5, 6], "lora")
    draws = {generate(host, [row], SamplingParams(max_tokens=8, temperature=1.0, seed=s))[0].tokens for s in range(4)}
    greedy = {generate(host, [row], SamplingParams(max_tokens=8, seed=s))[0].tokens for s in range(4)}
    assert len(draws) > 1
    assert len(greedy) == 1
    twice = generate(host, [row, row], SamplingParams(max_tokens=8, temperature=1.0))
    assert twice[0].tokens != twice[1].tokens, "two rows of a call draw from different generators"


def test_greedy_tokens_are_those_of_transformers_generate():
    host = served(names=("lora",))
    prompt = prompts(1)[0] + [17, 21]
    host.activate("lora")
    wanted = host.model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    host.activate()
    assert generate(host, [(prompt, "lora")], SamplingParams(max_tokens=10))[0].tokens == tuple(wanted)


def test_finished_rows_leave_the_batch():
    host = served(names=("lora",))
    rows = [(prompt, "lora") for prompt in prompts(8)]
    tokens = [sample.tokens for sample in generate(host, rows, SamplingParams(max_tokens=12))]
    stops = tuple({sample[2] for sample in tokens[:5]})
    widths = []
    hook = host.backbone.trunk.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    cut = generate(host, rows, SamplingParams(max_tokens=12, stop_ids=stops))
    hook.remove()
    steps = [rows_ for rows_, one in widths[1:]]
    assert steps == sorted(steps, reverse=True)
    assert min(steps) < max(steps) <= 8
    for sample, whole in zip(cut, tokens, strict=True):
        assert sample.tokens == whole[: len(sample.tokens)]


def test_the_model_and_its_routing_are_as_before_afterwards():
    host = served(names=("lora", "dora"))
    host.activate("dora")
    before = {name: module.__dict__.get("forward") for name, module in host.model.named_modules()}
    state = {key: value.clone() for key, value in host.model.state_dict().items()}
    generate(host, [([3, 4], "lora"), ([5], None)], SamplingParams(max_tokens=3))
    with pytest.raises(RouteError):
        generate(host, [([3, 4], "lora"), ([5], "nobody")], SamplingParams(max_tokens=3))
    assert {name: module.__dict__.get("forward") for name, module in host.model.named_modules()} == before
    assert host.active == ("dora",)
    assert host.executor.memo is None
    assert host.attention_hub().cache is None
    assert all(torch.equal(host.model.state_dict()[key], value) for key, value in state.items())


def test_sampling_sees_an_adapters_values_and_a_bases_weights_as_they_are_at_each_call():
    host, row = served(names=("lora",)), ([4, 5, 6], "lora")
    params = SamplingParams(max_tokens=6)
    first = generate(host, [row], params)[0]
    host.adapter("lora").flat.mul_(4.0)
    second = generate(host, [row], params)[0]
    assert second.logprobs == pytest.approx(forced(host, *row, second), abs=1e-4)
    assert second.logprobs != first.logprobs
    with torch.no_grad():
        host.model.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    third = generate(host, [row], params)[0]
    assert third.logprobs == pytest.approx(forced(host, *row, third), abs=1e-4)


def test_an_adapter_that_only_samples_has_no_gradient_row():
    host = served(names=("lora", "dora", "prefix"))
    generate(host, [([3, 4], "lora"), ([5], "dora"), ([6], "prefix")], SamplingParams(max_tokens=3))
    assert all(adapter._grad is None for adapter in host.adapters.values())


def test_a_bfloat16_base_samples_close_to_the_engines_forward():
    host = served(names=("lora", "dora"), dtype=torch.bfloat16)
    rows = [(prompt, name) for prompt in prompts(3) for name in ("lora", "dora")]
    for (prompt, name), sample in zip(rows, generate(host, rows, SamplingParams(max_tokens=5)), strict=True):
        assert sample.logprobs == pytest.approx(forced(host, prompt, name, sample), abs=0.1)


def test_more_adapters_than_the_joint_product_takes_agree_too():
    host = Host(make_tiny("qwen3"))
    for i in range(9):
        host.add(f"a{i}", LoRA(rank=2 + i % 3), seed=i).flat.add_(0.05)
    names = ["a0", "a1", "a1", "a2", "a3", None, "a4", "a5", "a6", "a7", "a8", "a8", "a8"]
    rows = list(zip(prompts(len(names)), names, strict=True))
    for (prompt, name), sample in zip(rows, generate(host, rows, SamplingParams(max_tokens=4)), strict=True):
        assert sample.logprobs == pytest.approx(forced(host, prompt, name, sample), abs=1e-4)


def test_an_adapter_on_the_output_head_and_on_the_embedding_is_sampled_with():
    host = Host(make_tiny("llama"))
    host.add("head", LoRA(rank=4), ["lm_head", "embed_tokens"]).flat.add_(0.1)
    row = ([4, 5, 6], "head")
    sample = generate(host, [row], SamplingParams(max_tokens=5))[0]
    assert sample.logprobs == pytest.approx(forced(host, *row, sample), abs=1e-4)


def test_a_sliding_window_hides_what_it_hides_in_the_packed_pass():
    windowed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    host = served(names=("lora", "prefix"), layer_types=["sliding_attention", "full_attention"], **windowed)
    rows = [(prompts(3)[2] + [9, 8, 7, 6], "lora"), ([3, 4], "prefix"), ([3, 4, 5, 6, 7], None)]
    for (prompt, name), sample in zip(rows, generate(host, rows, SamplingParams(max_tokens=9)), strict=True):
        assert sample.logprobs == pytest.approx(forced(host, prompt, name, sample), abs=1e-4)


def test_a_prefix_at_some_attention_modules_shifts_the_text_at_all_of_them():
    host = served(names=("lora",))
    host.add("half", Prefix(tokens=3), {"layers": "1"})
    rows = [([3, 4, 5], "half"), ([6], ("half", "lora")), ([7, 8], "lora")]
    for (prompt, spec), sample in zip(rows, generate(host, rows, SamplingParams(max_tokens=5)), strict=True):
        assert sample.logprobs == pytest.approx(forced(host, prompt, spec, sample), abs=1e-4)


def test_long_generations_go_on_where_the_reserved_cache_ends(monkeypatch):
    monkeypatch.setattr("lorica.engine.kv_cache.GROWTH", 3)
    host = served(names=("lora",))
    rows = [(prompt, "lora") for prompt in prompts(3)]
    for (prompt, name), sample in zip(rows, generate(host, rows, SamplingParams(max_tokens=20)), strict=True):
        assert len(sample.tokens) == 20
        assert sample.logprobs == pytest.approx(forced(host, prompt, name, sample), abs=1e-4)


def test_prompts_beyond_one_passes_budget_are_read_in_several(monkeypatch):
    host = served(names=("lora", "soft", "prefix"))
    rows = list(zip(prompts(7), ["lora", "soft", None, "prefix", "lora", "soft", "prefix"], strict=True))
    params = SamplingParams(max_tokens=4, temperature=1.0)
    whole = generate(host, rows, params)
    monkeypatch.setattr("lorica.engine.sample.PROMPT_BUDGET", 10)
    assert [s.tokens for s in generate(host, rows, params)] == [s.tokens for s in whole]


def test_positions_beyond_the_models_are_refused_and_the_hint_says_what_fits():
    host = served(names=("lora", "soft"))
    assert len(generate(host, [([3] * 500, "lora")], SamplingParams(max_tokens=13))[0].tokens) == 13
    with pytest.raises(
        DataError, match="500 tokens, and 14 are to be sampled: 513 positions, but this model has 512"
    ) as e:
        generate(host, [([3], None), ([3] * 500, "lora")], SamplingParams(max_tokens=14))
    assert e.value.hint == "Shorten the prompt, or set max_tokens to at most 13."
    with pytest.raises(DataError, match="Prompt 0 has 500 tokens and 5 virtual tokens"):
        generate(host, [([3] * 500, "soft")], SamplingParams(max_tokens=9))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([([3], "lora"), ([], "lora")], "Prompt 1 is empty"),
        ([([3, 128], "lora")], "Prompt 0 has token id 128; this model's ids are 0 to 127"),
        ([([3, -1], "lora")], "Prompt 0 has token id -1"),
    ],
)
def test_prompts_that_cannot_be_read_are_named(rows, message):
    with pytest.raises(DataError, match=message):
        generate(served(names=("lora",)), rows, SamplingParams(max_tokens=2))


def test_a_model_that_predicts_no_next_token_is_refused():
    with pytest.raises(MethodError, match="not a causal language model"):
        generate(Host(make_tiny("bert")), [([3], None)], SamplingParams(max_tokens=2))


def test_as_many_seeds_as_prompts():
    with pytest.raises(DataError, match="1 prompts and 2 seeds"):
        generate(served(names=("lora",)), [([3], "lora")], SamplingParams(max_tokens=2), seeds=[1, 2])
    assert generate(served(names=("lora",)), [], SamplingParams(max_tokens=2)) == []
