"""Fastfood: golden values and identities of its specification."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorica.core import fastfood as module
from lorica.core.fastfood import Fastfood, fastfood, hadamard, padded

CPU = torch.device("cpu")


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(parts: Fastfood, size: int, dimension: int) -> Tensor:
    """P as a matrix [D, d]."""
    return torch.stack([parts.project(column, size) for column in torch.eye(dimension, dtype=torch.float64)], 1)


GOLDEN = Fastfood(
    torch.tensor([1, -1, 1, 1], dtype=torch.int8),
    torch.tensor([2, 0, 3, 1], dtype=torch.int32),
    torch.tensor([1.0, 2.0, -1.0, 0.5]),
)


@pytest.mark.parametrize(
    ("size", "expected"), [(4, [-0.9, -0.7, -0.3, 1.1]), (3, [-1.0392305, -0.8082904, -0.3464102])]
)
def test_the_golden_values_of_the_specification(size: int, expected: list[float]) -> None:
    found = GOLDEN.project(torch.tensor([1.0, 2.0], dtype=torch.float64), size)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-8)
    assert GOLDEN.divisor(4) == pytest.approx(5)


@given(st.integers(0, 12), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_the_transform_is_the_matrix_and_twice_it_is_n_times_the_vector(levels: int, seed: int) -> None:
    size = 2**levels
    x = values(size, seed=seed)
    if levels <= 8:
        index = torch.arange(size)
        signs = torch.tensor([[(-1.0) ** int(i & j).bit_count() for j in index.tolist()] for i in index.tolist()])
        torch.testing.assert_close(hadamard(x), signs.double() @ x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hadamard(hadamard(x)), size * x, rtol=1e-10, atol=1e-9)


def test_the_transform_is_its_own_transpose() -> None:
    x, g = values(64).requires_grad_(), values(64, seed=1)
    hadamard(x).backward(g)
    torch.testing.assert_close(x.grad, hadamard(g))
    assert torch.autograd.gradcheck(hadamard, (values(16).requires_grad_(),))
    assert torch.autograd.gradgradcheck(hadamard, (values(16).requires_grad_(),))


@pytest.mark.parametrize("shape", [(3,), (12,), (4, 4), (0,)])
def test_a_vector_of_another_length_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2\\^k"):
        hadamard(torch.zeros(shape))


def test_columns_have_norm_one_where_the_tensor_fills_the_transform() -> None:
    P = dense(fastfood("w", 256, 64, CPU), 256, 64)
    torch.testing.assert_close(P.norm(dim=0), torch.ones(64, dtype=torch.float64), rtol=1e-6, atol=0)
    products = (P.T @ P).fill_diagonal_(0)
    assert products.abs().max() < 6 / math.sqrt(256)
    assert products.square().mean().sqrt() == pytest.approx(1 / math.sqrt(256), rel=0.5)


def test_columns_are_orthonormal_without_the_normal_values() -> None:
    drawn = fastfood("w", 128, 50, CPU)
    P = dense(Fastfood(drawn.signs_L, drawn.order_L, torch.ones(128)), 128, 50)
    torch.testing.assert_close(P.T @ P, torch.eye(50, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "dimension"), [(150, 40), (200, 10), (30, 40)])
def test_columns_have_norm_one_in_the_mean_where_it_does_not(size: int, dimension: int) -> None:
    squares = [dense(fastfood(f"w{n}", size, dimension, CPU), size, dimension).square().sum(0) for n in range(15)]
    assert float(torch.cat(squares).mean()) == pytest.approx(1, abs=0.1)


def test_the_gradient_is_the_transpose_and_the_published_one_is_that_over_the_padded_size() -> None:
    parts, size, dimension = fastfood("w", 200, 30, CPU), 200, 30
    P, g = dense(parts, size, dimension), values(200)
    for scaled, factor in ((False, 1.0), (True, 0.00390625)):
        theta = values(dimension, seed=2).requires_grad_()
        y = parts.project(theta, size, scaled_back=scaled)
        torch.testing.assert_close(y, P @ theta)
        y.backward(g)
        torch.testing.assert_close(theta.grad, factor * (P.T @ g))


def test_equal_seeds_give_equal_bits_and_others_do_not_and_the_global_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    one, other = fastfood("w", 100, 7, CPU), fastfood("v", 100, 7, CPU)
    module._KEPT._parts.clear()
    module._KEPT._bytes = 0
    again = fastfood("w", 100, 7, CPU)
    assert again is not one and fastfood("w", 100, 7, CPU) is again
    for name in ("signs_L", "order_L", "normal_L"):
        assert torch.equal(getattr(one, name), getattr(again, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 3000)
    kept = module._Kept()
    for n in range(5):
        kept.get((f"w{n}", 128, CPU))
        assert kept._bytes == sum(p.bytes for p in kept._parts.values()) <= 3000
    assert [key[0] for key in kept._parts] == ["w3", "w4"]
    assert kept.get(("large", 2**12, CPU)).normal_L.shape == (2**12,)
    assert "large" not in [key[0] for key in kept._parts]


@pytest.mark.parametrize(("size", "dimension", "expected"), [(1, 1, 1), (4, 2, 4), (5, 2, 8), (3, 9, 16), (16, 16, 16)])
def test_the_padded_size_holds_both(size: int, dimension: int, expected: int) -> None:
    assert padded(size, dimension) == expected
