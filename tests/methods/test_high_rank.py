"""High ranks: at rank min(out, in) LoRA reaches what full fine-tuning reaches, by whichever path it is computed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorica.core.errors import MethodError
from lorica.methods import make_method
from lorica.methods.lora import LoRA
from tests.methods.one import effective, grads, hosted, linear, matrix, same, tensors

SHAPES = [(7, 5), (5, 7), (6, 6)]


def oversized(o: int, i: int) -> int:
    """The largest rank of a weight, at which the factors hold more values than the weight does."""
    rank = min(o, i)
    assert rank * (o + i) > o * i
    return rank


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_min_of_both_sides_reaches_the_loss_of_full_fine_tuning_in_least_squares(shape: tuple[int, int]) -> None:
    o, i = shape
    rank = oversized(o, i)
    x, y, W = matrix(40, i, seed=1), matrix(40, o, seed=2), matrix(o, i)
    best = torch.linalg.lstsq(x, y).solution.T  # what training the whole weight converges to
    wanted = float((x @ best.T - y).square().mean())
    host = hosted(linear(W), LoRA(rank=rank, alpha=2.0 * rank))
    optimizer = torch.optim.LBFGS(host.parameters(), max_iter=5000, line_search_fn="strong_wolfe")
    optimizer.param_groups[0].update(tolerance_grad=1e-13, tolerance_change=1e-16, max_eval=20000, history_size=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (host(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() == pytest.approx(wanted, rel=1e-8)
    same(effective(host), best, 1e-3)


def test_a_rank_below_does_not_reach_it() -> None:
    x, W = matrix(40, 6, seed=1), matrix(6, 6)
    target = W + matrix(6, 6, seed=7)
    host = hosted(linear(W), LoRA(rank=3, alpha=6))
    optimizer = torch.optim.LBFGS(host.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (host(x) - x @ target.T).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() > 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_every_change_of_a_weight_can_be_written_at_the_largest_rank(shape: tuple[int, int]) -> None:
    o, i = shape
    rank, W, wanted = oversized(o, i), matrix(o, i), matrix(o, i, seed=5)
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    host = hosted(linear(W), LoRA(rank=rank, alpha=2.0 * rank), A=s[:, None] * v / 2, B=u)
    same(effective(host) - W, wanted)


@given(rank=st.integers(1, 4096))
@example(rank=1)
@example(rank=64)
@example(rank=4096)
@settings(max_examples=60, deadline=None)
def test_the_scaling_is_two_at_every_rank_with_alpha_twice_the_rank(rank: int) -> None:
    assert LoRA(rank=rank, alpha=2.0 * rank).scaling() == 2.0
    assert LoRA(rank=rank, alpha=2.0 * rank, rslora=True).scaling() == pytest.approx(2 * math.sqrt(rank))


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_oversized_rank_gives_the_output_and_the_gradients_of_its_factors(
    shape: tuple[int, int], bias: bool
) -> None:
    """However the executor computes it, also with the product formed first: as by `s · (x Aᵀ) Bᵀ` beside the base."""
    o, i = shape
    rank = oversized(o, i)
    A, B, W = matrix(rank, i, seed=3), matrix(o, rank, seed=4), matrix(o, i)
    b = matrix(o, seed=9) if bias else None
    host = hosted(linear(W, b), LoRA(rank=rank, alpha=2.0 * rank), A=A, B=B)
    for rows in (1, 3, 200):  # few rows and many: forming the product pays at different numbers of them
        x, dy = matrix(rows, i, seed=1), matrix(rows, o, seed=2)
        low = 2.0 * (x @ A.T) @ B.T
        same(host(x), x @ W.T + (0 if b is None else b) + low, 1e-10)
        found, G = grads(host, x, dy), dy.T @ x
        same(found["A"], 2.0 * B.T @ G, 1e-9)
        same(found["B"], 2.0 * G @ A.T, 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_merged_weight_gives_what_the_factors_give(shape: tuple[int, int]) -> None:
    o, i = shape
    rank = oversized(o, i)
    method = LoRA(rank=rank, alpha=2.0 * rank)
    host = hosted(linear(matrix(o, i)), method, A=matrix(rank, i, seed=3), B=matrix(o, rank, seed=4))
    x = matrix(9, i, seed=1)
    before = host(x).detach()
    host.merge("a")
    same(host(x), before, 1e-10)
    host.unmerge()
    same(host(x), before)


def test_ranks_of_every_size_share_one_batch_and_each_row_is_as_if_alone() -> None:
    host = hosted(linear(matrix(8, 6)), LoRA(rank=1, alpha=2))
    ranks = {"a": 1, "mid": 3, "high": 6}
    for name, rank in ranks.items():
        if name != "a":
            host.add(name, make_method("lora", rank=rank, alpha=2.0 * rank), "fc", dtype=torch.float64)
        for param, tensor in tensors(host, name).items():
            host.adapter(name).set("fc", param, matrix(*tensor.shape, seed=rank))
    x = matrix(4, 6, seed=1)
    with host.rows(["a", "high", "mid", "high"]):
        mixed = host(x).detach()
    for row, name in enumerate(["a", "high", "mid", "high"]):
        with host.rows([name]):
            same(mixed[row : row + 1], host(x[row : row + 1]), 1e-12)


def test_a_rank_that_no_weight_can_have_is_refused_by_name() -> None:
    with pytest.raises(MethodError, match=r"Rank 6 is larger than site 'fc' \(7×5\) allows; choose at most 5"):
        hosted(linear(matrix(7, 5)), LoRA(rank=6))
