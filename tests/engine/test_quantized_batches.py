"""Every registered method on a quantised base is that method on a dense base that holds the dequantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.engine.sample import generate
from lorica.methods import all_methods
from lorica.models import Backbone
from lorica.models.builtin import FAMILIES
from lorica.models.quantize.apply import quantize_backbone
from lorica.models.quantize.config import Quantization
from lorica.models.quantize.linear import QuantizedLinear
from lorica.sampling.params import SamplingParams
from lorica.training.optimizer import AdamWConfig, AdapterOptimizer
from tests.contract.cases import CASES, METHODS, TINY, Case, add, close, gradient, inputs, output, small
from tests.tiny import tiny

KINDS = ["nf4", "nvfp4"]
CAUSAL = ["llama", "qwen3-moe", "gpt2"]
LINEAR = [name for name, cls in METHODS.items() if "linear" in cls.kinds]


def pair(family: str, kind: str = "nf4", dtype: torch.dtype = torch.float64) -> tuple[Backbone, Backbone]:
    """A quantised base, and a dense one that holds its dequantised weights."""
    dense = tiny(family, dtype=dtype, **TINY.get(family, {}))
    quantised = quantize_backbone(tiny(family, dtype=dtype, **TINY.get(family, {})), Quantization(kind=kind))
    quantised.packed_from(lambda: tiny(family, dtype=dtype, **TINY.get(family, {})))
    assert dense.sites == quantised.sites
    with torch.no_grad():
        for name in quantised.sites:
            if quantised.weight(name).packed is not None:
                dense.weight(name).matrix().copy_(quantised.weight(name).matrix())
    dense.invalidate()
    return quantised, dense


def crowd(base: Backbone, family: str) -> tuple[Host, list[str | list[str] | None]]:
    """An adapter of every method that fits, and who each row belongs to."""
    host = Host(base)
    for index, name in enumerate(METHODS):
        if Case(family, name) in CASES:
            add(host, name, small(name), seed=index, head=False)
    add(host, "tall", small("lora", rank=4), seed=40, head=False)
    names = list(host.adapters)
    rows: list[str | list[str] | None] = [*names, None, ["ia3", "lora"], "lora", None]
    return host, rows


def as_on(host: Host, other: Host) -> Host:
    """The host with the values of another's adapters, where initial values depend on what packing took (LoftQ)."""
    for name, adapter in host.adapters.items():
        if adapter.method.restores_rounding:
            adapter.flat.copy_(other.adapter(name).flat)
    return host


def packed_bits(base: Backbone) -> dict[str, Tensor]:
    state = base.module.state_dict()
    return {name: tensor.detach().clone().reshape(-1).view(torch.uint8) for name, tensor in state.items()}


def examples(rows: int) -> list[Example]:
    rng = torch.Generator().manual_seed(3)
    found = []
    for row in range(rows):
        length = 3 + (5 * row) % 9
        tokens = torch.randint(3, 120, (length,), generator=rng).tolist()
        found.append(Example(tuple(tokens), (0.0, *[1.0] * (length - 1)), f"row {row}"))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LINEAR)
def test_one_method_has_the_outputs_and_gradients_of_the_dense_base(name: str, kind: str) -> None:
    family = "gpt2" if Case("gpt2", name) in CASES else "llama"
    found, first = [], None
    for base in pair(family, kind):
        host = Host(base)
        add(host, "a", small(name), head=False)
        first = as_on(host, first or host)
        host.activate("a")
        before = packed_bits(base)
        given = inputs(host)
        found.append((output(host, given).detach(), gradient(host, "a", given)))
        assert all(torch.equal(before[k], v) for k, v in packed_bits(base).items()), "the base is as it was"
        assert all(p.grad is None for p in base.module.parameters())
    assert found[0][1].any()
    close(found[0][0], found[1][0], 1e-11)
    close(found[0][1], found[1][1], 1e-10)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "conv"])
def test_a_mixed_batch_of_every_method_is_that_of_the_dense_base(family: str) -> None:
    found, first = [], None
    for base in pair(family):
        host, rows = crowd(base, family)
        first = as_on(host, first or host)
        rows = [row for row in rows if row != "prompt" or "prompt" in host.adapters]
        given = inputs(host, rows=len(rows), length=5)
        with host.rows(rows):
            y = output(host, given)
            y.square().sum().backward()
        found.append((y.detach(), torch.cat([a.grad for a in host.adapters.values()])))
    close(found[0][0], found[1][0], 1e-10)
    close(found[0][1], found[1][1], 1e-9)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_engines_packed_batches_are_those_of_the_dense_base(family: str) -> None:
    found, first = [], None
    for base in pair(family):
        host, rows = crowd(base, family)
        first = as_on(host, first or host)
        before = packed_bits(base)
        items = [Item(example, owner) for example, owner in zip(examples(len(rows)), rows, strict=True)]
        results = Engine(host, token_budget=40).forward_backward(items)
        losses = torch.tensor([r.loss for r in results], dtype=torch.float64)
        found.append((losses, torch.cat([a.grad for a in host.adapters.values()])))
        assert all(torch.equal(before[k], v) for k, v in packed_bits(base).items())
    close(found[0][0], found[1][0], 1e-6)
    close(found[0][1], found[1][1], 1e-8)


