"""A shrinking budget: AdaLoRA's schedule, who stays within it, and the penalty's gradient."""

from __future__ import annotations

import pytest
import torch

from lorica.core.budget import cubic_budget, keep_best, orthogonality_gradient
from tests.methods.one import matrix, same


@pytest.mark.parametrize(
    ("t", "budget"), [(0, 120), (10, 120), (11, 118), (20, 105), (45, 85), (60, 80), (80, 80), (95, 80)]
)
def test_the_golden_schedule(t: int, budget: int) -> None:
    assert cubic_budget(t, 120, 80, 10, 80, 1)[0] == budget


def test_the_budget_is_enforced_at_intervals_and_always_in_the_end() -> None:
    due = [t for t in range(101) if cubic_budget(t, 120, 80, 10, 80, 20)[1]]
    assert due == [20, 40, 60, *range(80, 101)]


def test_the_penalty_is_zero_for_orthonormal_factors_and_its_gradient_is_autograds() -> None:
    assert not orthogonality_gradient(torch.eye(8, 3, dtype=torch.float64)).any()
    for square in (False, True):
        P = matrix(8, 3, seed=4).requires_grad_()
        norm = torch.linalg.matrix_norm(P.T @ P - torch.eye(3).double())
        (norm.square() if square else norm).backward()
        assert P.grad is not None
        same(orthogonality_gradient(P.detach(), square=square), P.grad)


def test_ties_leave_exactly_the_budget() -> None:
    """A threshold removes every triplet that equals it."""
    masks = [torch.ones(4), torch.ones(3)]
    for budget in range(8):
        keep_best([torch.zeros(4), torch.zeros(3)], masks, budget)
        assert sum(int(mask.sum()) for mask in masks) == budget
    keep_best([torch.tensor([1.0, 3, 3, 3]), torch.tensor([3.0, 0, 9])], masks, 3)
    assert [mask.tolist() for mask in masks] == [[0, 1, 1, 0], [0, 0, 1]]
