"""Measures of a spectrum and of subspaces: golden values, bounds, invariances, and the way over factors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.adapters.analysis.similarity import cosine, inner, principal_angles, subspace_overlap
from lorica.adapters.analysis.spectrum import (
    count_for,
    effective_rank,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from lorica.adapters.merging.change import Change
from lorica.core.errors import MethodError, MismatchError

RANKS = (effective_rank, stable_rank, participation_ratio)
SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=16).map(lambda v: torch.tensor(v, dtype=torch.float64))


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(matrix(size, size, seed=seed)).Q


def test_the_ranks_of_diag_2_1_are_the_golden_ones():
    found = [measure(torch.tensor([2.0, 1.0])) for measure in RANKS]
    assert found == pytest.approx([1.889882, 1.25, 1.470588], abs=1e-6)


@pytest.mark.parametrize(("values", "count"), [((3, 1, 1), 2), ((1,) * 10, 9), ((3, 0.5, 0.5), 1)])
def test_k90_has_the_golden_values(values, count):
    assert count_for(torch.tensor(values)) == count


@pytest.mark.parametrize("size", [1, 2, 7, 10, 33])
def test_equal_singular_values_have_all_ranks_equal_to_their_number(size):
    values = torch.full((size,), 0.37, dtype=torch.float64)
    assert [measure(values) for measure in RANKS] == pytest.approx([size] * 3)
    assert count_for(values) == math.ceil(0.9 * size - 1e-9) and numerical_rank(values) == size


@given(SPECTRA)
def test_stable_is_at_most_participation_at_most_effective_at_most_the_rank(values):
    effective, stable, participation = (measure(values) for measure in RANKS)
    slack = 1 + 1e-9
    assert stable * slack >= 1 and stable <= participation * slack and participation <= effective * slack
    assert effective <= len(values) * slack


def test_the_order_of_the_ranks_holds_on_two_hundred_random_matrices():
    for seed in range(200):
        values = torch.linalg.svdvals(matrix(2 + seed % 9, 3 + seed % 7, seed=seed))
        effective, stable, participation = (measure(values) for measure in RANKS)
        assert stable < participation + 1e-9 < effective + 2e-9 and effective <= numerical_rank(values) + 1e-9


@given(SPECTRA, st.floats(1e-8, 1e8), st.integers(0, 999))
@settings(max_examples=40)
def test_no_measure_sees_scale_order_or_rotation(values, factor, seed):
    size = len(values)
    turned = torch.linalg.svdvals(factor * orthogonal(size, seed) @ torch.diag(values) @ orthogonal(size, seed + 1))
    for measure in RANKS:
        assert measure(turned) == pytest.approx(measure(values), rel=1e-6)
        assert measure(factor * values.flip(0)) == pytest.approx(measure(values), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_neither_vanish_nor_overflow(scale):
    values = torch.tensor([2.0, 1.0], dtype=torch.float64) * scale
    assert [measure(values) for measure in RANKS] == pytest.approx([1.889882, 1.25, 1.470588], abs=1e-6)
    assert count_for(values) == 2


def test_nothing_has_no_rank_and_what_is_not_finite_no_spectrum():
    for measure in (*RANKS, numerical_rank, count_for):
        assert measure(torch.zeros(3)) == 0 and measure(torch.zeros(0)) == 0
        with pytest.raises(MethodError, match="NaN or infinity"):
            measure(torch.tensor([1.0, math.nan]))


def test_overlap_is_1_for_one_subspace_and_0_for_orthogonal_ones():
    Q = orthogonal(12, 0)
    turned = Q[:, :4] @ orthogonal(4, 1)
    assert subspace_overlap(Q[:, :4], turned) == pytest.approx(1)
    assert subspace_overlap(Q[:, :4], Q[:, 4:9]) == pytest.approx(0, abs=1e-12)
    assert subspace_overlap(Q[:, :2], Q[:, :7]) == pytest.approx(1)  # one holds the other
    assert subspace_overlap(Q[:, :4], Q[:, 2:6]) == pytest.approx(0.5)


def test_overlap_of_random_subspaces_is_the_larger_one_over_the_dimensions():
    found = [subspace_overlap(orthogonal(60, s)[:, :4], orthogonal(60, 500 + s)[:, :12]) for s in range(40)]
    assert sum(found) / len(found) == pytest.approx(12 / 60, abs=0.02)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
@settings(max_examples=30)
def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles(i, j, seed):
    U, V = orthogonal(8, seed)[:, :i], orthogonal(8, seed + 1)[:, :j]
    angles = principal_angles(U, V)
    assert len(angles) == min(i, j) and bool((angles.diff() >= -1e-12).all())
    assert float(angles.cos().square().mean()) == pytest.approx(subspace_overlap(U, V))
    assert subspace_overlap(U, V) == pytest.approx(subspace_overlap(V, U))


def test_bases_of_different_spaces_are_refused():
    for U, V in ((torch.ones(3, 1), torch.ones(4, 1)), (torch.ones(3, 0), torch.ones(3, 1))):
        with pytest.raises(MethodError, match="cannot be compared"):
            subspace_overlap(U, V)
        with pytest.raises(MethodError, match="cannot be compared"):
            principal_angles(U, V)


def factored(seed: int, rank: int = 3, scale: float = 2.0) -> Change:
    return Change.of_factors((7, 9), matrix(rank, 9, seed=seed), matrix(7, rank, seed=seed + 1), scale)


@pytest.mark.parametrize("left", ["factors", "dense"])
@pytest.mark.parametrize("right", ["factors", "dense"])
def test_inner_products_through_factors_are_those_of_the_dense_changes(left, right):
    one, two = factored(0), factored(10, rank=2, scale=-0.5)
    shown = [c if k == "factors" else Change.of_dense((7, 9), c.matrix()) for c, k in ((one, left), (two, right))]
    dense = float((one.matrix() * two.matrix()).sum())
    assert inner(*shown) == pytest.approx(dense, rel=1e-12)
    norms = float(one.matrix().norm() * two.matrix().norm())
    assert cosine(*shown) == pytest.approx(dense / norms, rel=1e-12)


def test_the_squared_norm_is_the_trace_over_factors():
    change = factored(3)
    A, B = change.factors()
    assert inner(change, change) == pytest.approx(change.scale**2 * float(torch.trace((B.T @ B) @ (A @ A.T))))
    assert inner(change, change) == pytest.approx(float(change.singular_values().square().sum()))


def test_cosine_is_plus_or_minus_1_for_multiples_and_nan_for_nothing():
    change = factored(5)
    A, B = change.factors()
    assert cosine(change, Change.of_factors((7, 9), 3 * A, B)) == pytest.approx(1)
    assert cosine(change, Change.of_factors((7, 9), A, B, -0.1)) == pytest.approx(-1)
    assert math.isnan(cosine(change, Change.nothing((7, 9))))
    with pytest.raises(MismatchError, match=r"\[7, 9\] and \[9, 7\]"):
        inner(change, Change.nothing((9, 7)))


@given(st.integers(1, 5), st.integers(0, 999))
@settings(max_examples=25)
def test_the_small_core_has_the_singular_values_of_the_dense_change_and_no_rank_above_r(rank, seed):
    change = factored(seed, rank)
    short, dense = change.singular_values(), torch.linalg.svdvals(change.matrix())
    assert torch.allclose(short, dense[:rank], atol=1e-9) and not dense[rank:].gt(1e-9).any()
    for measure in (*RANKS, count_for, numerical_rank):
        assert measure(short) <= rank + 1e-9
