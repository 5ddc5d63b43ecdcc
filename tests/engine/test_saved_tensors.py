"""What the fused linear node keeps for backward: what some wanted gradient reads, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lorica
from lorica.core.update import LinearUpdate, LowRank
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.equation import Dropout, Mask, reference_linear
from lorica.engine.host import Host
from lorica.engine.linear import Base, Part, adapted_linear
from lorica.methods import make_method
from lorica.recipes.compare.costs import Saved

N, I, O, R, WIDE = 12, 64, 48, 4, 12  # noqa: E741
RNG = torch.Generator()


def frozen(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


def trained(*shape: int) -> Tensor:
    return frozen(*shape).requires_grad_(True)


def base(weight_OI: Tensor, bias_O: Tensor | None = None) -> Base:
    return Base(lambda x: F.linear(x, weight_OI, bias_O), lambda dy: dy @ weight_OI, bias_O)


def own(update: LinearUpdate) -> list[Tensor]:
    """Every tensor of an update."""
    factors = [t for f in update.factors for t in (f.A_RI, f.B_OR, f.mid_R, f.post_O)]
    found = [*factors, update.delta, update.in_scale_I, update.out_scale_O, update.bias_O]
    return [t for t in found if t is not None]


def low_rank(A: Tensor, B: Tensor, **vectors: Tensor) -> LinearUpdate:
    return LinearUpdate((LowRank(A, B, 0.5, **vectors),))


CASES: dict[str, tuple[Callable[[], LinearUpdate], int]] = {
    "LoRA: x, and x Aᵀ": (lambda: low_rank(trained(R, I), trained(O, R)), I + R),
    "A alone is trained: x": (lambda: low_rank(trained(R, I), frozen(O, R)), I),
    "LoRA-FA: x Aᵀ": (lambda: low_rank(frozen(R, I), trained(O, R)), R),
    "VeRA: x Aᵀ": (lambda: low_rank(frozen(R, I), frozen(O, R), mid_R=trained(R), post_O=trained(O)), R),
    "VeRA of more than O/4 ranks: x Aᵀ, and u": (
        lambda: low_rank(frozen(WIDE, I), frozen(O, WIDE), mid_R=trained(WIDE), post_O=trained(O)),
        WIDE + O,
    ),
    "VeRA of O/4 ranks: x Aᵀ": (
        lambda: low_rank(frozen(WIDE - 1, I), frozen(O, WIDE - 1), mid_R=trained(WIDE - 1), post_O=trained(O)),
        WIDE - 1,
    ),
    "its post alone is trained: u": (
        lambda: low_rank(frozen(WIDE, I), frozen(O, WIDE), mid_R=frozen(WIDE), post_O=trained(O)),
        O,
    ),
    "its mid alone is trained: x Aᵀ": (
        lambda: low_rank(frozen(WIDE, I), frozen(O, WIDE), mid_R=trained(WIDE), post_O=frozen(O)),
        WIDE,
    ),
    "its B is trained too: x Aᵀ": (
        lambda: low_rank(frozen(WIDE, I), trained(O, WIDE), mid_R=trained(WIDE), post_O=trained(O)),
        WIDE,
    ),
    "VeRA of a rank above the width: x": (
        lambda: low_rank(frozen(I + 1, I), frozen(O, I + 1), mid_R=trained(I + 1)),
        I,
    ),
    "nothing is trained: nothing": (lambda: low_rank(frozen(R, I), frozen(O, R)), 0),
    "a bias: nothing": (lambda: LinearUpdate(bias_O=trained(O)), 0),
    "a frozen out_scale: nothing": (lambda: LinearUpdate(out_scale_O=frozen(O)), 0),
    "IA³ at outputs: u": (lambda: LinearUpdate(out_scale_O=trained(O), scale_bias=True), O),
    "IA³ at inputs: x": (lambda: LinearUpdate(in_scale_I=trained(I)), I),
    "a frozen in_scale: nothing": (lambda: LinearUpdate(in_scale_I=frozen(I)), 0),
    "a difference: x": (lambda: LinearUpdate(delta=trained(O, I)), I),
    "a frozen difference: nothing": (lambda: LinearUpdate(delta=frozen(O, I)), 0),
}
"""An update, and the numbers that it keeps a token."""


@pytest.mark.parametrize("case", CASES)
def test_a_node_keeps_what_its_gradients_read(case: str) -> None:
    RNG.manual_seed(1)
    make, numbers = CASES[case]
    update, x, weight = make(), trained(N, I), frozen(O, I)
    source = x * 1.0
    tensors = own(update)
    with Saved([weight, *tensors]) as saved:
        y = adapted_linear(source, base(weight), [Part(0, N, update)])
    assert saved.bytes == 8 * N * numbers
    expected = reference_linear(source, weight, None, update)
    wanted = [x, *(t for t in tensors if t.requires_grad)]
    dy = frozen(N, O)
    for one, two in zip(
        torch.autograd.grad(y, wanted, dy, retain_graph=True),
        torch.autograd.grad(expected, wanted, dy),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_a_frozen_a_under_dropout_keeps_the_masked_product_alone() -> None:
    RNG.manual_seed(2)
    update, x, weight = low_rank(frozen(R, I), trained(O, R)), trained(N, I), frozen(O, I)
    A, B = update.factors[0].A_RI, update.factors[0].B_OR
    drop = Dropout(0.5, (Mask(7, N, 0, N),))
    with Saved([weight, A, B]) as saved:
        y = adapted_linear(x * 1.0, base(weight), [Part(0, N, update, drop)])
    assert saved.bytes == 8 * N * R
    expected = x @ weight.T + 0.5 * (drop(x) @ A.T) @ B.T
    dy = frozen(N, O)
    for one, two in zip(torch.autograd.grad(y, [x, B], dy), torch.autograd.grad(expected, [x, B], dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_one_tenant_that_trains_a_keeps_x_for_the_batch_and_frozen_ones_do_not() -> None:
    RNG.manual_seed(3)
    weight = frozen(O, I)
    frozen_a = [low_rank(frozen(R, I), trained(O, R)) for _ in range(3)]
    mixed = [*frozen_a[:2], low_rank(trained(R, I), trained(O, R))]
    for updates, numbers in ((frozen_a, R), (mixed, I + R)):
        tensors = [t for update in updates for t in own(update)]
        with Saved([weight, *tensors]) as saved:
            parts = [Part(4 * i, 4 * i + 4, update) for i, update in enumerate(updates)]
            adapted_linear(trained(N, I) * 1.0, base(weight), parts)
        assert saved.bytes == 8 * N * numbers


def test_what_x_is_made_of_is_kept_only_where_somebody_wants_its_gradient() -> None:
    RNG.manual_seed(4)
    weight, update = frozen(O, I), low_rank(frozen(R, I), trained(O, R))
    for kind, numbers in ((frozen, R), (trained, 2 * I + R)):
        gate, up = kind(N, I), kind(N, I)
        with Saved([weight, *own(update)]) as saved:
            y = adapted_linear([gate, up], base(weight), [Part(0, N, update)], make=lambda g, u: F.silu(g) * u)
        assert saved.bytes == 8 * N * numbers
        expected = reference_linear(F.silu(gate) * up, weight, None, update)
        B, dy = update.factors[0].B_OR, frozen(N, O)
        one, two = (torch.autograd.grad(out, B, dy)[0] for out in (y, expected))
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_a_product_that_is_small_beside_what_x_is_made_of_is_kept() -> None:
    RNG.manual_seed(5)
    weight = frozen(O, I)
    for rank, numbers in ((I // 4, 2 * I + I // 4), (I // 4 + 1, 2 * I)):
        update = low_rank(trained(rank, I), trained(O, rank))
        with Saved([weight, *own(update)]) as saved:
            adapted_linear([trained(N, I), trained(N, I)], base(weight), [Part(0, N, update)], make=lambda g, u: g * u)
        assert saved.bytes == 8 * N * numbers


def saved_by(name: str, **settings: Any) -> int:
    """Bytes that a pass over a small model keeps, with one adapter on every linear map."""
    backbone = lorica.load("tiny-llama")
    host = Host(backbone)
    adapter = host.add("a", make_method(name, **settings), "all-linear")
    item = Item(Example.whole(list(range(3, 67))), adapter)
    engine = Engine(host)
    engine.forward_backward([item])
    values = [t for _, _, t in adapter.named_tensors()]
    with Saved([*backbone.module.parameters(), *values, adapter.flat]) as saved:
        engine.forward_backward([item])
    return saved.bytes


def test_a_training_pass_of_lora_fa_keeps_less_than_one_of_lora() -> None:
    backbone = lorica.load("tiny-llama")
    width = next(site.shape[1] for site in backbone.sites.values() if site.name.endswith("q_proj"))
    layers = sum(site.name.endswith("q_proj") for site in backbone.sites.values())
    spared = saved_by("lora", rank=2) - saved_by("lora_fa", rank=2)
    element = torch.finfo(backbone.dtype).bits // 8
    # x of q, k and v, and of gate and up; that of o is what attention itself keeps
    assert spared == 2 * layers * 63 * width * element
