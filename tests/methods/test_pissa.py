"""PiSSA by counter-term: identities of its specification."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorica.methods.lora import LoRA
from lorica.methods.pissa import PiSSA
from tests.methods.one import SITE, effective, grads, hosted, linear, matrix, same, tensors

W, X, DY = matrix(8, 6), matrix(5, 6, seed=1), matrix(5, 8, seed=2)
SIGMA = torch.linalg.svdvals(W)


@pytest.mark.parametrize("fields", [{}, {"alpha": 9.0}, {"rslora": True}], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_factors_are_balanced_and_hold_the_leading_singular_values(rank: int, fields: dict[str, float]) -> None:
    method = PiSSA(rank=rank, **fields)
    own, s = tensors(hosted(linear(W), method)), method.scaling()
    A, B = own["A"], own["B"]
    same(B.T @ B, torch.diag(SIGMA[:rank] / s), 1e-10)
    same(A @ A.T, torch.diag(SIGMA[:rank] / s), 1e-10)
    residual = W - s * B @ A
    same(residual.square().sum(), SIGMA[rank:].square().sum(), 1e-10)
    largest = SIGMA[rank] if rank < 6 else torch.zeros((), dtype=torch.float64)
    same(torch.linalg.matrix_norm(residual, 2), largest, 1e-10)


@pytest.mark.parametrize("alpha", [1.0, 8.0, 64.0])
def test_the_initial_function_is_the_base_bit_for_bit_whatever_alpha(alpha: float) -> None:
    assert torch.equal(hosted(linear(W), PiSSA(rank=3, alpha=alpha))(X), torch.nn.functional.linear(X, W))


def test_both_factors_have_a_gradient_at_step_0() -> None:
    method = PiSSA(rank=3)
    host = hosted(linear(W), method)
    own, found, G = tensors(host), grads(host, X, DY), DY.T @ X
    same(found["A"], method.scaling() * own["B"].T @ G)
    same(found["B"], method.scaling() * G @ own["A"].T)


def test_moved_it_is_a_plain_lora_of_twice_the_rank() -> None:
    method = PiSSA(rank=2, alpha=3)
    A, B = matrix(2, 6, seed=3), matrix(8, 2, seed=4)
    host = hosted(linear(W), method, A=A, B=B)
    A0, B0 = tensors(host)["A0"], tensors(host)["B0"]
    lora = hosted(linear(W), LoRA(rank=4, alpha=6), A=torch.cat([A, A0]), B=torch.cat([B, -B0], dim=1))
    same(host(X), lora(X))


def test_disabled_it_is_the_unsplit_base_bit_for_bit() -> None:
    host = hosted(linear(W), PiSSA(rank=3), A=matrix(3, 6, seed=3))
    with host.disabled():
        assert torch.equal(host(X), torch.nn.functional.linear(X, W))


def test_nothing_decays_because_zero_is_the_base_without_its_leading_directions() -> None:
    host = hosted(linear(W), PiSSA(rank=3))
    assert not any(group.decay for group in host.adapter("a").layout.groups)
    U, S, V = torch.linalg.svd(W)
    host.adapter("a").flat.zero_()
    same(effective(host), (U[:, 3:6] * S[3:]) @ V[3:], 1e-10)


def test_the_fast_decomposition_is_near_the_exact_one_and_repeatable() -> None:
    big = matrix(60, 40) @ torch.diag(0.8 ** torch.arange(40, dtype=torch.float64)) @ matrix(40, 40, seed=7)
    exact, fast, again = (hosted(linear(big), PiSSA(rank=4, svd=svd)) for svd in ("exact", "lowrank", "lowrank"))
    products = [tensors(h)["B"] @ tensors(h)["A"] for h in (exact, fast)]
    assert (products[0] - products[1]).norm() < 1e-3 * products[0].norm()
    assert torch.equal(tensors(fast)["A"], tensors(again)["A"])
    same(fast(matrix(3, 40)), exact(matrix(3, 40)), 1e-9)


def test_a_convolution_is_decomposed_over_its_flattened_kernel() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64)
    host = hosted(conv, PiSSA(rank=3))
    x = matrix(2, 4, 5, 5, seed=1)
    y = host(x)
    with host.disabled():
        same(y, host(x), 1e-12)
    own = tensors(host)
    sigma = torch.linalg.svdvals(conv.weight.detach().flatten(1))
    delta = PiSSA(rank=3).scaling() * torch.einsum("or,rchw->ochw", own["B"], own["A"])
    same((conv.weight - delta).square().sum(), sigma[3:].square().sum(), 1e-10)


def test_a_small_change_survives_factors_that_are_rounded_to_half_precision() -> None:
    """Differences are taken before rounding: `[B, −B₀] [A; A₀]`, each rounded, would lose a change of 2⁻¹⁰ wholly."""
    method = PiSSA(rank=3)
    host = hosted(linear(W), method)
    own = {name: t.detach().clone() for name, t in tensors(host).items()}
    for name in "AB":
        host.adapter("a").set(SITE, name, own[name] * (1 + 2**-10 * matrix(*own[name].shape, seed=9).sign()))
    update = host.adapter("a").update(SITE, host.backbone.weight(SITE))
    exact = effective(host) - W
    terms = [(f.scale, f.A_RI, f.B_OR) for f in update.factors]  # type: ignore[union-attr]
    rounded = sum(s * B.bfloat16().double() @ A.bfloat16().double() for s, A, B in terms)
    assert (rounded - exact).norm() < 0.01 * exact.norm()
    s, now = method.scaling(), tensors(host)
    naive = s * (now["B"].bfloat16().double() @ now["A"].bfloat16().double())
    naive = naive - s * (own["B"].bfloat16().double() @ own["A"].bfloat16().double())
    assert (naive - exact).norm() > 0.5 * exact.norm()


def test_counter_terms_are_frozen() -> None:
    specs = hosted(linear(W), PiSSA(rank=3)).adapter("a").layout.specs[SITE]
    assert {name for name, spec in specs.items() if not spec.trainable} == {"A0", "B0"}