@pytest.mark.parametrize("family", CAUSAL)
def test_sampling_and_streaming_a_mix_take_the_tokens_of_the_dense_base(family: str) -> None:
    found, first = [], None
    for base in pair(family):
        host, rows = crowd(base, family)
        first = as_on(host, first or host)
        prompts = [([5 + i, 9, 20 + i, 7][: 1 + i % 4], owner) for i, owner in enumerate(rows)]
        samples = generate(host, prompts, SamplingParams(max_tokens=3))
        found.append([(s.tokens, s.logprobs) for s in samples])
    for (tokens, logprobs), (wanted, expected) in zip(*found, strict=True):
        assert tokens == wanted
        assert logprobs == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_a_method_trains_saves_and_loads_on_a_quantised_base(name: str, tmp_path: Path) -> None:
    family = "gpt2" if Case("gpt2", name) in CASES else "llama"
    base, _ = pair(family, dtype=torch.float32)
    before = packed_bits(base)
    host = Host(base)
    adapter: Adapter = add(host, "a", small(name), head=False, move=0.0)
    engine, optimizer = Engine(host), AdapterOptimizer(adapter, AdamWConfig(lr=1e-2), steps=3)
    losses = []
    for _ in range(3):
        losses.append(sum(r.loss for r in engine.forward_backward([Item(e, "a") for e in examples(4)])))
        optimizer.step(scale=0.1)
    assert losses[-1] != losses[0]
    assert all(torch.equal(before[k], v) for k, v in packed_bits(base).items())
    if name not in all_methods():
        return  # a stand-in, which no file names
    host.save(tmp_path / "a", "a")
    again = Host(pair(family, dtype=torch.float32)[0])
    loaded = again.load(tmp_path / "a", "b")
    assert torch.equal(loaded.flat, adapter.flat)
    given = inputs(host)
    host.activate("a")
    again.activate("b")
    assert torch.equal(output(again, given), output(host, given))


def counting(patch: pytest.MonkeyPatch) -> list[str]:
    """What is dequantised from now on, by the name of its format."""
    calls: list[str] = []
    plain = QuantizedLinear.dense

    def dense(module: QuantizedLinear, dtype: torch.dtype | None = None) -> Tensor:
        calls.append(module.form.name)
        return plain(module, dtype)

    patch.setattr(QuantizedLinear, "dense", dense)
    return calls


def test_a_layer_is_dequantised_as_often_for_many_tenants_as_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for tenants in (1, 6):
        base, _ = pair("llama")
        host = Host(base)
        for index in range(tenants):
            add(
                host, f"t{index}", small(("lora", "dora")[index % 2] if tenants > 1 else "dora"), seed=index, head=False
            )
        engine = Engine(host)
        items = [Item(e, f"t{i % tenants}") for i, e in enumerate(examples(6))]
        engine.forward_backward(items)  # what is kept is made
        with monkeypatch.context() as patch:
            calls = counting(patch)
            engine.forward_backward(items)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_no_dense_copy_of_a_packed_weight_outlives_a_pass() -> None:
    base, _ = pair("llama", dtype=torch.float32)
    host = Host(base)
    add(host, "a", small("dora"), head=False)
    Engine(host).forward_backward([Item(e, "a") for e in examples(3)])
    generate(host, [([5, 6], "a")], SamplingParams(max_tokens=2))
    groups = base.kept["groups"]
    for group in groups:
        packed = [m.site for m in group.members if base.weight(m.site).packed is not None]
        assert not packed or (not group.maps.dense and not group.maps.packs)
    assert all(base.weight(name)._dense is None for name in base.sites)


@pytest.mark.parametrize("kind", ["nf4", "nf3", "uniform4", "nvfp4"])
def test_in_half_precision_step_zero_is_the_quantised_base_bit_for_bit(kind: str) -> None:
    quantised, dense = pair("llama", kind, torch.bfloat16)
    assert quantised.dtype == torch.bfloat16 and quantised.device == torch.device("cpu")
    given = inputs(quantised)
    base = output(quantised, given)
    assert torch.equal(base, output(dense, given))
    assert not torch.equal(base, output(tiny("llama", dtype=torch.bfloat16, **TINY["llama"]), given))
    host = Host(quantised)
    host.add("a", small("lora"), "all-linear")
    host.activate("a")
    assert torch.equal(output(host, given), base)
    with host.disabled():
        assert torch.equal(output(host, given), base)


def test_checkpointing_on_a_quantised_base_changes_no_gradient() -> None:
    grads = []
    for checkpointed in (False, True):
        host = Host(pair("llama")[0])
        adapter = add(host, "a", small("lora"), head=False)
        if checkpointed:
            host.checkpointing()
        Engine(host).forward_backward([Item(e, "a") for e in examples(4)])
        grads.append(adapter.grad.clone())
    close(grads[1], grads[0], 1e-12)
