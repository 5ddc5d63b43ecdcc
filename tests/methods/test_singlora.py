"""SingLoRA: identities of its specification, golden values, and the traps of other implementations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorica.adapters.layout import GLOBAL, Layout
from lorica.adapters.targets import Targets, select
from lorica.engine.host import Host
from lorica.methods.singlora import SingLoRA
from lorica.models.factory import example_inputs
from lorica.training.optimizer import AdamStep, AdapterOptimizer
from tests.methods.one import SITE, effective, grads, hosted, linear, matrix, same, tensors
from tests.tiny import tiny

X = matrix(6, 5, seed=1)


def at(method: SingLoRA, shape: tuple[int, int], t: float, A: torch.Tensor | None = None) -> Host:
    """One layer of a shape, at optimiser step t."""
    host = hosted(linear(matrix(*shape)), method)
    host.adapter("a").set(SITE, "A", matrix(max(shape), method.rank, seed=3) if A is None else A)
    host.adapter("a").set(GLOBAL, "t", torch.tensor([t]))
    return host


def change(host: Host) -> torch.Tensor:
    return effective(host) - host.backbone.weight(SITE).matrix()


A123 = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 3), [[1, 2, 3], [2, 4, 6], [3, 6, 9]]),
        ((2, 3), [[1, 2, 3], [2, 4, 6]]),
        ((3, 2), [[1, 2], [2, 4], [3, 6]]),
    ],
)
def test_golden_values_of_the_three_shapes(shape: tuple[int, int], expected: list[list[int]]) -> None:
    host = at(SingLoRA(rank=1, alpha=2, ramp=10), shape, 5, A123)
    same(change(host), torch.tensor(expected, dtype=torch.float64), 1e-12)
    x = matrix(4, shape[1], seed=2)
    same(host(x), x @ effective(host).T)


def test_the_gradient_of_a_square_site() -> None:
    host = at(SingLoRA(rank=2, alpha=3, ramp=4), (5, 5), 1)
    dy = matrix(6, 5, seed=2)
    G, A, su = dy.T @ X, tensors(host)["A"], 3 / 2 / 4
    same(grads(host, X, dy)["A"], su * (G + G.T) @ A)


@pytest.mark.parametrize("shape", [(3, 5), (8, 5)])
def test_the_gradient_of_a_site_that_is_not_square(shape: tuple[int, int]) -> None:
    host = at(SingLoRA(rank=2, alpha=3, ramp=4), shape, 2)
    dy = matrix(6, shape[0], seed=2)
    G, A, su = dy.T @ X, tensors(host)["A"], 3 / 2 / 2
    o, i = shape
    expected = torch.zeros_like(A)
    expected[:i] += su * G.T @ A[:o]
    expected[:o] += su * G @ A[:i]
    same(grads(host, X, dy)["A"], expected)


def test_turning_a_changes_neither_the_update_nor_what_a_plain_step_does() -> None:
    Q = torch.linalg.qr(matrix(2, 2, seed=9))[0]
    dy = matrix(6, 5, seed=2)
    changes = []
    for turn in (torch.eye(2, dtype=torch.float64), Q):
        host = at(SingLoRA(rank=2, ramp=1), (5, 5), 1, matrix(5, 2, seed=3) @ turn)
        first = change(host)
        step = tensors(host)["A"] - 0.1 * grads(host, X, dy)["A"]
        host.adapter("a").set(SITE, "A", step)
        changes.append(torch.cat([first, change(host)]))
    same(changes[0], changes[1], 1e-11)


def test_a_square_update_is_symmetric_with_no_negative_eigenvalue() -> None:
    delta = change(at(SingLoRA(rank=3, ramp=1), (6, 6), 1))
    same(delta, delta.T)
    assert torch.linalg.eigvalsh(delta).min() > -1e-12


def trained(host: Host, steps: int, *, micro: int = 1, checkpointed: bool = False) -> list[float]:
    """The counter after each of `steps` optimiser steps of `micro` forward passes each."""
    optimizer, given = AdapterOptimizer(host.adapter("a")), example_inputs(host.backbone)
    host.train()
    if checkpointed:
        host.checkpointing()
    seen = []
    for _ in range(steps):
        for _ in range(micro):
            host(**given, labels=given["input_ids"]).loss.backward()
        optimizer.step(AdamStep(0.01), scale=1 / micro)
        seen.append(float(host.adapter("a").values(GLOBAL)["t"]))
    return seen


def attached(method: SingLoRA) -> Host:
    host = Host(tiny("llama", dtype=torch.float64))
    host.add("a", method, "q_proj", dtype=torch.float64)
    host.activate("a")
    return host


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_the_ramp_counts_optimiser_steps_not_forward_passes(checkpointed: bool) -> None:
    """kyegomez's module counts every forward pass, so accumulation and checkpointing make its ramp shorter."""
    once, thrice = attached(SingLoRA(rank=2, ramp=4)), attached(SingLoRA(rank=2, ramp=4))
    assert trained(once, 3) == trained(thrice, 3, micro=3, checkpointed=checkpointed) == [1.0, 2.0, 3.0]
    torch.testing.assert_close(once.adapter("a").flat, thrice.adapter("a").flat, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("t", "u"), [(0, 0.0), (2, 0.5), (4, 1.0), (5, 1.0), (400, 1.0)])
