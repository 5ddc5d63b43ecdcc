"""The adapter's optimiser against torch's own over separate tensors, and its schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.targets import Targets, select
from lorica.core.errors import ConfigError, MethodError
from lorica.methods import make_method
from lorica.models import tiny
from lorica.training.optimizer import AdamWConfig, AdapterOptimizer, ScheduleName, schedule


def adapter(method: str, **fields: object) -> Adapter:
    backbone = tiny("llama", dtype=torch.float64)
    made = make_method(method, **fields)
    layout = Layout(made, select(backbone.sites, made, Targets.of(None)))
    return Adapter("a", layout, dtype=torch.float64).initialise(backbone.weight)


def fill_gradients(a: Adapter, seed: int) -> None:
    a.grad.copy_(torch.randn(a.grad.shape, generator=torch.Generator().manual_seed(seed), dtype=a.grad.dtype))


@pytest.mark.parametrize(("method", "fields"), [("lora", {}), ("dora", {}), ("vera", {}), ("norm", {})])
def test_flat_groups_step_as_torch_does_over_separate_tensors(method: str, fields: dict[str, object]) -> None:
    a = adapter(method, **fields)
    config = AdamWConfig(lr=0.01, weight_decay=0.1, clip=None, schedule="constant", warmup=0)
    twins = {}
    for site, param, value in a.named_tensors(trainable_only=True):
        twins[site, param] = torch.nn.Parameter(value.detach().clone())
    decays = {key: a.layout.specs[key[0]][key[1]].decay for key in twins}
    theirs = torch.optim.AdamW(
        [
            {"params": [twins[k] for k in twins if decays[k]], "weight_decay": 0.1},
            {"params": [twins[k] for k in twins if not decays[k]], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    ours = AdapterOptimizer(a, config, steps=3)
    for step in range(3):
        fill_gradients(a, step)
        for site, param, value in a.named_tensors(trainable_only=True):
            assert value.grad is not None
            twins[site, param].grad = value.grad.clone()
        ours.step()
        theirs.step()
    for site, param, value in a.named_tensors(trainable_only=True):
        torch.testing.assert_close(value.detach(), twins[site, param].detach(), rtol=1e-12, atol=1e-14)


def test_the_whole_gradient_is_clipped_as_one() -> None:
    a, b = adapter("lora"), adapter("lora")
    fill_gradients(a, 1)
    norm = float(torch.linalg.vector_norm(a.grad))
    b.grad.copy_(a.grad / norm * 0.5)
    config = AdamWConfig(clip=0.5, eps=1.0)  # a large eps, so that the size of the gradient matters
    assert AdapterOptimizer(a, config, steps=2).step() == pytest.approx(norm)
    AdapterOptimizer(b, config, steps=2).step()
    torch.testing.assert_close(a.flat, b.flat, rtol=1e-12, atol=1e-14)


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_reported() -> None:
    a = adapter("lora")
    before = a.flat.clone()
    a.grad[3] = math.nan
    assert math.isnan(AdapterOptimizer(a, AdamWConfig(), steps=2).step())
    assert torch.equal(a.flat, before)
    assert float(a.grad.abs().sum()) == 0.0


def test_a_group_can_have_its_own_rate() -> None:
    a, b = adapter("lora"), adapter("lora")
    plain = AdapterOptimizer(a, AdamWConfig(lr=0.01, schedule="constant", warmup=0))
    faster = AdapterOptimizer(b, AdamWConfig(lr=0.01, schedule="constant", warmup=0, group_lr={"B": 16.0}))
    for x, opt in ((a, plain), (b, faster)):
        fill_gradients(x, 0)
        opt.step()
    start = adapter("lora")
    for (_site, param, v0), (_, _, v1), (_, _, v2) in zip(
        *(x.named_tensors(trainable_only=True) for x in (start, a, b)), strict=True
    ):
        ratio = ((v2 - v0) / (v1 - v0)).detach()
        torch.testing.assert_close(ratio, torch.full_like(ratio, 16.0 if param == "B" else 1.0), rtol=1e-6, atol=1e-6)


def test_a_group_that_the_method_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter group 'C'"):
        AdapterOptimizer(adapter("lora"), AdamWConfig(group_lr={"C": 2.0}))


@given(
    steps=st.integers(1, 200),
    warmup=st.floats(0, 0.5),
    floor=st.floats(0, 1),
    name=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_a_schedule_rises_to_the_peak_and_never_leaves_its_bounds(
    steps: int, warmup: float, floor: float, name: ScheduleName
) -> None:
    factor = schedule(AdamWConfig(warmup=warmup, floor=floor, schedule=name), steps)
    values = [factor(i) for i in range(steps)]
    peak = values.index(max(values))
    assert max(values) <= 1.0 + 1e-12
    assert all(b >= a for a, b in itertools.pairwise(values[: peak + 1]))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(values[peak:]))
    assert factor(steps) >= (floor if name != "constant" else 1.0) - 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_was_cast_is_not_stepped_by_the_optimiser_made_before(dtype: torch.dtype) -> None:
    a = adapter("lora")
    optimizer = AdapterOptimizer(a, AdamWConfig())
    a.to(dtype=dtype)
    fill_gradients(a, 0)
    before = a.flat.clone()
    with pytest.raises(MethodError, match="'a' was moved or cast after its optimiser was made") as caught:
        optimizer.step()
    assert caught.value.hint is not None and "then make the optimiser" in caught.value.hint
    assert torch.equal(a.flat, before) and a.grad.any()
    AdapterOptimizer(a, AdamWConfig()).step()
    assert not torch.equal(a.flat, before)


def test_a_cast_to_what_it_is_already_keeps_adapter_and_optimiser_together() -> None:
    a, b = adapter("lora"), adapter("lora")
    ours, theirs = AdapterOptimizer(a, AdamWConfig()), AdapterOptimizer(b, AdamWConfig())
    assert a.to(device="cpu", dtype=torch.float64) is a
    for x, optimizer in ((a, ours), (b, theirs)):
        fill_gradients(x, 0)
        optimizer.step()
    assert torch.equal(a.flat, b.flat)
    assert not torch.equal(a.flat, adapter("lora").flat)
