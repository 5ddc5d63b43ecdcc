"""Frozen factors of a rank that is large beside their map, under trained vectors: VeRA's default on a small model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorica.core.update import LinearUpdate, LowRank
from lorica.engine.blocks import WIDE, Block, Term
from lorica.engine.equation import Dropout, Mask, reference_linear
from lorica.engine.linear import Base, Part, adapted_linear

N, I, R = 9, 6, 3  # noqa: E741
SIZES = (5, 4)
RNG = torch.Generator()


def frozen(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


def leaf(*shape: int) -> Tensor:
    return frozen(*shape).requires_grad_(True)


def base(weight_OI: Tensor, *sizes: int) -> Base:
    return Base(lambda x: F.linear(x, weight_OI), lambda dy: dy @ weight_OI.to(dy.dtype), None, sizes)


def vera(A_RI: Tensor, B_OR: Tensor, scale: float = 0.5) -> tuple[LowRank, list[Tensor]]:
    """A factor and its vectors."""
    mid, post = leaf(A_RI.shape[0]), leaf(B_OR.shape[0])
    return LowRank(A_RI, B_OR, scale, mid, post), [mid, post]


def equal(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    dy = frozen(*expected.shape)
    ours = torch.autograd.grad(found, leaves, dy, retain_graph=True)
    theirs = torch.autograd.grad(expected, leaves, dy)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)
    for one, two in zip(ours, torch.autograd.grad(found, leaves, dy), strict=True):
        assert torch.equal(one, two), "a graph that is kept gives the same again"


def test_the_vector_stands_apart_from_a_frozen_b_of_a_large_rank_alone() -> None:
    def apart(rank: int, *, trained: bool = False, post: bool = True) -> bool:
        tensors = [frozen(rank, 64), frozen(32, rank), frozen(32)]
        block = Block(slice(0, 4), [[Term(slice(None), 0, 1, -1, 2 if post else -1, 1.0)]], tensors)
        low = block.add(frozen(4, 64), frozen(4, 32), tensors, lambda k: k == 2 or (trained and k == 1))
        return bool(low.us)

    least = 32 // WIDE
    assert apart(least)
    assert not apart(least - 1) and not apart(least, trained=True) and not apart(least, post=False)


def test_maps_that_share_both_factors_beside_another_adapter_equal_the_equation() -> None:
    RNG.manual_seed(1)
    weights, x = [frozen(size, I) for size in SIZES], leaf(N, I)
    A, B = frozen(R, I), frozen(max(SIZES), R)
    parts: list[Part] = []
    leaves = [x]
    for index, size in enumerate(SIZES):
        factor, vectors = vera(A, B[:size], scale=2.0)
        plain = LowRank(leaf(1, I), leaf(size, 1), 0.5)  # in the same block as the other
        parts.append(Part(0, 6, LinearUpdate((factor, plain), bias_O=leaf(size)), map=index))
        other = LowRank(leaf(R, I), leaf(size, R), 0.5)
        parts.append(Part(6, N, LinearUpdate((other,)), map=index))
        leaves += [*vectors, plain.A_RI, plain.B_OR, other.A_RI, other.B_OR]
    found = adapted_linear(x, base(torch.cat(weights), *SIZES), parts)
    columns = [
        torch.cat([reference_linear(x[p.start : p.stop], w, None, p.update) for p in parts if p.map == index])
        for index, w in enumerate(weights)
    ]
    equal(found, torch.cat(columns, 1), leaves)


@pytest.mark.parametrize("frozen_one", ["", "mid", "post"])
@pytest.mark.parametrize("with_mid", [True, False])
def test_its_gradients_are_those_of_finite_differences(with_mid: bool, frozen_one: str) -> None:
    RNG.manual_seed(2)
    weight, x, A, B = frozen(5, I), leaf(N, I), frozen(R, I), frozen(5, R)
    mask = Dropout(0.4, (Mask(3, N, 0, N),))
    mid, post = leaf(R).requires_grad_(frozen_one != "mid"), leaf(5).requires_grad_(frozen_one != "post")

    def run(x: Tensor, mid: Tensor, post: Tensor) -> Tensor:
        factor = LowRank(A, B, -0.5, mid if with_mid else None, post)
        return adapted_linear(x, base(weight), [Part(1, N, LinearUpdate((factor,)), mask.cut(1, N))])

    assert torch.autograd.gradcheck(run, (x, mid, post))


def test_an_input_that_is_made_and_a_checkpoint_change_nothing() -> None:
    RNG.manual_seed(3)
    weight, gate, up = frozen(5, I), leaf(N, I), leaf(N, I)
    factor, vectors = vera(frozen(R, I), frozen(5, R))
    leaves, part = [gate, up, *vectors], Part(0, N, LinearUpdate((factor,)))

    def run(gate: Tensor, up: Tensor) -> Tensor:
        return adapted_linear([gate, up], base(weight), [part], make=lambda g, u: F.silu(g) * u)

    expected, dy = reference_linear(F.silu(gate) * up, weight, None, part.update), frozen(N, 5)
    again = checkpoint(run, gate, up, use_reentrant=False)
    right = torch.autograd.grad(expected, leaves, dy, retain_graph=True)
    for one, two in zip(torch.autograd.grad(again, leaves, dy), right, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)
    equal(run(gate, up), expected, leaves)


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.float32, 2**-20), (torch.float16, 2**-9), (torch.bfloat16, 2**-6)])
def test_vectors_get_their_gradients_in_their_own_dtype_and_to_the_rounding_of_the_activations(
    dtype: torch.dtype, ulp: float
) -> None:
    RNG.manual_seed(4)
    rows, width, rank = 80, 64, 20
    sizes = (48, 32)
    x, dy = frozen(rows, width).to(dtype).requires_grad_(True), frozen(rows, sum(sizes)).to(dtype)
    weights = [(frozen(size, width) / 8).to(dtype) for size in sizes]
    A, B = frozen(rank, width).float() / 8, frozen(max(sizes), rank).float() / 4
    parts: list[Part] = []
    leaves, columns = [x], []
    for index, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        mid, post = (frozen(k).float().requires_grad_(True) for k in (rank, size))
        parts.append(Part(0, rows, LinearUpdate((LowRank(A, B[:size], 1.0, mid, post),)), map=index))
        exact = LowRank(A.double(), B[:size].double(), 1.0, mid.double(), post.double())
        columns.append(reference_linear(x.double(), weight.double(), None, LinearUpdate((exact,))))
        leaves += [mid, post]
    y, expected = adapted_linear(x, base(torch.cat(weights), *sizes), parts), torch.cat(columns, 1)
    found, right = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy.double())
    assert [t.dtype for t in found] == [dtype] + [torch.float32] * 4
    for one, two in zip([y, *found], [expected, *right], strict=True):
        assert (one.double() - two.double()).norm() < ulp * two.double().norm()
