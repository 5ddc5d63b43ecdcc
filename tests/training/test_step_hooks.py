"""A method's step hooks: what they see, when they run, and that what they keep is saved and restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.targets import Targets, select
from lorica.core.errors import FormatError
from lorica.core.site import Site
from lorica.core.update import ParamSpec
from lorica.methods.base import Step
from lorica.methods.lora import LoRA
from lorica.training.optimizer import AdamStep, AdapterOptimizer
from tests.tiny import tiny


class Counting(LoRA):
    """LoRA that counts its steps, keeps a running sum of B's gradient, and halves A's gradient."""

    name: ClassVar[str] = "counting"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {**super().params(site), "count": ParamSpec((), trainable=False, changes=True)}

    def before_step(self, step: Step) -> None:
        for name, own in step.sites.items():
            own.grads["A"].mul_(0.5)
            step.state[name] = step.state.get(name, torch.zeros_like(own.grads["B"])) + own.grads["B"]

    def after_step(self, step: Step) -> None:
        for own in step.sites.values():
            own.values["count"].add_(1)


class Plain(Counting):
    """The same, stepped by SGD, with a factor on B."""

    name: ClassVar[str] = "plain"

    @property
    def plain_steps(self) -> bool:
        return True

    def group_lr(self) -> Mapping[str, float]:
        return {"B": 4.0}


def adapter(method: LoRA, dtype: torch.dtype = torch.float64) -> Adapter:
    backbone = tiny("llama", dtype=torch.float64)
    layout = Layout(method, select(backbone.sites, method, Targets.of(["q_proj"])))
    return Adapter("a", layout, dtype=dtype).initialise(backbone.weight)


def fill(a: Adapter, value: float = 1.0) -> None:
    a.grad.fill_(value)


def test_a_plain_method_steps_by_its_gradient_times_the_group_s_factor() -> None:
    a = adapter(Plain(rank=2))
    before = a.flat.clone()
    fill(a)
    AdapterOptimizer(a).step(AdamStep(0.1))
    moved = before - a.flat
    for group in a.layout.groups:
        own = moved[group.start : group.stop]
        expected = 0.1 * 0.5 if group.name == "A" else 0.1 * 4
        torch.testing.assert_close(own, torch.full_like(own, expected))


def test_weight_decay_of_a_plain_step_is_decoupled() -> None:
    a = adapter(Plain(rank=2))
    before = a.flat.clone()
    fill(a, 0.0)
    AdapterOptimizer(a).step(AdamStep(0.1, weight_decay=0.5))
    for group in a.layout.groups:
        factor = 4 if group.name == "B" else 1
        torch.testing.assert_close(
            a.flat[group.start : group.stop], before[group.start : group.stop] * (1 - 0.1 * factor * 0.5)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_changes_is_float32_and_counts_optimiser_steps(dtype: torch.dtype) -> None:
    a = adapter(Counting(rank=2), dtype)
    optimizer = AdapterOptimizer(a)
    for _ in range(3):
        fill(a)
        optimizer.step(AdamStep(0.1))
    assert {float(v) for v in a.changing().values()} == {3.0}
    assert {v.dtype for v in a.to(dtype=torch.float32).changing().values()} == {torch.float32}


def test_two_adapters_do_not_share_what_changes() -> None:
    a, b = adapter(Counting(rank=2)), adapter(Counting(rank=2))
    fill(a)
    AdapterOptimizer(a).step(AdamStep(0.1))
    assert {float(v) for v in a.changing().values()} == {1.0}
    assert {float(v) for v in b.changing().values()} == {0.0}


def test_a_gradient_that_is_not_finite_runs_no_hook() -> None:
    a = adapter(Counting(rank=2))
    optimizer = AdapterOptimizer(a)
    fill(a, float("nan"))
    optimizer.step(AdamStep(0.1))
    assert {float(v) for v in a.changing().values()} == {0.0}
    assert optimizer.tensors() == {}


@pytest.mark.parametrize("method", [Counting(rank=2), Plain(rank=2)])
def test_a_restored_optimiser_continues_what_its_method_keeps(method: LoRA) -> None:
    whole, first = adapter(method), adapter(method)
    one, two = AdapterOptimizer(whole), AdapterOptimizer(first)
    for step in range(4):
        fill(whole, step + 1.0)
        one.step(AdamStep(0.01))
        if step == 2:  # the second goes on in another process
            third = adapter(method)
            third.flat.copy_(first.flat)
            for name, value in third.changing().items():
                value.copy_(first.changing()[name])
            fresh = AdapterOptimizer(third)
            fresh.load_state_dict(two.state_dict())
            first, two = third, fresh
        fill(first, step + 1.0)
        two.step(AdamStep(0.01))
    assert torch.equal(whole.flat, first.flat)
    assert one.tensors().keys() == two.tensors().keys()
    for name, value in one.tensors().items():
        assert torch.equal(value, two.tensors()[name])
    assert whole.changing().keys() == first.changing().keys() != set()
    for name, value in whole.changing().items():
        assert torch.equal(value, first.changing()[name])


def test_state_of_a_method_without_hooks_is_refused() -> None:
    a = adapter(Counting(rank=2))
    optimizer = AdapterOptimizer(a)
    fill(a)
    optimizer.step(AdamStep(0.1))
    plain = adapter(LoRA(rank=2))
    with pytest.raises(FormatError, match="which method 'lora' does not keep"):
        AdapterOptimizer(plain).restore(optimizer.tensors(), 1)


def test_draws_of_a_step_depend_on_the_adapter_s_seed_and_the_step_alone() -> None:
    drawn: list[float] = []

    class Drawing(LoRA):
        name: ClassVar[str] = "drawing"

        def after_step(self, step: Step) -> None:
            drawn.append(float(torch.rand((), generator=step.rng)))

    for _ in range(2):
        a = adapter(Drawing(rank=2))
        optimizer = AdapterOptimizer(a)
        for _ in range(2):
            fill(a)
            optimizer.step(AdamStep(0.1))
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]
