"""The loss head against plain cross-entropy: loss, log-probabilities and gradients, for any chunk, weight and dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.training.loss_head import _room, chunk_rows, chunked_logprobs, linear_logprobs
from lorica.training.losses import CROSS_ENTROPY

N, D, V = 13, 6, 31


def given_rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=rng, dtype=torch.float64).to(dtype).requires_grad_(True)
    weight = torch.randn(V, D, generator=rng, dtype=torch.float64).to(dtype)
    weights = torch.randn(N, generator=rng)  # signed and fractional
    return hidden, weight, torch.randint(V, (N,), generator=rng), weights


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return -(logprobs * weights).sum(), logprobs


def frozen_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    lp = linear_logprobs(hidden, lambda h: h @ weight.T, lambda d: d @ weight, weight.shape[0], targets, chunk=chunk)
    return summed(lp, weights), lp.detach()


def summed(lp: Tensor, weights: Tensor) -> Tensor:
    return CROSS_ENTROPY.terms(lp, {"weights": weights.to(lp.dtype)}, [len(lp)]).sum()


@given(st.integers(1, 2 * N))
def test_any_chunk_gives_the_plain_loss_log_probabilities_and_gradient(chunk: int) -> None:
    hidden, weight, targets, weights = given_rows()
    expected, logprobs = plain(hidden, weight, targets, weights)
    (slope,) = torch.autograd.grad(3.0 * expected, hidden)
    found, found_logprobs = frozen_head(hidden, weight, targets, weights, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_logprobs, logprobs.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(3.0 * found, hidden)[0], slope, rtol=1e-11, atol=1e-11)


@given(st.integers(1, 2 * N), st.lists(st.integers(0, 4), min_size=N, max_size=N))
def test_several_targets_a_position_are_those_of_one_each(chunk: int, counts: list[int]) -> None:
    hidden, weight, _, _ = given_rows()
    rng = torch.Generator().manual_seed(2)
    rows = torch.arange(N).repeat_interleave(torch.tensor(counts))
    targets, weights = torch.randint(V, (len(rows),), generator=rng), torch.randn(len(rows), generator=rng)
    crow = [0, *torch.tensor(counts).cumsum(0).tolist()]
    expected = (hidden @ weight.T).log_softmax(-1)[rows, targets]
    found = chunked_logprobs(hidden, lambda h, start: h @ weight.T, targets, vocabulary=V, crow=crow, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    one, two = (torch.autograd.grad((lp * weights).sum(), hidden)[0] for lp in (found, expected))
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


@given(st.integers(1, 2 * N), st.booleans())
def test_a_head_that_is_trained_gets_the_plain_gradient(chunk: int, keep: bool) -> None:
    hidden, weight, targets, weights = given_rows()
    weight = weight.requires_grad_(True)
    expected, _ = plain(hidden, weight, targets, weights)
    slopes = torch.autograd.grad(expected, (hidden, weight))
    found = summed(
        chunked_logprobs(hidden, lambda h, start: h @ weight.T, targets, vocabulary=V, chunk=chunk, keep=keep), weights
    )
    for one, two in zip(torch.autograd.grad(found, (hidden, weight)), slopes, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_products_that_stand_in_for_the_head_are_used_in_both_directions() -> None:
    hidden, weight, targets, weights = given_rows()
    calls: list[str] = []

    def forward(h: Tensor) -> Tensor:
        calls.append("forward")
        return h @ weight.T

    def back(d: Tensor) -> Tensor:
        calls.append("back")
        return d @ weight

    found = summed(linear_logprobs(hidden, forward, back, V, targets, chunk=5), weights)
    assert calls == ["forward", "back"] * 3
    torch.testing.assert_close(found, plain(hidden, weight, targets, weights)[0])


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    hidden, weight, targets, _ = given_rows()
    calls: list[Tensor] = []

    def back(d: Tensor) -> Tensor:
        calls.append(d)
        return d @ weight

    with torch.no_grad():
        lp = linear_logprobs(hidden, lambda h: h @ weight.T, back, V, targets)
    assert not calls and not lp.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, targets, weights = given_rows(dtype)
    logits = (hidden @ weight.T).float().detach()
    found, logprobs = frozen_head(hidden, weight, targets, weights, chunk=4)
    assert logprobs.dtype == torch.float32
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    slope = torch.autograd.grad(found, hidden)[0]
    p = logits.softmax(-1).scatter_add(1, targets[:, None], -torch.ones(N, 1))
    right = (p * weights[:, None]) @ weight.float()
    assert slope.dtype == dtype
    torch.testing.assert_close(slope.float(), right, rtol=0.05, atol=0.05)


def test_a_confident_target_keeps_its_small_gradient_in_half_precision() -> None:
    # p = 0.9995 is 1 in bfloat16, and 1 − 1 would be no gradient at all
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[7.625], [0.0]], dtype=torch.bfloat16)
    loss, logprobs = frozen_head(hidden, weight, torch.tensor([0]), torch.ones(1))
    (slope,) = torch.autograd.grad(loss, hidden)
    assert 0 < float(-logprobs) < 1e-3
    assert float(slope) == pytest.approx(float(logprobs.double().expm1()) * 7.625, rel=0.01)


def test_a_chunk_of_a_large_vocabulary_stays_small() -> None:
    for vocabulary in (4096, 32_000, 152_000, 262_144):
        rows = chunk_rows(vocabulary, 2)
        assert 32 <= rows <= 512
        assert rows == 32 or rows * vocabulary * 2 <= 2**25
        room = _room(torch.empty(rows, vocabulary, dtype=torch.bfloat16), torch.float32)
        assert room.nbytes <= 2**21, "all else that a chunk takes"


@pytest.mark.parametrize("frozen", [True, False])
def test_an_impossible_token_that_does_not_count_changes_nothing(frozen: bool) -> None:
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight, targets, weights = torch.tensor([[0.0], [-torch.inf]]), torch.tensor([0, 1]), torch.tensor([1.0, 0.0])

    def forward(h: Tensor) -> Tensor:
        return h @ weight.T

    def back(d: Tensor) -> Tensor:
        return d @ weight.nan_to_num(neginf=0.0)

    if frozen:
        logprobs = linear_logprobs(hidden, forward, back, 2, targets)
    else:
        logits = torch.tensor([0.0, -torch.inf])
        logprobs = chunked_logprobs(hidden, lambda h, start: h + logits, targets, vocabulary=2)
    loss = summed(logprobs, weights)
    assert float(loss.detach()) == 0 and logprobs.tolist() == [0.0, -torch.inf]
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_a_second_derivative_is_refused_since_none_was_kept() -> None:
    hidden, weight, targets, weights = given_rows()
    loss, _ = frozen_head(hidden, weight, targets, weights)
    (slope,) = torch.autograd.grad(loss * hidden.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
