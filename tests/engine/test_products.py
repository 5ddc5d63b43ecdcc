"""Which low-rank products are joined, which are multiplied out, and that all of these are the same function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorica.core.update import LinearUpdate, LowRank
from lorica.engine.blocks import Block, Term
from lorica.engine.equation import Dropout, Mask, reference_linear
from lorica.engine.linear import Base, Part, adapted_linear
from lorica.engine.products import Product, blocks_of

RNG = torch.Generator()


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64).requires_grad_(True)


def base(weight_OI: Tensor, *sizes: int) -> Base:
    return Base(lambda x: F.linear(x, weight_OI), lambda dy: dy @ weight_OI, None, sizes)


def terms_of(ranks: list[int], width: int = 64, out: int = 48) -> tuple[list[Term], list[Tensor]]:
    """One plain term for each rank."""
    tensors: list[Tensor] = []
    terms = []
    for rank in ranks:
        tensors += [leaf(rank, width), leaf(out, rank)]
        terms.append(Term(slice(None), len(tensors) - 2, len(tensors) - 1, -1, -1, 1.0))
    return terms, tensors


def counts(ranks: list[int], height: int = 2, heights: list[int] | None = None) -> list[int]:
    """How many neighbours each product holds."""
    terms, tensors = terms_of(ranks)
    edges = [0]
    for size in heights or [height] * len(ranks):
        edges.append(edges[-1] + size)
    segments = [(slice(a, b), (t,), None) for a, b, t in zip(edges, edges[1:], terms, strict=False)]
    return [block.count for block in blocks_of(segments, tensors) if isinstance(block, Block)]


def test_neighbours_of_one_height_and_nearly_one_rank_share_a_product() -> None:
    assert counts([8, 4, 16, 1]) == [4], "small ranks cost the same"
    assert counts([24, 32, 20]) == [3]
    assert counts([8, 8, 8, 8], heights=[2, 2, 3, 2]) == [2, 1, 1]


def test_a_tenant_of_a_high_rank_does_not_fill_up_the_others() -> None:
    assert counts([8, 8, 40, 8, 8]) == [2, 1, 2]
    terms, tensors = terms_of([8, 8, 40, 8, 8])
    segments = [(slice(2 * i, 2 * i + 2), (t,), None) for i, t in enumerate(terms)]
    assert [b.width for b in blocks_of(segments, tensors) if isinstance(b, Block)] == [8, 40, 8]


def test_rows_of_the_base_between_tenants_leave_them_joined_on_either_side() -> None:
    terms, tensors = terms_of([8, 8, 8, 8])
    spans = [(0, 2), (2, 4), (6, 8), (8, 10)]
    segments = [(slice(*span), (t,), None) for span, t in zip(spans, terms, strict=True)]
    assert [b.rows for b in blocks_of(segments, tensors)] == [slice(0, 4), slice(6, 10)]


def is_multiplied_out(rank: int, rows: int) -> bool:
    terms, tensors = terms_of([rank])
    found = blocks_of([(slice(0, rows), (terms[0],), None)], tensors)
    return isinstance(found[0], Product)


def test_factors_are_multiplied_out_only_where_that_is_less_work() -> None:
    width, out, rank = 64, 48, 40
    assert rank * (out + width) > out * width
    assert not is_multiplied_out(rank, 4), "a matrix costs as much for few rows as for many"
    assert is_multiplied_out(rank, 1000)
    assert not is_multiplied_out(24, 10**6), "24 · (48 + 64) is less than 48 · 64"
    fewest = next(rows for rows in range(1, 1000) if is_multiplied_out(rank, rows))
    factors = 3 * fewest * rank * (out + width)
    matrix = 3 * fewest * out * width + 4 * rank * out * width
    assert matrix < factors < matrix * (1 + 1 / fewest)


@st.composite
def high_ranks(draw: Any) -> tuple[list[Part], list[Tensor], int]:
    """Parts with factors of ranks up to more than the width, some with vectors, some frozen, some under dropout."""
    RNG.manual_seed(draw(st.integers(0, 999)))
    parts: list[Part] = []
    leaves: list[Tensor] = []
    start = 0
    for _ in range(draw(st.integers(1, 3))):
        stop = start + draw(st.integers(1, 12))
        rank = draw(st.integers(3, 8))  # at five rows and more, eight are multiplied out
        tensors: list[Tensor | None] = [leaf(rank, 5), leaf(4, rank)]
        tensors += [leaf(size) if draw(st.booleans()) else None for size in (rank, 4)]
        for tensor in tensors:
            if tensor is not None:
                tensor.requires_grad_(draw(st.booleans()))
        A, B, mid, post = tensors
        assert A is not None and B is not None
        factor = LowRank(A, B, draw(st.sampled_from([1.0, -0.5])), mid, post)
        mask = Dropout(0.5, (Mask(start, stop - start, 0, stop - start),)) if draw(st.booleans()) else None
        parts.append(Part(start, stop, LinearUpdate((factor,)), mask))
        leaves += [t for t in tensors if t is not None and t.requires_grad]
        start = stop
    return parts, leaves, start


@settings(max_examples=150)
@given(made=high_ranks())
def test_a_product_that_is_multiplied_out_equals_its_factors(made: tuple[list[Part], list[Tensor], int]) -> None:
    parts, leaves, rows = made
    x, weight = leaf(rows, 5), leaf(4, 5).detach()
    found = adapted_linear(x, base(weight), parts)
    pieces = []
    for part in parts:
        own, factor = x[part.start : part.stop], part.update.factors[0]
        seen = own if part.dropout is None else part.dropout(own)
        pieces.append(own @ weight.T + seen @ factor.dense().T)
    expected, dy = torch.cat(pieces), leaf(rows, 4).detach()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for one, two in zip(
        torch.autograd.grad(found, [x, *leaves], dy), torch.autograd.grad(expected, [x, *leaves], dy), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_high_and_low_ranks_of_several_maps_in_one_batch_equal_each_alone() -> None:
    RNG.manual_seed(5)
    sizes, width, height = (6, 4), 8, 40
    weight, x = leaf(sum(sizes), width).detach(), leaf(3 * height, width)
    ranks = [(2, 1), (8, 4), (1, 3)]  # the middle tenant's first map has 8 · (6 + 8) > 6 · 8
    parts: list[Part] = []
    leaves: list[Tensor] = [x]
    expected = []
    for t, own in enumerate(ranks):
        rows = slice(t * height, (t + 1) * height)
        columns, start = [], 0
        for m, (rank, size) in enumerate(zip(own, sizes, strict=True)):
            update = LinearUpdate((LowRank(leaf(rank, width), leaf(size, rank), 0.5),))
            parts.append(Part(rows.start, rows.stop, update, map=m))
            leaves += [update.factors[0].A_RI, update.factors[0].B_OR]
            columns.append(reference_linear(x[rows], weight[start : start + size], None, update))
            start += size
        expected.append(torch.cat(columns, 1))
    found, right = adapted_linear(x, base(weight, *sizes), parts), torch.cat(expected)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    dy = leaf(*right.shape).detach()
    for one, two in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(right, leaves, dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_few_rows_of_a_half_precision_base_are_adapted_in_float32_and_rounded_once() -> None:
    RNG.manual_seed(6)
    A, B = (t.detach().float() for t in (leaf(2, 64), leaf(48, 2)))
    x, weight = leaf(8, 64).detach().bfloat16(), leaf(48, 64).detach().bfloat16()
    y = adapted_linear(x, base(weight), [Part(0, 8, LinearUpdate((LowRank(A, B, 0.5),)))])
    expected = (F.linear(x, weight).float() + 0.5 * (x.float() @ A.T) @ B.T).bfloat16()
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=1e-6)
