"""The fused linear node equals the update equation in plain autograd, forward and backward, for any mix of updates."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorica.core.update import LinearUpdate, LowRank
from lorica.engine.equation import Dropout, Mask, on_top, reference_linear
from lorica.engine.linear import Base, Part, adapted_linear

I, O, N = 5, 4, 9  # noqa: E741
RNG = torch.Generator()


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=RNG, dtype=dtype)


def leaf(*shape: int) -> Tensor:
    return rand(*shape).requires_grad_(True)


def base(weight_OI: Tensor, bias_O: Tensor | None) -> Base:
    return Base(lambda x: F.linear(x, weight_OI, bias_O), lambda dy: dy @ weight_OI.to(dy.dtype), bias_O)


@st.composite
def updates(draw: Any) -> tuple[LinearUpdate, list[Tensor]]:
    """A random update and its leaves."""
    RNG.manual_seed(draw(st.integers(0, 999)))
    leaves: list[Tensor] = []

    def maybe(*shape: int) -> Tensor | None:
        if not draw(st.booleans()):
            return None
        leaves.append(leaf(*shape))
        return leaves[-1]

    factors = []
    for _ in range(draw(st.integers(0, 2))):
        rank = draw(st.integers(1, 3))
        A, B = leaf(rank, I), leaf(O, rank)
        leaves.extend((A, B))
        factors.append(LowRank(A, B, draw(st.sampled_from([1.0, -0.5, 2.0])), maybe(rank), maybe(O)))
    update = LinearUpdate(tuple(factors), maybe(O, I), maybe(I), maybe(O), maybe(O), scale_bias=draw(st.booleans()))
    return update, leaves


@st.composite
def batches(draw: Any) -> tuple[list[Part], list[list[Tensor]]]:
    """Segments of a batch of N positions, with base positions between them; neighbours may share an update."""
    edges = sorted(draw(st.sets(st.integers(0, N), min_size=2, max_size=5)))
    parts, leaves = [], []
    for start, stop in itertools.pairwise(edges):
        if draw(st.integers(0, 3)):
            update, own = draw(updates())
            parts.append(Part(start, stop, update))
            leaves.append(own)
    return parts, leaves


@settings(max_examples=150)
@given(batches(), st.booleans(), st.booleans())
def test_any_mix_of_updates_equals_the_equation(
    batch: tuple[list[Part], list[list[Tensor]]], with_bias: bool, train_x: bool
) -> None:
    parts, owned = batch
    weight, bias = rand(O, I), rand(O) if with_bias else None
    x = rand(N, I).requires_grad_(train_x)
    leaves = [t for own in owned for t in own]
    y = adapted_linear(x, base(weight, bias), parts)
    reference = []
    for n in range(N):
        part = next((p for p in parts if p.start <= n < p.stop), None)
        row = x[n : n + 1]
        reference.append(
            F.linear(row, weight, bias) if part is None else reference_linear(row, weight, bias, part.update)
        )
    expected = torch.cat(reference)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    wanted = [t for t in [x, *leaves] if t.requires_grad]
    if not wanted or not y.requires_grad:
        return
    dy = rand(N, O)
    found = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    right = (
        torch.autograd.grad(expected, wanted, dy, allow_unused=True) if expected.requires_grad else [None] * len(wanted)
    )
    for one, two in zip(found, right, strict=True):
        zero = torch.zeros(1, dtype=torch.float64)
        torch.testing.assert_close(zero if one is None else one, zero if two is None else two, rtol=1e-10, atol=1e-10)


@settings(max_examples=60)
@given(updates(), st.booleans())
def test_the_equation_is_the_effective_weight(made: tuple[LinearUpdate, list[Tensor]], with_bias: bool) -> None:
    update, _ = made
    weight, bias = rand(O, I), rand(O) if with_bias else None
    x = rand(N, I)
    b = update.effective_bias(bias)
    expected = F.linear(x, update.effective(weight), b)
    torch.testing.assert_close(reference_linear(x, weight, bias, update), expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=40)
@given(updates(), updates(), st.booleans())
def test_an_update_on_top_of_another_is_the_composition_of_effective_weights(
    lower: tuple[LinearUpdate, list[Tensor]], upper: tuple[LinearUpdate, list[Tensor]], with_bias: bool
) -> None:
    weight, bias, x = rand(O, I), rand(O) if with_bias else None, rand(N, I)
    below, above = lower[0], upper[0]
    x_in = x if above.in_scale_I is None else x * above.in_scale_I
    middle = below.effective_bias(bias)
    y = on_top(x, reference_linear(x_in, weight, bias, below), middle, above)
    expected = F.linear(x, above.effective(below.effective(weight)), above.effective_bias(middle))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def low_rank(rank: int = 2, **fields: Any) -> tuple[LinearUpdate, Tensor, Tensor]:
    A, B = leaf(rank, I), leaf(O, rank)
    return LinearUpdate((LowRank(A, B, 0.5),), **fields), A, B


def test_equal_segments_through_one_batched_product_equal_each_alone() -> None:
    RNG.manual_seed(1)
    weight, x = rand(O, I), leaf(6, I)
    made = [low_rank() for _ in range(3)]
    parts = [Part(2 * i, 2 * i + 2, update) for i, (update, _, _) in enumerate(made)]
    y = adapted_linear(x, base(weight, None), parts)
    pieces = [reference_linear(x[2 * i : 2 * i + 2], weight, None, update) for i, (update, _, _) in enumerate(made)]
    torch.testing.assert_close(y, torch.cat(pieces), rtol=1e-12, atol=1e-12)
    leaves = [x] + [t for _, A, B in made for t in (A, B)]
    dy = rand(6, O)
    for one, two in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(torch.cat(pieces), leaves, dy), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_a_mask_is_the_same_in_backward_as_in_forward_and_keeps_the_mean() -> None:
    RNG.manual_seed(2)
    update, A, B = low_rank(dropout=0.5)
    weight, x, drop = rand(O, I), leaf(N, I), Dropout(0.5, (Mask(7, N, 0, N),))
    y = adapted_linear(x, base(weight, None), [Part(0, N, update, drop)])
    masked = drop(x)
    expected = x @ weight.T + 0.5 * (masked @ A.T) @ B.T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = rand(N, O)
    for one, two in zip(
        torch.autograd.grad(y, [x, A, B], dy), torch.autograd.grad(expected, [x, A, B], dy), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    ones = torch.ones(4000, 5)
    dropped = Dropout(0.25, (Mask(3, 4000, 0, 4000),))(ones)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_a_mask_of_some_positions_is_those_of_the_whole_mask(lengths: list[int], data: st.DataObject) -> None:
    total = sum(lengths)
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    whole = Dropout(0.5, tuple(Mask(seed, length, 0, length) for seed, length in enumerate(lengths)))
    x = torch.ones(total, 3)
    assert torch.equal(whole.cut(start, stop)(x[start:stop]), whole(x)[start:stop])
    first = Dropout(0.5, whole.rows[:1])
    assert torch.equal(first(x[: lengths[0]]), whole(x)[: lengths[0]]), "a row's mask is its own"


@settings(max_examples=100)
@given(st.data(), st.booleans(), st.booleans())
def test_several_maps_of_one_input_are_each_map_alone(data: Any, with_bias: bool, equal_segments: bool) -> None:
    sizes = (O, 3, 2)
    RNG.manual_seed(data.draw(st.integers(0, 999)))
    weights, x = [rand(size, I) for size in sizes], leaf(N, I)
    biases = [rand(size) if with_bias else None for size in sizes]
    joint_bias = torch.cat([b for b in biases if b is not None]) if with_bias else None
    joint = Base(
        lambda x: torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], 1),
        lambda dy: dy @ torch.cat(weights),
        joint_bias,
        sizes,
    )
    edges = [0, 3, 6, 9] if equal_segments else [0, 2, 3, 7]
    shared = rand(2, I)  # a frozen factor that every map reads
    parts: list[Part] = []
    leaves: list[Tensor] = [x]
    for start, stop in itertools.pairwise(edges):
        rank = data.draw(st.integers(1, 3))
        for index, size in enumerate(sizes):
            factors = []
            if equal_segments or data.draw(st.booleans()):
                A, B = leaf(rank, I), leaf(size, rank)
                factors.append(LowRank(A, B, 0.5))
                leaves += [A, B]
            extra: dict[str, Tensor] = {}
            if not equal_segments and data.draw(st.booleans()):
                mid, post, frozen = leaf(2), leaf(size), rand(size, 2)
                factors.append(LowRank(shared, frozen, 2.0, mid, post))
                extra = {"out_scale_O": leaf(size), "bias_O": leaf(size)}
                leaves += [mid, post, *extra.values()]
            if factors:
                parts.append(Part(start, stop, LinearUpdate(tuple(factors), **extra), map=index))
    found = adapted_linear(x, joint, parts).split(sizes, dim=1)
    expected = [
        adapted_linear(
            x,
            base(weights[index], biases[index]),
            [Part(p.start, p.stop, p.update) for p in parts if p.map == index],
        )
        for index in range(len(sizes))
    ]
    dys = [rand(N, size) for size in sizes]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)
    if not parts:
        return
    ours = torch.autograd.grad(found, leaves, dys)
    theirs = torch.autograd.grad(expected, leaves, dys)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@given(updates(), st.booleans())
def test_an_input_that_is_made_within_the_node_is_that_input_made_outside(
    made: tuple[LinearUpdate, list[Tensor]], with_bias: bool
) -> None:
    update, leaves = made
    weight, bias = rand(O, I), rand(O) if with_bias else None
    gate, up = leaf(N, I), leaf(N, I)
    parts = [Part(2, 7, update)]
    found = adapted_linear([gate, up], base(weight, bias), parts, make=lambda g, u: F.silu(g) * u)
    expected = adapted_linear(F.silu(gate) * up, base(weight, bias), parts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    dy = rand(N, O)
    for one, two in zip(
        torch.autograd.grad(found, [gate, up, *leaves], dy),
        torch.autograd.grad(expected, [gate, up, *leaves], dy),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_equal_segments_of_different_rank_are_filled_up_and_keep_their_own_gradients() -> None:
    RNG.manual_seed(8)
    weight, x = rand(O, I), leaf(6, I)
    made = [low_rank(rank) for rank in (1, 3, 2)]
    parts = [Part(2 * i, 2 * i + 2, update) for i, (update, _, _) in enumerate(made)]
    y = adapted_linear(x, base(weight, None), parts)
    pieces = [reference_linear(x[2 * i : 2 * i + 2], weight, None, update) for i, (update, _, _) in enumerate(made)]
    torch.testing.assert_close(y, torch.cat(pieces), rtol=1e-12, atol=1e-12)
    leaves = [t for _, A, B in made for t in (A, B)]
    dy = rand(6, O)
    for one, two in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(torch.cat(pieces), leaves, dy), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_a_plain_low_rank_update_saves_x_and_rank_values_a_token() -> None:
    RNG.manual_seed(3)
    wide = 64
    A, B = leaf(2, wide), leaf(O, 2)
    x, weight = leaf(N, wide), rand(O, wide)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        adapted_linear(x, base(weight, None), [Part(0, N, LinearUpdate((LowRank(A, B),)))])
    own = {x.data_ptr(), A.data_ptr(), B.data_ptr()}
    assert [t.numel() for t in saved if t.data_ptr() not in own] == [N * 2]


def test_nothing_but_x_is_saved_where_the_rank_is_large_beside_the_width() -> None:
    RNG.manual_seed(3)
    update, A, B = low_rank()
    x, weight = leaf(N, I), rand(O, I)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        adapted_linear(x, base(weight, None), [Part(0, N, update)])
    assert {t.data_ptr() for t in saved} <= {x.data_ptr(), A.data_ptr(), B.data_ptr()}


def test_base_positions_alone_save_nothing() -> None:
    x, weight = leaf(N, I), rand(O, I)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = adapted_linear(x, base(weight, None), [])
    assert not saved
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(N, O, dtype=torch.float64) @ weight)


def test_adapter_arithmetic_in_float32_on_a_half_base_is_rounded_once() -> None:
    RNG.manual_seed(4)
    A, B = rand(2, I, dtype=torch.float32), rand(O, 2, dtype=torch.float32)
    x, weight = rand(N, I).bfloat16(), rand(O, I).bfloat16()
    update = LinearUpdate((LowRank(A, B, 0.5),))
    y = adapted_linear(x, base(weight, None), [Part(0, N, update)], torch.float32)
    expected = (F.linear(x, weight).float() + 0.5 * (x.float() @ A.T) @ B.T).bfloat16()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-6)


def test_gradients_have_the_masters_dtype_whatever_the_activations_are() -> None:
    RNG.manual_seed(5)
    A = rand(2, I, dtype=torch.float32).requires_grad_(True)
    B = rand(O, 2, dtype=torch.float32).requires_grad_(True)
    x, weight = rand(N, I).bfloat16().requires_grad_(True), rand(O, I).bfloat16()
    adapted_linear(x, base(weight, None), [Part(0, N, LinearUpdate((LowRank(A, B),)))]).sum().backward()
    assert A.grad is not None and A.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_a_segment_that_is_scaled_leaves_its_neighbours_and_the_caller_alone() -> None:
    RNG.manual_seed(6)
    x, weight = rand(N, I), rand(O, I)
    before = x.clone()
    dy = rand(N, O)
    kept = dy.clone()
    scale = leaf(O)
    x.requires_grad_(True)
    y = adapted_linear(x, base(weight, None), [Part(2, 5, LinearUpdate(out_scale_O=scale, in_scale_I=leaf(I)))])
    y.backward(dy)
    assert torch.equal(x.detach(), before) and torch.equal(dy, kept)
    assert torch.equal(y[:2], F.linear(x, weight)[:2]) and torch.equal(y[5:], F.linear(x, weight)[5:])