def test_u_rises_to_one_and_stays(t: int, u: float) -> None:
    method = SingLoRA(rank=2, alpha=2, ramp=4)
    A = matrix(8, 2, seed=3)
    same(change(at(method, (8, 5), t)), u * A @ A[:5].T)


def test_step_0_is_the_base_bit_for_bit_though_a_is_not_zero() -> None:
    host = at(SingLoRA(rank=2), (8, 5), 0)
    with host.disabled():
        base = host(X)
    assert torch.equal(host(X), base)


@pytest.mark.parametrize("shape", [(4096, 64), (64, 4096), (4096, 4096)])
@pytest.mark.parametrize(("dist", "variance"), [("kaiming", 1 / 3), ("normal", 1.0)])
def test_initial_entries_shrink_with_the_longer_side_and_not_with_the_rank(
    shape: tuple[int, int], dist: str, variance: float
) -> None:
    """kyegomez and peft-singlora draw from U(±√(1/r)): torch takes the last axis of [n, r] for the fan."""
    host = hosted(linear(torch.zeros(shape, dtype=torch.float64)), SingLoRA.parse({"rank": 8, "init_dist": dist}))
    assert float(tensors(host)["A"].detach().std()) == pytest.approx((variance / 4096) ** 0.5, rel=0.05)


def test_the_counter_is_saved_and_resumed(tmp_path: Path) -> None:
    host = attached(SingLoRA(rank=2, ramp=6))
    trained(host, 3)
    given = example_inputs(host.backbone)
    host.eval()
    with torch.no_grad():
        y = host(**given).logits
    host.save(tmp_path / "a", "a")
    host.load(tmp_path / "a", "b")
    host.activate("b")
    with torch.no_grad():
        assert torch.equal(host(**given).logits, y)
    assert float(host.adapter("b").values(GLOBAL)["t"]) == 3.0


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    whole, part = attached(SingLoRA(rank=2, ramp=6)), attached(SingLoRA(rank=2, ramp=6))
    results = []
    for host, stops in ((whole, False), (part, True)):
        given = example_inputs(host.backbone)
        adapter = host.adapter("a")
        optimizer = AdapterOptimizer(adapter)
        for step in range(5):
            if stops and step == 2:
                host.save(tmp_path / "a", "a")
                host.delete("a")
                adapter, state = host.load(tmp_path / "a", "a"), optimizer.state_dict()
                host.activate("a")
                optimizer = AdapterOptimizer(adapter)
                optimizer.load_state_dict(state)
            host(**given, labels=given["input_ids"]).loss.backward()
            optimizer.step(AdamStep(0.01))
        results.append(adapter.flat.clone())
    assert torch.equal(*results)


def test_the_count_of_a_trained_adapter_survives_a_new_optimiser() -> None:
    host = attached(SingLoRA(rank=2, ramp=2))
    assert trained(host, 3) == [1.0, 2.0, 3.0]
    assert trained(host, 1) == [4.0]


def test_targets_of_one_adapter_share_one_counter() -> None:
    method = SingLoRA(rank=2)
    base = tiny("llama")
    layout = Layout(method, select(base.sites, method, Targets.of("all-linear")))
    assert layout.changing == [(GLOBAL, "t")]
