"""Ragged sequences on a GPU in one call: each equals its own attention; elsewhere other kernels serve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorica.engine.packed import packed_attention
from lorica.engine.varlen import varlen_attention, worth_it

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
LENGTHS = (7, 130, 1, 64)


class Causal(nn.Module):
    is_causal = True


def leaves(device: str, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    made = [torch.randn(sum(LENGTHS), heads, 64, generator=rng) for heads in (4, 2, 2)]
    return [x.to(dtype).to(device, dtype).requires_grad_() for x in made]


def packed(parts: list[Tensor], window: int | None) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in parts)
    none = [None] * len(LENGTHS)
    return packed_attention(Causal(), q, k, v, lengths=LENGTHS, prefixes=none, sliding_window=window)[0]


def test_a_cpu_has_no_such_kernel() -> None:
    assert not worth_it(torch.zeros(1, dtype=torch.bfloat16))


@needs_cuda
def test_the_kernel_is_there_for_halves_alone() -> None:
    assert worth_it(torch.zeros(1, dtype=torch.bfloat16, device="cuda"))
    assert not worth_it(torch.zeros(1, dtype=torch.float32, device="cuda"))


@needs_cuda
@pytest.mark.parametrize("window", [None, 5])
def test_ragged_sequences_in_one_call_are_each_alone(window: int | None) -> None:
    ours, exact = leaves("cuda", torch.bfloat16), leaves("cpu", torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in exact]
    found, wanted = packed(ours, window), packed(exact, window)
    assert torch.equal(found, varlen_attention(*ours, LENGTHS, 0.125, window))  # type: ignore[arg-type]
    assert (found.cpu().double() - wanted).abs().max() < 0.02
    dy = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes = torch.autograd.grad(found, ours, dy.to("cuda", torch.bfloat16))
    for one, two in zip(slopes, torch.autograd.grad(wanted, exact, dy), strict=True):
        assert (one.cpu().double() - two).norm() < 0.02 * two.norm()
