"""LoRA-XS: identities of its formula, and what its start promises."""

from __future__ import annotations

import pytest
import torch

from lorica.methods.lora import LoRA
from lorica.methods.lora_xs import LoRAXS
from tests.methods.one import SITE, effective, grads, hosted, linear, matrix, same, tensors

W, X, DY = matrix(8, 6), matrix(5, 6, seed=1), matrix(5, 8, seed=2)
U, SIGMA, V = torch.linalg.svd(W, full_matrices=False)
R = matrix(3, 3, seed=3)


def method(**fields: object) -> LoRAXS:
    return LoRAXS(**{"rank": 3, "alpha": 6.0, **fields})


def test_the_frozen_factors_are_the_leading_singular_directions() -> None:
    own = tensors(hosted(linear(W), method()))
    same(own["A"] @ own["A"].T, torch.eye(3, dtype=torch.float64), 1e-10)
    same(own["B"].T @ own["B"], torch.diag(SIGMA[:3].square()), 1e-10)
    same(own["B"] @ own["A"], (U[:, :3] * SIGMA[:3]) @ V[:3], 1e-10)


def test_only_the_core_is_trained() -> None:
    adapter = hosted(linear(W), method()).adapter("a")
    assert {name for name, spec in adapter.layout.specs[SITE].items() if spec.trainable} == {"R"}
    assert adapter.layout.trainable_count() == 9 and adapter.layout.frozen_count() == 3 * (8 + 6)


def test_it_is_a_lora_with_the_core_folded_into_either_factor() -> None:
    host = hosted(linear(W), method(), R=R)
    own = tensors(host)
    for A, B in ((own["A"], own["B"] @ R), (R @ own["A"], own["B"])):
        same(host(X), hosted(linear(W), LoRA(rank=3, alpha=6), A=A, B=B)(X))


def test_a_core_of_one_over_s_adds_the_leading_part_of_the_weight_once_more() -> None:
    host = hosted(linear(W), method(), R=torch.eye(3) / 2)
    same(effective(host), W + (U[:, :3] * SIGMA[:3]) @ V[:3], 1e-10)


def test_the_core_has_its_gradient_at_step_0_where_it_is_zero() -> None:
    host = hosted(linear(W), method())
    own, found = tensors(host), grads(host, X, DY)
    assert not own["R"].any()
    same(found["R"], 2 * own["B"].T @ (DY.T @ X) @ own["A"].T)
    assert found["R"].all() and set(found) == {"R"}
    assert torch.equal(host(X), torch.nn.functional.linear(X, W))


def test_the_papers_random_start_is_near_the_base_and_not_the_base() -> None:
    big = matrix(60, 50)
    host = hosted(linear(big), LoRAXS(rank=16, alpha=16, init_std=1e-5))
    assert float(tensors(host)["R"].detach().std()) == pytest.approx(1e-5, rel=0.1)
    shift = effective(host) - big
    assert 1e-6 < float(shift.norm() / big.norm()) < 1e-4


def test_what_it_can_reach_is_the_span_of_the_leading_directions() -> None:
    host = hosted(linear(W), method(), R=R)
    delta = effective(host) - W
    same(U[:, :3] @ U[:, :3].T @ delta @ V[:3].T @ V[:3], delta, 1e-10)


def test_the_fast_decomposition_finds_the_same_function_and_is_repeatable() -> None:
    big = matrix(60, 40) @ torch.diag(0.7 ** torch.arange(40, dtype=torch.float64)) @ matrix(40, 40, seed=7)
    exact, fast, again = (hosted(linear(big), method(svd=svd)) for svd in ("exact", "lowrank", "lowrank"))
    products = [tensors(h)["B"] @ tensors(h)["A"] for h in (exact, fast)]
    assert (products[0] - products[1]).norm() < 1e-4 * products[0].norm()
    assert torch.equal(tensors(fast)["A"], tensors(again)["A"])
