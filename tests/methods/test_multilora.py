"""MultiLoRA: identities of its specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorica.core.errors import MethodError
from lorica.methods.lora import LoRA
from lorica.methods.multilora import MultiLoRA
from tests.methods.one import grads, hosted, linear, matrix, same, tensors

W, X, DY = matrix(8, 7), matrix(5, 7, seed=1), matrix(5, 8, seed=2)
A, B, C = matrix(3, 2, 7, seed=3), matrix(3, 8, 2, seed=4), matrix(3, 8, seed=5)


def method(**fields: object) -> MultiLoRA:
    return MultiLoRA(**{"rank": 2, "modules": 3, "alpha": 5.0, **fields})


def test_it_is_the_formula_and_one_lora_of_all_ranks() -> None:
    host = hosted(linear(W), method(), A=A, B=B, c=C)
    same(host(X), X @ W.T + 2.5 * sum(c * (X @ a.T @ b.T) for a, b, c in zip(A, B, C, strict=True)))
    joint = torch.cat([c[:, None] * b for b, c in zip(B, C, strict=True)], 1)
    lora = hosted(linear(W), LoRA(rank=6, alpha=15), A=A.flatten(0, 1), B=joint)
    same(host(X), lora(X))


def test_a_scalar_scale_is_a_vector_of_one_value() -> None:
    scalar = hosted(linear(W), method(scales="scalar"), A=A, B=B, c=C[:, :1])
    vector = hosted(linear(W), method(), A=A, B=B, c=C[:, :1].expand(3, 8))
    same(scalar(X), vector(X))
    same(grads(scalar, X, DY)["c"], grads(vector, X, DY)["c"].sum(1, keepdim=True))


def test_at_step_0_only_the_scales_have_a_gradient() -> None:
    host = hosted(linear(W), method())
    own, found = tensors(host), grads(host, X, DY)
    assert not own["c"].any() and not found["A"].any() and not found["B"].any()
    for k in range(3):
        same(found["c"][k], 2.5 * (DY * (X @ own["A"][k].T @ own["B"][k].T)).sum(0))


def test_the_random_factors_have_the_fan_in_of_one_module() -> None:
    own = tensors(hosted(linear(matrix(300, 200)), MultiLoRA(rank=16, modules=4)))
    for tensor, fan_in in ((own["A"], 200), (own["B"], 16)):
        assert 0.98 / math.sqrt(fan_in) < tensor.abs().max() <= 1 / math.sqrt(fan_in)
    assert not torch.equal(own["A"][0], own["A"][1])


def test_the_order_of_the_modules_does_not_matter() -> None:
    turn = torch.tensor([2, 0, 1])
    one, other = (
        hosted(linear(W), method(), A=A, B=B, c=C),
        hosted(linear(W), method(), A=A[turn], B=B[turn], c=C[turn]),
    )
    same(one(X), other(X))
    first, second = grads(one, X, DY), grads(other, X, DY)
    for name in "ABc":
        same(first[name][turn], second[name])


def test_one_module_with_its_scale_at_one_is_lora() -> None:
    host = hosted(linear(W), method(modules=1), A=A[:1], B=torch.zeros(1, 8, 2), c=torch.ones(1, 8))
    lora = hosted(linear(W), LoRA(rank=2, alpha=5), A=A[0], B=torch.zeros(8, 2))
    same(host(X), lora(X))
    one, other = grads(host, X, DY), grads(lora, X, DY)
    same(one["B"][0], other["B"])
    assert not one["A"].any() and not other["A"].any()


def test_the_scales_alone_are_kept_from_decay() -> None:
    groups = hosted(linear(W), method()).adapter("a").layout.groups
    assert {group.name: group.decay for group in groups} == {"A": True, "B": True, "c": False}


@pytest.mark.parametrize(("scales", "count"), [("vector", 3 * (2 * 15 + 8)), ("scalar", 3 * (2 * 15 + 1))])
def test_the_parameter_count_is_the_formula(scales: str, count: int) -> None:
    assert hosted(linear(W), method(scales=scales)).adapter("a").layout.trainable_count() == count


def test_more_ranks_than_the_weight_has_are_refused() -> None:
    with pytest.raises(MethodError, match="Rank 9 is larger"):
        hosted(linear(W), method(rank=3))


def _evenness(delta: Tensor) -> float:
    """Entropy of the normalised singular values, in units of that of as many equal ones as there can be."""
    sigma = torch.linalg.svdvals(delta)
    share = (sigma / sigma.sum()).clamp_min(1e-30)
    return float(-(share * share.log()).sum() / math.log(len(sigma)))


def test_scales_that_start_at_zero_leave_a_random_product_whose_singular_values_are_evener_than_loras() -> None:
    """The claim's cause at its simplest: after one step of each, LoRA's change has A's r directions weighted by the
    gradient's spectrum; MultiLoRA's is a Hadamard-scaled random product.
    """
    weight, decay = matrix(24, 24), 0.5 ** torch.arange(24, dtype=torch.float64)
    G = matrix(24, 24, seed=8) * decay  # a gradient whose spectrum falls fast
    x, dy = torch.eye(24, dtype=torch.float64), G.T
    found = []
    for host in (
        hosted(linear(weight), MultiLoRA(rank=2, modules=3)),
        hosted(linear(weight), LoRA(rank=6)),
    ):
        adapter = host.adapter("a")
        for _ in range(2):
            grads(host, x, dy)
            adapter.flat.sub_(1e-2 * adapter.grad)
        update = adapter.update("fc", host.backbone.weight("fc"))
        found.append(_evenness(update.factors[0].dense().detach()))  # type: ignore[union-attr]
    assert found[0] > found[1]
