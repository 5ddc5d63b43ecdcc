"""DoRA: golden values and identities of its specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorica.core.errors import ConfigError
from lorica.methods.dora import DoRA, row_norm
from lorica.methods.lora import LoRA
from lorica.models import wrap
from tests.methods.one import SITE, effective, grads, hosted, linear, matrix, same, tensors

W, X, DY = matrix(8, 5), matrix(6, 5, seed=1), matrix(6, 8, seed=2)
A, B, M = matrix(2, 5, seed=3), matrix(8, 2, seed=4), matrix(8, seed=5).abs() + 0.5
G = DY.T @ X
S = 1.5


def moved(norm: str = "detached", weight: Tensor = W, bias: Tensor | None = None, **values: Tensor) -> nn.Module:
    return hosted(linear(weight, bias), DoRA(rank=2, alpha=3, norm=norm), **{"A": A, "B": B, "m": M, **values})


def test_the_golden_value_of_the_specification() -> None:
    host = hosted(
        linear(torch.tensor([[3.0, 4.0], [0.0, 5.0]], dtype=torch.float64)),
        DoRA(rank=1, alpha=0.5),
        A=torch.tensor([[1.0, -1.0]]),
        B=torch.tensor([[1.0], [2.0]]),
        m=torch.tensor([10.0, 5.0]),
    )
    y = host(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    same(y, torch.tensor([[21.213203435596427, 10.914103126634984]], dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("bias", [None, matrix(8, seed=6)], ids=["no-bias", "bias"])
def test_step_0_is_the_base_bit_for_bit_with_the_gradients_that_the_formulas_give(bias: Tensor | None) -> None:
    host, lora = hosted(linear(W, bias), DoRA(rank=2)), hosted(linear(W, bias), LoRA(rank=2))
    y = host(X)
    with host.disabled():
        assert torch.equal(y, host(X))
    found = grads(host, X, DY)
    lora.adapter("a").set(SITE, "A", tensors(host)["A"])
    same(found["B"], grads(lora, X, DY)["B"])
    assert not found["A"].any()
    same(found["m"], (G * W).sum(1) / W.norm(dim=1))


def test_rows_of_the_merged_weight_have_the_magnitudes_as_norms() -> None:
    same(effective(moved(m=-M)).norm(dim=1), M)


def test_the_bias_is_not_scaled() -> None:
    b = matrix(8, seed=6)
    same(moved(bias=b)(X), moved()(X) + b)


def test_gradients_with_a_detached_norm() -> None:
    found, V = grads(moved(), X, DY), W + S * B @ A
    scaled = (M / V.norm(dim=1))[:, None] * G
    same(found["B"], S * scaled @ A.T)
    same(found["A"], S * B.T @ scaled)
    same(found["m"], (G * V).sum(1) / V.norm(dim=1))


def test_gradients_through_the_norm_have_no_component_along_the_rows() -> None:
    found, V = grads(moved("full"), X, DY), W + S * B @ A
    n = V.norm(dim=1, keepdim=True)
    scaled = (M[:, None] / n) * (G - (G * V).sum(1, keepdim=True) / n**2 * V)
    same((scaled * V).sum(1), torch.zeros(8, dtype=torch.float64), 1e-11)
    same(found["B"], S * scaled @ A.T, 1e-11)
    same(found["A"], S * B.T @ scaled, 1e-11)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_norm_from_three_terms_is_the_norm_of_the_sum(size: float) -> None:
    weight = wrap(nn.Sequential(linear(W))).weight("0")
    same(row_norm(weight, A, size * B, S) / (W + size * S * B @ A).norm(dim=1), torch.ones(8, dtype=torch.float64))


def test_a_row_that_the_update_cancels_or_that_is_zero_stays_finite() -> None:
    weight = W.clone()
    weight[0] = 0.0
    weight[1] = -S * (B @ A)[1]
    host = moved("full", weight)
    assert host(X).isfinite().all()
    assert all(g.isfinite().all() for g in grads(host, X, DY).values())
    fresh = hosted(linear(weight), DoRA(rank=2))
    y = fresh(X)
    with fresh.disabled():
        assert torch.equal(y, fresh(X))


def test_scaling_weight_and_b_together_leaves_the_merged_weight() -> None:
    same(effective(moved()), effective(moved(weight=7 * W, B=7 * B)))


def test_magnitudes_alone_scale_rows() -> None:
    host = moved(B=torch.zeros_like(B))
    same(effective(host), (M / W.norm(dim=1))[:, None] * W)


@pytest.mark.parametrize("groups", [1, 2])
def test_at_a_convolution_the_norm_is_over_all_axes_but_the_first(groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups, dtype=torch.float64)
    factors = {"A": matrix(2, 4 // groups, 3, 3, seed=3), "B": matrix(6, 2, seed=4), "m": M[:6]}
    host = hosted(conv, DoRA(rank=2, alpha=3), **factors)
    V = conv.weight + S * torch.einsum("or,rchw->ochw", factors["B"], factors["A"])
    expected = (M[:6] / V.flatten(1).norm(dim=1)).view(-1, 1, 1, 1) * V
    same(effective(host), expected)
    x = matrix(2, 4, 5, 5, seed=1)
    y = host(x)
    with host.disabled():
        same(y, conv._conv_forward(x, expected, conv.bias))


def test_a_bias_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="trains no bias"):
        DoRA(lora_bias=True)


def test_magnitudes_do_not_decay_and_factors_do() -> None:
    specs = hosted(linear(W), DoRA(rank=2)).adapter("a").layout.specs[SITE]
    assert {name: spec.decay for name, spec in specs.items()} == {"A": True, "B": True, "m": False}
