"""Frozen maps side by side: both products, packed and plain, and the rules for when a second copy is made."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.engine import prepack
from lorica.engine.prepack import FrozenMaps, can_pack, worth_packing


def maps(dtype: torch.dtype, *, biases: bool) -> tuple[list[Tensor], list[Tensor | None]]:
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(out, 24, generator=rng).to(dtype) for out in (16, 8, 8)]
    own: list[Tensor | None] = [torch.randn(16, generator=rng).to(dtype), None, torch.randn(8, generator=rng).to(dtype)]
    return weights, own if biases else [None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("packs", [True, False])
def test_products_in_both_directions_are_those_of_each_map(dtype: torch.dtype, biases: bool, packs: bool) -> None:
    if packs and not can_pack(dtype):
        pytest.skip(f"torch has no packed kernel for {dtype} on this machine")
    weights, own = maps(dtype, biases=biases)
    joint = FrozenMaps(weights, own)
    joint.packs = packs
    rng = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(5, width, generator=rng).to(dtype) for width in (24, 32))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    for _ in range(2):  # packed on first use, then kept
        expected = torch.cat([F.linear(x.double(), w.double()) for w in weights], 1)
        if joint.bias_O is not None:
            expected = expected + joint.bias_O.double()
        assert (joint.forward(x).double() - expected).abs().max() < tolerance
        slope = dy.double() @ torch.cat(weights).double()
        assert (joint.back(dy).double() - slope).abs().max() < tolerance
    assert (joint.bias_O is not None) == biases
    assert joint.sizes == (16, 8, 8)


def test_a_second_copy_is_made_where_it_is_a_small_part_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(1000, 1000)  # 4 MB
    for memory, copies, expected in ((17e6, 1, True), (15e6, 1, False), (17e6, 2, False), (33e6, 2, True)):
        monkeypatch.setattr(prepack, "_memory", lambda memory=memory: int(memory))
        assert worth_packing([weight], copies=copies) == (expected and can_pack(torch.float32))


def test_weights_that_no_kernel_takes_are_not_packed() -> None:
    assert not worth_packing([torch.zeros(4, 4, dtype=torch.float64)])
    assert not worth_packing([torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bfloat16)])
    assert not worth_packing([torch.zeros(4, 4, device="meta")])


def test_kernels_that_disagree_with_the_plain_product_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
            self.weight = weight_OI

        def __call__(self, x_NI: Tensor) -> Tensor:
            return x_NI @ self.weight.T + 1.0

    monkeypatch.setattr(prepack, "PackedWeight", Wrong)
    assert not can_pack.__wrapped__(torch.float32)
