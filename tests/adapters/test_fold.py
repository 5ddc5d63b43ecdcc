"""Folding in float64: equal to the updates beside the weight, in whatever blocks, and undone by its inverse."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorica.adapters.fold import (
    blocks,
    changes_weight,
    doubled,
    fold_bias,
    fold_weight,
    invertible,
    rows_of,
    unfold_bias,
    unfold_weight,
)
from lorica.adapters.probe import beside
from lorica.core.update import LinearUpdate, LowRank
from tests.contract.cases import close

SHAPES = st.sampled_from([(5,), (1,), (6, 4), (1, 7), (6, 3, 2), (4, 2, 3, 2)])
PARTS = st.sets(st.sampled_from(["factors", "shared", "delta", "in", "out", "bias", "scale_bias"]))


def draw(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


def make(shape: tuple[int, ...], parts: set[str], rng: torch.Generator) -> LinearUpdate:
    """An update with these parts; scales stay away from zero. A norm takes no factors and no input scale of its own."""
    rows, norm = shape[0], len(shape) == 1
    factors: tuple[LowRank, ...] = ()
    if "factors" in parts and not norm:
        factors += (LowRank(draw(rng, 2, *shape[1:]), draw(rng, rows, 2), 0.7),)
    if "shared" in parts and not norm:
        factors += (LowRank(draw(rng, 3, *shape[1:]), draw(rng, rows, 3), 1.0, draw(rng, 3), draw(rng, rows)),)
    return LinearUpdate(
        factors=factors,
        delta=draw(rng, *shape) if "delta" in parts else None,
        in_scale_I=1.5 + draw(rng, shape[1]).tanh() if "in" in parts and not norm else None,
        out_scale_O=1.5 + draw(rng, rows).tanh() if "out" in parts else None,
        bias_O=draw(rng, rows) if "bias" in parts else None,
        scale_bias="scale_bias" in parts,
    )


@settings(max_examples=80, deadline=None)
@given(shape=SHAPES, stack=st.lists(PARTS, max_size=3), seed=st.integers(0, 99))
def test_folding_equals_the_stack_beside_the_weight_and_has_an_inverse(
    shape: tuple[int, ...], stack: list[set[str]], seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight, bias_O = draw(rng, *shape), draw(rng, shape[0])
    updates = [make(shape, parts, rng) for parts in stack]
    folded = fold_weight(weight, updates)
    x_NC = draw(rng, 4, shape[0] if len(shape) == 1 else math.prod(shape[1:]))
    wanted_NO = folded * x_NC if len(shape) == 1 else x_NC @ folded.flatten(1).T
    close(beside(x_NC, weight, updates), wanted_NO, 1e-11)
    close(unfold_weight(folded, updates), weight, 1e-10)
    after_O = fold_bias(bias_O, updates)
    assert after_O is not None
    close(unfold_bias(after_O, updates), bias_O, 1e-10)
    if not any(changes_weight(update) for update in updates):
        assert torch.equal(folded, weight)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, parts=PARTS, seed=st.integers(0, 99), cut=st.integers(1, 6))
def test_rows_fold_alone_as_they_do_together(shape: tuple[int, ...], parts: set[str], seed: int, cut: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight, update = draw(rng, *shape), make(shape, parts, rng)
    spans = [slice(start, start + cut) for start in range(0, shape[0], cut)]
    pieces = [fold_weight(weight[rows], [rows_of(update, rows)]) for rows in spans]
    close(torch.cat(pieces), fold_weight(weight, [update]), 1e-13)


@given(rows=st.integers(1, 10**6), columns=st.integers(1, 10**7))
@settings(max_examples=40, deadline=None)
def test_blocks_cover_every_row_once_and_stay_small(rows: int, columns: int) -> None:
    done = 0
    for index, span in enumerate(blocks((rows, columns))):
        assert span.start == done
        assert (span.stop - span.start) * columns <= max(2**23, columns)
        done = span.stop
        if index > 50:
            return
    assert done == rows


def test_doubling_keeps_the_values_and_can_share_no_memory() -> None:
    rng = torch.Generator().manual_seed(0)
    update = make((4, 3), {"factors", "shared", "delta", "in", "out", "bias"}, rng)
    copied = doubled(update, torch.device("cpu"), copy=True)
    wanted = fold_weight(torch.ones(4, 3, dtype=torch.float64), [update])
    for tensor in (update.delta, update.in_scale_I, update.out_scale_O, *(f.A_RI for f in update.factors)):
        assert tensor is not None
        tensor.zero_()
    assert torch.equal(fold_weight(torch.ones(4, 3, dtype=torch.float64), [copied]), wanted)
    assert invertible(copied) and not invertible(update)
