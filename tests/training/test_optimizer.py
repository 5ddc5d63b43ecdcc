"""The adapter's optimiser against torch's own over separate tensors, and its schedule."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.targets import Targets, select
from lorica.core.errors import ConfigError, FormatError, MethodError
from lorica.methods import make_method
from lorica.training.optimizer import AdamStep, AdamWConfig, AdapterOptimizer, ScheduleName, schedule
from tests.tiny import tiny


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


@pytest.mark.parametrize("method", ["lora", "dora", "norm"])
def test_settings_of_each_step_act_as_torch_does_with_them(method: str) -> None:
    a = adapter(method)
    twin = torch.nn.Parameter(a.flat.clone())
    theirs = torch.optim.AdamW([twin])
    ours = AdapterOptimizer(a)
    decays = [span for span in a.layout.groups if not span.decay]
    for step, settings in enumerate([AdamStep(0.1, (0.5, 0.9), 1e-3, 0.0), AdamStep(0.01, (0.0, 0.0), 1e4, 0.5)]):
        fill_gradients(a, step)
        twin.grad = a.grad.clone()
        before = twin.detach().clone()
        group = theirs.param_groups[0]
        group.update(lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
        ours.step(settings)
        theirs.step()
        for span in decays:  # torch decayed these; we must not
            twin.data[span.start : span.stop] += settings.lr * settings.weight_decay * before[span.start : span.stop]
        torch.testing.assert_close(a.flat, twin.detach(), rtol=1e-9, atol=1e-12)


def test_moments_are_made_by_the_first_step() -> None:
    a = adapter("lora")
    optimizer = AdapterOptimizer(a)
    assert optimizer.tensors() == {} and a._grad is None
    optimizer.step(AdamStep(0.1))
    assert {name: row.shape for name, row in optimizer.tensors().items()} == {
        "exp_avg": a.flat.shape,
        "exp_avg_sq": a.flat.shape,
    }


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_optimiser_that_was_taken_and_given_back_continues_bit_for_bit(done: int) -> None:
    a, b = adapter("dora"), adapter("dora")
    first, second = AdapterOptimizer(a), AdapterOptimizer(b)
    for step in range(done):
        fill_gradients(a, step)
        first.step(AdamStep(0.05, weight_decay=0.1))
    b.flat.copy_(a.flat)
    second.restore(first.tensors(), first.done)
    for step in range(3):
        for x, optimizer in ((a, first), (b, second)):
            fill_gradients(x, 10 + step)
            optimizer.step(AdamStep(0.05, weight_decay=0.1, clip=0.5))
    assert torch.equal(a.flat, b.flat)
    assert all(torch.equal(first.tensors()[name], second.tensors()[name]) for name in first.tensors())


def test_moments_of_another_adapter_are_refused() -> None:
    small, large = AdapterOptimizer(adapter("lora", rank=2)), AdapterOptimizer(adapter("lora", rank=3))
    small.step(AdamStep(0.1))
    with pytest.raises(FormatError, match="'exp_avg' has shape"):
        large.restore(small.tensors(), 1)
    with pytest.raises(FormatError, match="after 1 steps has exp_avg and exp_avg_sq; this one has none"):
        large.restore({}, 1)


@pytest.mark.parametrize("lr", [1e30, 1e38, 1e300])
def test_an_absurd_rate_spoils_its_own_adapter_and_raises_nothing(lr: float) -> None:
    a = adapter("lora").to(dtype=torch.float32)
    optimizer = AdapterOptimizer(a)
    for step in range(3):
        fill_gradients(a, step)
        optimizer.step(AdamStep(lr, weight_decay=0.1))
    assert not (a.flat.abs() < 1e20).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": 0.1, "betas": (0.9, 1.0)}, "beta2 is 1.0"),
        ({"lr": 0.1, "eps": math.nan}, "eps is nan"),
        ({"lr": 0.1, "clip": -1.0}, "clip is -1.0"),
    ],
)
def test_settings_that_no_step_can_have_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AdamStep(**fields)
