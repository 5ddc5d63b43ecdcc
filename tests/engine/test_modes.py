"""Torch's modes around the engine: inference mode before training, autocast, copies and pickles, written weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.engine.sample import generate
from lorica.methods import make_method
from lorica.models import Backbone, tiny
from lorica.sampling.params import SamplingParams
from tests.contract.cases import close, perturb

OWNERS = ["lora", "dora", "vera", "ia3", "norm", "prefix", "prompt", None, ["dora", "lora"]]
FIELDS: dict[str, dict[str, int]] = {
    **{name: {"rank": 2} for name in ("lora", "dora", "vera")},
    **{name: {"tokens": 2} for name in ("prefix", "prompt")},
}
IDS = torch.tensor([[5, 9, 20, 7], [30, 11, 6, 8]])


def resident(base: Backbone, names: Any = ("lora", "dora", "vera", "ia3", "norm", "prefix", "prompt")) -> Host:
    host = Host(base)
    for seed, name in enumerate(names):
        perturb(host.add(name, make_method(name, **FIELDS.get(name, {})), seed=seed), 0.05, seed)
    return host


def items(owners: list[Any]) -> list[Item]:
    rng = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 120, (4 + (5 * i) % 9,), generator=rng).tolist() for i in range(len(owners))]
    return [Item(Example.whole(row), owner) for row, owner in zip(rows, owners, strict=True)]


def train(host: Host, owners: list[Any]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and all gradients of one call."""
    results = Engine(host).forward_backward(items(owners))
    logprobs = torch.tensor([p for r in results for p in r.logprobs])
    grads = torch.cat([adapter.grad.clone() for adapter in host.adapters.values()])
    for adapter in host.adapters.values():
        adapter.zero_grad()
        adapter.forwards = 0
    return logprobs, grads


def sample(host: Host, owners: list[Any]) -> object:
    return generate(host, [((5, 9, 20), owner) for owner in owners], SamplingParams(max_tokens=3))


def score(host: Host, owners: list[Any]) -> object:
    return [(result.loss, result.logprobs.tolist()) for result in Engine(host).forward(items(owners))]


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("first", [sample, score])
def test_training_is_as_ever_after_everything_was_learnt_in_inference_mode(
    family: str, first: Callable[[Host, list[Any]], object]
) -> None:
    host = resident(tiny(family))
    with torch.inference_mode():
        inside = first(host, OWNERS)
    logprobs, grads = train(host, OWNERS)
    expected = train(resident(tiny(family)), OWNERS)
    assert torch.equal(logprobs, expected[0]) and torch.equal(grads, expected[1])
    assert grads.any()
    assert first(host, OWNERS) == inside


@pytest.mark.parametrize("compute", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_and_a_compute_dtype_stay_close_to_float32(compute: torch.dtype | None, dtype: torch.dtype) -> None:
    host = resident(tiny("llama", dtype=dtype))
    exact = resident(tiny("llama", dtype=torch.float32))
    exact.model.load_state_dict(host.model.state_dict())
    exact.backbone.invalidate()
    for name, adapter in host.adapters.items():
        exact.adapter(name).flat.copy_(adapter.flat)
    host.set_compute(compute)
    for name in host.adapters:
        for each in (host, exact):
            each.activate(name)
            each.adapter(name).zero_grad()
        expected = exact(input_ids=IDS).logits
        expected.square().mean().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = host(input_ids=IDS).logits
        found.float().square().mean().backward()
        assert (found.float() - expected).norm() < 0.05 * expected.norm()
        ours, theirs = host.adapter(name).grad, exact.adapter(name).grad
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.15 * theirs.norm()


@pytest.mark.parametrize("compute", [None, torch.float32], ids=str)
def test_the_engine_under_autocast_stays_close_to_float32(compute: torch.dtype | None) -> None:
    host = resident(tiny("llama"))
    expected, slopes = train(host, OWNERS)
    host.set_compute(compute)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, grads = train(host, OWNERS)
        samples: Any = sample(host, OWNERS)
    assert (found - expected).abs().max() < 0.15
    assert (grads - slopes).norm() < 0.1 * slopes.norm()
    assert all(len(row.tokens) == 3 for row in samples)
    again, same = train(host.set_compute(None), OWNERS)
    assert torch.equal(again, expected) and torch.equal(same, slopes)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda base: pickle.loads(pickle.dumps(base))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_copy_of_a_backbone_that_the_engine_ran_starts_afresh(
    copier: Callable[[Backbone], Backbone], family: str
) -> None:
    host = resident(tiny(family))
    expected = train(host, OWNERS)
    sample(host, OWNERS)
    base = host.detach()
    assert base.kept
    twin = copier(base)
    assert not twin.kept
    with torch.no_grad():
        for parameter in base.module.parameters():
            parameter.zero_()
    found = train(resident(twin), OWNERS)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def _in_place(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.mul_(1.5)


def _replaced(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(1.5 * parameter.detach(), requires_grad=False))


def _loaded(module: nn.Module) -> None:
    module.load_state_dict({key: 1.5 * value for key, value in module.state_dict().items()})


@pytest.mark.parametrize("write", [_in_place, _replaced, _loaded])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj", "model.norm", "model.embed_tokens"])
def test_a_frozen_weight_that_was_written_is_seen_by_the_next_pass(
    write: Callable[[nn.Module], None], name: str
) -> None:
    host = resident(tiny("qwen3"), ("lora", "dora", "ia3"))
    owners = ["lora", "dora", "ia3", None]
    before = train(host, owners)
    sample(host, owners)
    write(host.model.get_submodule(name))
    found, grads = train(host, owners)
    base = tiny("qwen3")
    write(base.module.get_submodule(name))
    fresh = resident(base, ())
    for own in host.adapters.values():  # their initial values were made from the weights of before
        fresh.put(copy.deepcopy(own))
    expected = train(fresh, owners)
    close(found, expected[0], 1e-6)
    close(grads, expected[1], 1e-6)
    assert not torch.allclose(found, before[0])
    assert sample(host, owners) == sample(fresh, owners)
