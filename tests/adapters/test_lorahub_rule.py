"""LoraHub's composition: factor by factor, so that it is quadratic in the weights and has cross terms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.adapters.merging import Change, make_merging
from lorica.core.errors import MergeError
from lorica.core.site import Site

SITE = Site("layer", "linear", (2, 2))
WEIGHT = st.floats(-1.5, 1.5)


def change(A, B, scale=1.0, bias=None):
    A_RI, B_OR = torch.tensor(A, dtype=torch.float64), torch.tensor(B, dtype=torch.float64)
    bias_O = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    return Change.of_factors((B_OR.shape[0], A_RI.shape[1]), A_RI, B_OR, scale, bias_O)


def drawn(count, *, rank=2, out=4, inp=3, scale=1.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [
        Change.of_factors(
            (out, inp),
            torch.randn(rank, inp, generator=rng, dtype=torch.float64),
            torch.randn(out, rank, generator=rng, dtype=torch.float64),
            scale,
        )
        for _ in range(count)
    ]


def composed(changes, weights, rule="lorahub"):
    site = Site("layer", "linear", changes[0].shape)
    return make_merging(rule).merge(site, changes, weights).dense()


def test_two_modules_of_rank_one_have_cross_terms_that_the_sum_of_changes_has_not():
    first, second = change([[1.0, 0.0]], [[1.0], [0.0]]), change([[0.0, 1.0]], [[0.0], [1.0]])
    quarter = torch.full((2, 2), 0.25, dtype=torch.float64)
    assert torch.equal(composed([first, second], [0.5, 0.5]), quarter)
    assert torch.equal(composed([first, second], [0.5, 0.5], "task_arithmetic"), 0.5 * torch.eye(2).double())


@given(WEIGHT, st.floats(0.1, 4))
def test_one_module_of_weight_w_is_its_change_times_w_squared(w, scale):
    (own,) = drawn(1, scale=scale)
    torch.testing.assert_close(composed([own], [w]), w * w * own.dense())


@given(st.lists(WEIGHT, min_size=3, max_size=3))
def test_a_flip_of_all_signs_changes_nothing(weights):
    changes = drawn(3, scale=2.0)
    assert torch.equal(composed(changes, weights), composed(changes, [-w for w in weights]))


@given(st.lists(WEIGHT, min_size=3, max_size=3))
def test_of_equal_modules_only_the_sum_of_the_weights_matters(weights):
    (own,) = drawn(1)
    torch.testing.assert_close(composed([own] * 3, weights), sum(weights) ** 2 * own.dense())


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3])
def test_weights_of_zero_are_nothing_and_one_weight_of_one_is_that_module_bit_for_bit(scale):
    changes = drawn(3, scale=scale)
    assert not composed(changes, [0.0] * 3).any()
    for n, own in enumerate(changes):
        assert torch.equal(composed(changes, [float(m == n) for m in range(3)]), own.dense())


def test_scales_that_differ_count_once_for_every_module():
    changes = [*drawn(1, scale=2.0), *drawn(1, scale=0.5, seed=1)]
    for n, own in enumerate(changes):
        torch.testing.assert_close(composed(changes, [float(m == n) for m in range(2)]), own.dense())
    (A, B), (C, D) = (one.balanced() for one in changes)
    torch.testing.assert_close(composed(changes, [0.4, -1.1]), (0.4 * B - 1.1 * D) @ (0.4 * A - 1.1 * C))


def test_a_parent_that_does_not_act_at_a_site_adds_nothing_there():
    (own,) = drawn(1)
    torch.testing.assert_close(composed([own, Change.nothing((4, 3))], [0.5, 1.5]), 0.25 * own.dense())
    nothing = make_merging("lorahub").merge(SITE, [Change.nothing((2, 2))] * 2, [1.0, 1.0])
    assert nothing.rank == 0


def test_biases_and_norms_are_sums():
    changes = [change([[1.0, 0.0]], [[1.0], [0.0]], bias=[1.0, 2.0]), change([[1.0, 0.0]], [[1.0], [0.0]])]
    found = make_merging("lorahub").merge(SITE, changes, [0.5, 1.0])
    assert found.bias_O.tolist() == [0.5, 1.0]
    norms = [Change.of_dense((3,), torch.tensor([1.0, 2.0, 3.0]).double()) for _ in range(2)]
    merged = make_merging("lorahub").merge(Site("norm", "norm", (3,)), norms, [0.5, -0.25])
    assert merged.dense().tolist() == [0.25, 0.5, 0.75]


def test_ranks_that_differ_and_dense_changes_are_one_sentence():
    with pytest.raises(MergeError, match="'lorahub' .* at site 'layer' .*ranks differ"):
        composed([*drawn(1), *drawn(1, rank=3)], [1.0, 1.0])
    with pytest.raises(MergeError, match="'lorahub' .*layer.*dense"):
        composed([*drawn(1), Change.of_dense((4, 3), torch.ones(4, 3).double())], [1.0, 1.0])
