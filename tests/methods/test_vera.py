"""VeRA: golden projections and identities of its specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lorica.engine.host import Host
from lorica.methods.lora import LoRA
from lorica.methods.vera import VeRA
from lorica.models import wrap
from tests.methods.one import SITE, grads, hosted, linear, matrix, same, tensors

W, X, DY = matrix(8, 5), matrix(6, 5, seed=1), matrix(6, 8, seed=2)
D, BV = matrix(4, seed=3), matrix(8, seed=4)


def shared(host: Host) -> dict[str, torch.Tensor]:
    return host.adapter("a").tensors("")


def test_the_golden_projection_of_the_specification() -> None:
    host = hosted(linear(matrix(6, 20)), VeRA(rank=5))
    expected = torch.tensor([-0.0041007, 0.2938223, -0.4508004], dtype=torch.float64)
    torch.testing.assert_close(shared(host)["A"][0, :3], expected, rtol=0, atol=5e-8)


def test_projections_are_uniform_within_the_bounds_of_kaiming_with_gain_root_two() -> None:
    host = hosted(linear(matrix(300, 200)), VeRA(rank=64))
    for tensor, fan_in in ((shared(host)["A"], 200), (shared(host)["B"], 64)):
        bound = math.sqrt(6 / fan_in)
        assert 0.99 * bound < tensor.abs().max() <= bound
        assert float(tensor.var()) == pytest.approx(bound**2 / 3, rel=0.05)


def test_it_is_the_formula_and_an_exact_lora_with_folded_vectors() -> None:
    host = hosted(linear(W), VeRA(rank=4), d=D, b=BV)
    A, B = shared(host)["A"], shared(host)["B"]
    same(host(X), X @ W.T + BV * ((D * (X @ A.T)) @ B.T))
    lora = hosted(linear(W), LoRA(rank=4, alpha=4), A=D[:, None] * A, B=BV[:, None] * B)
    same(host(X), lora(X))


def test_step_0_is_the_base_with_the_gradients_that_the_formulas_give() -> None:
    host = hosted(linear(W), VeRA(rank=4))
    A, B = shared(host)["A"], shared(host)["B"]
    found = grads(host, X, DY)
    assert not found["d"].any()
    same(found["b"], (DY * ((tensors(host)["d"] * (X @ A.T)) @ B.T)).sum(0))
    assert tensors(host)["d"].unique().tolist() == pytest.approx([0.1])


def test_gradients_off_init() -> None:
    host = hosted(linear(W), VeRA(rank=4), d=D, b=BV)
    A, B = shared(host)["A"], shared(host)["B"]
    found = grads(host, X, DY)
    same(found["d"], (((DY * BV) @ B) * (X @ A.T)).sum(0))
    same(found["b"], (DY * ((D * (X @ A.T)) @ B.T)).sum(0))
    assert shared(host)["A"].grad is None


def test_scaling_d_up_and_b_down_leaves_the_output() -> None:
    same(
        hosted(linear(W), VeRA(rank=4), d=D, b=BV)(X),
        hosted(linear(W), VeRA(rank=4), d=4 * D, b=BV / 4)(X),
    )


def test_layers_of_different_shapes_use_slices_of_one_pair() -> None:
    host = Host(wrap(nn.Sequential(linear(matrix(8, 5)), linear(matrix(3, 8)))))
    host.add("a", VeRA(rank=4, d_initial=1.0), dtype=torch.float64)
    A, B = shared(host)["A"], shared(host)["B"]
    assert A.shape == (4, 8) and B.shape == (8, 4)
    for site, (o, i) in {"0": (8, 5), "1": (3, 8)}.items():
        host.adapter("a").set(site, "b", torch.ones(o))
        update = host.adapter("a").update(site, host.backbone.weight(site))
        same(update.factors[0].dense(), B[:o] @ A[:, :i])  # type: ignore[union-attr]


def test_adapters_of_one_key_share_the_projections_in_memory_whatever_their_seeds() -> None:
    host = hosted(linear(W), VeRA(rank=4))
    host.add("b", VeRA(rank=4), SITE, seed=9, dtype=torch.float64)
    host.add("c", VeRA(rank=4, projection_key=1), SITE, dtype=torch.float64)
    host.add("d", VeRA(rank=3), SITE, dtype=torch.float64)
    first, second, third = (host.adapter(n).tensors("")["A"] for n in "abc")
    assert first.data_ptr() == second.data_ptr()
    assert not torch.equal(first, third)
    assert host.adapter("d").tensors("")["A"].shape == (3, 5)
    with host.rows(["a", "d", "c", "b"]):
        assert host(X[:4]).shape == (4, 8)
