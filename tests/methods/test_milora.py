"""MiLoRA by counter-term, and MiLoRA++: identities of their specification."""

from __future__ import annotations

import pytest
import torch

from lorica.adapters.peft_format import encode
from lorica.core.errors import ConfigError
from lorica.methods.lora import LoRA
from lorica.methods.milora import MiLoRA
from lorica.methods.pissa import PiSSA
from tests.methods.one import SITE, effective, grads, hosted, linear, matrix, same, tensors

W, X, DY = matrix(8, 6), matrix(5, 6, seed=1), matrix(5, 8, seed=2)
U, SIGMA, V = torch.linalg.svd(W, full_matrices=False)


@pytest.mark.parametrize("fields", [{}, {"alpha": 9.0}, {"rslora": True}], ids=str)
@pytest.mark.parametrize("weight", [W, W.T.contiguous()], ids=["tall", "wide"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_factors_are_balanced_and_hold_the_smallest_singular_values(
    rank: int, weight: torch.Tensor, fields: dict[str, float]
) -> None:
    method = MiLoRA(rank=rank, **fields)
    own, s = tensors(hosted(linear(weight), method)), method.scaling()
    A, B = own["A"], own["B"]
    same(B.T @ B, torch.diag(SIGMA[-rank:] / s), 1e-10)
    same(A @ A.T, torch.diag(SIGMA[-rank:] / s), 1e-10)
    same((s * B @ A).square().sum(), SIGMA[-rank:].square().sum(), 1e-10)
    residual = weight - s * B @ A
    same(residual.square().sum(), SIGMA[:-rank].square().sum(), 1e-10)  # nothing is left at full rank


def test_with_pissa_it_shares_the_weight_out() -> None:
    low, high = hosted(linear(W), MiLoRA(rank=4, alpha=4)), hosted(linear(W), PiSSA(rank=2, alpha=2))
    same(sum((tensors(h)["B"] @ tensors(h)["A"] for h in (low, high)), torch.zeros_like(W)), W, 1e-10)


@pytest.mark.parametrize("alpha", [1.0, 64.0])
def test_the_initial_function_is_the_base_bit_for_bit_whatever_alpha(alpha: float) -> None:
    host = hosted(linear(W), MiLoRA(rank=3, alpha=alpha))
    y = host(X)
    with host.disabled():
        assert torch.equal(host(X), y)


def test_both_factors_have_a_gradient_at_step_0() -> None:
    method = MiLoRA(rank=3)
    host = hosted(linear(W), method)
    own, found, G = tensors(host), grads(host, X, DY), DY.T @ X
    same(found["A"], method.scaling() * own["B"].T @ G)
    same(found["B"], method.scaling() * G @ own["A"].T)


@pytest.mark.parametrize("rslora", [False, True])
def test_moved_it_is_the_plain_lora_of_twice_the_rank_that_peft_gets(rslora: bool) -> None:
    host = hosted(linear(W), MiLoRA(rank=2, alpha=3, rslora=rslora), A=matrix(2, 6, seed=3), B=matrix(8, 2, seed=4))
    stored, config = encode(host.adapter("a"), host.backbone)
    assert config["peft_type"] == "LORA" and config["r"] == 4
    assert config["lora_alpha"] == pytest.approx(3 * (2**0.5 if rslora else 2))
    A, B = (stored[f"base_model.model.{SITE}.lora_{f}.weight"] for f in "AB")
    lora = hosted(linear(W), LoRA(rank=4, alpha=config["lora_alpha"], rslora=rslora), A=A, B=B)
    same(host(X), lora(X))


def test_nothing_decays_because_zero_is_the_base_without_its_minor_directions() -> None:
    host = hosted(linear(W), MiLoRA(rank=3))
    assert not any(group.decay for group in host.adapter("a").layout.groups)
    host.adapter("a").flat.zero_()
    same(effective(host), (U[:, :3] * SIGMA[:3]) @ V[:3], 1e-10)


def test_an_iteration_that_finds_large_directions_only_is_not_offered() -> None:
    with pytest.raises(ConfigError, match="no setting 'svd'"):
        MiLoRA(svd="lowrank")


# -- MiLoRA++ ----------------------------------------------------------------------------------------------------------


def test_the_subspace_start_has_unit_rows_in_the_minor_subspace_and_a_b_of_zero() -> None:
    host = hosted(linear(W), MiLoRA(rank=2, start="subspace"))
    own = tensors(host)
    assert own.keys() == {"A", "B"}
    same(own["A"] @ own["A"].T, torch.eye(2, dtype=torch.float64), 1e-10)
    same(own["A"] @ V[:4].T, torch.zeros(2, 4, dtype=torch.float64), 1e-10)
    assert not own["B"].any()


def test_the_subspace_start_is_a_lora_that_decays_to_the_base_and_has_half_the_rank_in_peft() -> None:
    method = MiLoRA(rank=2, alpha=3, start="subspace")
    host = hosted(linear(W), method, B=matrix(8, 2, seed=4))
    own = tensors(host)
    lora = hosted(linear(W), LoRA(rank=2, alpha=3), A=own["A"], B=own["B"])
    same(host(X), lora(X))
    same(grads(host, X, DY)["A"], grads(lora, X, DY)["A"])
    assert all(group.decay for group in host.adapter("a").layout.groups)
    assert encode(host.adapter("a"), host.backbone)[1]["r"] == 2
    host.adapter("a").flat.zero_()
    assert torch.equal(effective(host), W)
