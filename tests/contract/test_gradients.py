"""Gradients of every method are those of the dense reference, and reach every tensor of the adapter."""

from __future__ import annotations

import pytest
import torch

from lorica.training.optimizer import AdamStep, AdapterOptimizer
from tests.contract.cases import (
    SMOOTH,
    Case,
    add,
    attached,
    close,
    every,
    every_kind,
    every_setting,
    every_variant,
    gradient,
    holds_weights,
    inputs,
    loss,
    output,
    perturb,
    run_dense,
    small,
)


@every_variant
def test_outputs_and_gradients_are_those_of_the_base_with_effective_weights(case: Case) -> None:
    if not holds_weights(case.make()):
        return  # prompts and prefixes have no effective weight; see tests/methods
    host = attached(case)
    given, adapter = inputs(host), host.adapter("a")
    y = output(host, given)
    found = gradient(host, "a", given)
    adapter.zero_grad()
    reference = run_dense(host, [adapter], given)
    loss(reference).backward()
    close(y, reference, 1e-11)
    close(found, adapter.collect_grad(), 1e-9)


@every
def test_the_gradient_is_the_slope_of_the_loss_in_any_direction(case: Case) -> None:
    smooth = Case(case.family, case.method, tuple(SMOOTH.get(case.method, {}).items()))
    host = attached(
        smooth, **({"num_experts_per_tok": 4} if case.family == "qwen3-moe" else {})
    )  # a choice has no slope
    given, adapter = inputs(host), host.adapter("a")
    slopes = gradient(host, "a", given)
    start, step = adapter.flat.clone(), 4e-3
    for seed in range(2):
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed), dtype=start.dtype).to(start)
        direction = slopes / slopes.norm() + noise / noise.norm()
        values = {}
        for steps in (-2, -1, 1, 2):
            adapter.flat.copy_(start + steps * step * direction)
            with torch.no_grad():
                values[steps] = float(loss(output(host, given)))
        adapter.flat.copy_(start)
        # five-point rule; norms and rotations of transformers models are in float32 whatever the weights are
        expected = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)
        assert float(slopes @ direction) == pytest.approx(expected, rel=1e-3)


@every_setting
def test_every_trained_tensor_gets_a_gradient_within_two_steps(case: Case) -> None:
    host = attached(case, move=0.0)
    given, adapter = inputs(host, rows=4, length=12), host.adapter("a")
    optimizer = AdapterOptimizer(adapter, steps=10**6)  # of a long run, in which nothing is pruned yet
    for _ in range(2):
        assert gradient(host, "a", given).isfinite().all()
        optimizer.step(AdamStep(1e-3))
    gradient(host, "a", given)
    for site, owned in adapter.layout.places.items():
        for param in owned:
            grad = adapter.tensors(site)[param].grad
            assert grad is not None and grad.any(), f"{site} {param}"


@every
def test_every_trained_tensor_changes_the_output(case: Case) -> None:
    host = attached(case)
    given, adapter = inputs(host, rows=4, length=12), host.adapter("a")
    with torch.no_grad():
        y = output(host, given)
        for site, owned in list(adapter.layout.places.items())[:: max(1, len(adapter.layout.places) // 3)]:
            for param, place in owned.items():
                before = adapter.flat.clone()
                adapter.flat[place.offset : place.offset + place.size].mul_(1.5).add_(0.01)
                assert not torch.equal(output(host, given), y), f"{site} {param}"
                adapter.flat.copy_(before)


@every_kind
def test_gradients_of_micro_batches_add_up_to_that_of_the_batch(case: Case) -> None:
    host = attached(case)
    given, adapter = inputs(host, rows=4), host.adapter("a")
    whole = gradient(host, "a", given)
    adapter.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        y = output(host, {key: value[rows] for key, value in given.items()})
        (loss(y)).backward()
    close(adapter.grad, whole, 1e-11)


@every_kind
def test_checkpointing_gives_the_same_gradients(case: Case) -> None:
    if case.family == "conv":
        return  # a plain torch module has no checkpointing of its own
    host = attached(case)
    add(host, "b", small("lora", dropout=0.5), seed=5)
    given = inputs(host, rows=4, length=5)
    grads = []
    host.train()
    for checkpointed in (False, True):
        if checkpointed:
            host.checkpointing()
        for adapter in host.adapters.values():
            adapter.forwards = 0
            adapter.zero_grad()
        with host.rows(["b", "a", None, ["b", "a"]]):
            y = output(host, given)
            loss(y).backward()
        grads.append(torch.cat([adapter.grad.clone() for adapter in host.adapters.values()]))
    assert [adapter.forwards for adapter in host.adapters.values()] == [1, 1]
    close(grads[1], grads[0], 1e-12)


@every_kind
def test_a_stack_is_the_dense_composition_of_its_updates_in_either_order(case: Case) -> None:
    if not holds_weights(case.make()):
        return
    host = attached(case)
    given = inputs(host)
    below = "lora" if case.method != "norm" else "delta"
    add(host, "b", small(below), seed=7)
    for names in (("a", "b"), ("b", "a")):
        host.activate(*names)
        stack = [host.adapter(name) for name in names]
        found = [gradient(host, name, given) for name in names]
        y = output(host, given)
        for adapter in stack:
            adapter.zero_grad()
        reference = run_dense(host, stack, given)
        loss(reference).backward()
        close(y, reference, 1e-10)
        for grad, adapter in zip(found, stack, strict=True):
            close(grad, adapter.collect_grad(), 1e-9)


@every_kind
def test_a_foreign_optimiser_over_the_leaves_trains_the_adapter(case: Case) -> None:
    host = attached(case)
    given, adapter = inputs(host), host.adapter("a")
    optimizer = torch.optim.SGD(host.parameters("a"), lr=0.01)
    before = adapter.flat.clone()
    expected = gradient(host, "a", given)
    optimizer.zero_grad()
    loss(output(host, given)).backward()
    optimizer.step()
    torch.testing.assert_close(adapter.flat, before - 0.01 * expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(adapter.collect_grad(), expected)


@every_kind
def test_the_gradient_of_an_input_of_zeros_and_one_row_is_finite(case: Case) -> None:
    host = attached(case)
    given = {key: torch.zeros_like(value) for key, value in inputs(host, rows=1, length=1).items()}
    perturb(host.adapter("a"), 0.01, seed=3)
    assert gradient(host, "a", given).isfinite().all()


@every_kind
def test_training_works_after_a_first_pass_in_inference_mode(case: Case) -> None:
    host = attached(case)
    given = inputs(host)
    with torch.inference_mode():
        y = output(host, given)
    assert torch.equal(output(host, given), y)
    found = gradient(host, "a", given)
    fresh = attached(case)
    close(found, gradient(fresh, "a", given), 1e-12)
