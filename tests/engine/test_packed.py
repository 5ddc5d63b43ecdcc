"""Packed attention is attention of each sequence alone, whatever its kernel, bucket, window, prefix, cap and sink."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorica.engine.buckets import plan
from lorica.engine.packed import packed_attention
from lorica.engine.short_attention import LONGEST, short_attention, worth_it

RNG = torch.Generator()


class Causal(nn.Module):
    """What an attention kernel asks of its module."""

    is_causal = True


class Both(nn.Module):
    is_causal = False


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64).to(dtype)


def alone(
    q: Tensor, k: Tensor, v: Tensor, prefix: Any, causal: bool, window: int | None, cap: float | None, sink: Any
) -> Tensor:
    """One sequence, [T, H, K], by the definition."""
    tokens, heads, dim = q.shape
    extra = 0
    if prefix is not None:
        extra = prefix[0].shape[0]
        k, v = torch.cat([prefix[0], k]), torch.cat([prefix[1], v])
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thk,shk->hts", q, k) * dim**-0.5
    scores = scores if cap is None else torch.tanh(scores / cap) * cap
    t, s = torch.arange(tokens)[:, None], torch.arange(-extra, tokens)[None]
    seen = torch.ones(tokens, tokens + extra, dtype=torch.bool)
    if causal:
        seen &= s <= t
    if window is not None:
        seen &= (s < 0) | ((s > t - window) & (s < t + window))
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(-1, tokens, 1)], dim=-1)
    return torch.einsum("hts,shk->thk", scores.softmax(-1)[..., : tokens + extra], v)


@settings(max_examples=80)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    groups=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 40),
    cap=st.none() | st.just(2.0),
    sink=st.booleans(),
    prefixed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_sequence_gets_what_it_gets_alone(
    lengths: list[int],
    groups: int,
    causal: bool,
    window: int | None,
    cap: float | None,
    sink: bool,
    prefixed: bool,
    seed: int,
) -> None:
    RNG.manual_seed(seed)
    total, heads, dim = sum(lengths), 4, 4
    q, k, v = (rand(total, n, dim).requires_grad_(True) for n in (heads, groups, groups))
    prefixes = [
        (rand(3, groups, dim).requires_grad_(True), rand(3, groups, dim).requires_grad_(True))
        if prefixed and i % 2 == 0
        else None
        for i in range(len(lengths))
    ]
    sinks = rand(heads) if sink else None
    found = packed_attention(
        Causal() if causal else Both(),
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        lengths=lengths,
        prefixes=prefixes,
        sliding_window=window,
        softcap=cap,
        s_aux=sinks,
    )[0]
    pieces = [x.split(lengths) for x in (q, k, v)]
    expected = torch.cat(
        [
            alone(*(p[i] for p in pieces), prefixes[i], causal, window, cap, sinks)  # type: ignore[call-arg]
            for i in range(len(lengths))
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # a capped softmax is in float32 at least
    leaves = [q, k, v, *(t for pair in prefixes if pair is not None for t in pair)]
    dy = rand(*expected.shape)
    for one, two in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", [[32, 32], [1, 7, 40, 40, 90], [LONGEST]])
def test_the_short_kernel_is_attention_to_the_rounding_of_half_precision(
    lengths: list[int], window: int | None
) -> None:
    RNG.manual_seed(5)
    total = sum(lengths)
    leaves = [rand(total, n, 8, dtype=torch.bfloat16).requires_grad_(True) for n in (4, 2, 2)]
    exact = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    assert worth_it(leaves[0], max(lengths))
    found = packed_attention(
        Causal(),
        *(x.transpose(0, 1)[None] for x in leaves),
        lengths=lengths,
        prefixes=[None] * len(lengths),
        sliding_window=window,
    )[0]
    pieces = [x.split(lengths) for x in exact]
    expected = torch.cat(
        [alone(*(p[i] for p in pieces), None, True, window, None, None) for i in range(len(lengths))]  # type: ignore[call-arg]
    )
    assert (found.double() - expected).abs().max() < 0.02
    dy = rand(*expected.shape)
    ours = torch.autograd.grad(found, leaves, dy.bfloat16())
    theirs = torch.autograd.grad(expected, exact, dy)
    for one, two in zip(ours, theirs, strict=True):
        assert (one.double() - two).norm() < 0.02 * two.norm()


@pytest.mark.parametrize("window", [None, 4])
def test_short_half_precision_sequences_see_their_prefixes(window: int | None) -> None:
    RNG.manual_seed(7)
    lengths = [33, 20, 40]
    leaves = [rand(sum(lengths), heads, 16, dtype=torch.bfloat16).requires_grad_(True) for heads in (4, 2, 2)]
    leaves += [rand(5, 2, 16, dtype=torch.bfloat16).requires_grad_(True) for _ in range(2)]
    exact = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    packed = [x.transpose(0, 1)[None] for x in leaves[:3]]
    prefixes = [(leaves[3], leaves[4]), None, (leaves[3], leaves[4])]
    found = packed_attention(Causal(), *packed, lengths=lengths, prefixes=prefixes, sliding_window=window)[0]
    pieces = [x.split(lengths) for x in exact[:3]]
    own = [(exact[3], exact[4]), None, (exact[3], exact[4])]
    expected = torch.cat(
        [alone(*(p[i] for p in pieces), own[i], True, window, None, None) for i in range(3)]  # type: ignore[call-arg]
    )
    assert (found.double() - expected).abs().max() < 0.03
    dy = rand(*expected.shape)
    slopes = torch.autograd.grad(found, leaves, dy.bfloat16())
    for one, two in zip(slopes, torch.autograd.grad(expected, exact, dy), strict=True):
        assert (one.double() - two).norm() < 0.02 * two.norm()


def test_scores_are_made_in_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    RNG.manual_seed(6)
    q, k, v = (rand(3, 16, n, 8, dtype=torch.bfloat16).requires_grad_(True) for n in (4, 2, 2))
    whole = short_attention(q, k, v, 0.3)
    slopes = torch.autograd.grad(whole.float().square().sum(), (q, k, v))
    monkeypatch.setattr("lorica.engine.short_attention.SCORES", 600)
    pieces = short_attention(q, k, v, 0.3)
    assert torch.equal(pieces, whole)
    for one, two in zip(torch.autograd.grad(pieces.float().square().sum(), (q, k, v)), slopes, strict=True):
        assert torch.equal(one, two)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=9), st.booleans())
def test_buckets_hold_every_token_once_and_pad_little(lengths: list[int], pad: bool) -> None:
    made = plan(tuple(lengths), (0,) * len(lengths), pad, torch.device("cpu"))
    x = torch.arange(sum(lengths), dtype=torch.float64)[:, None, None]
    pieces = made.spread(x)
    assert torch.equal(made.join(pieces), x)
    assert all(
        set(row.tolist()) == set(range(sum(lengths[:i]), sum(lengths[: i + 1])))
        for bucket, piece in zip(made.buckets, pieces, strict=True)
        for i, row in zip(bucket.rows, piece[..., 0, 0], strict=True)
    ), "what is padded is of the sequence itself"
    assert sorted(row for b in made.buckets for row in b.rows) == list(range(len(lengths)))
    for bucket in made.buckets:
        assert all(lengths[row] <= bucket.width <= max(16, 2 * lengths[row]) for row in bucket.rows)
        assert pad or all(lengths[row] == bucket.width for row in bucket.rows)
