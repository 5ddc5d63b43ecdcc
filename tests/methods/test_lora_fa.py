"""LoRA-FA: identities of its specification; the optimiser's correction; what is saved for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorica.core.errors import ConfigError
from lorica.engine.host import Host
from lorica.methods.lora import LoRA
from lorica.methods.lora_fa import LoRAFA, corrected
from lorica.models import wrap
from lorica.training.optimizer import AdamWConfig, AdapterOptimizer
from tests.methods.one import SITE, grads, hosted, linear, matrix, same, tensors

W, X, DY = matrix(8, 6), matrix(5, 6, seed=1), matrix(5, 8, seed=2)
A, B, G = matrix(3, 6, seed=3), matrix(8, 3, seed=4), DY.T @ X
PLAIN = AdamWConfig(lr=0.1, clip=None, schedule="constant", warmup=0)


def stepped(host: Host, config: AdamWConfig = PLAIN) -> Tensor:
    """Adam's first moment after one step: a tenth of the gradient that it was given, as one matrix [out, r]."""
    grads(host, X, DY)
    optimizer = AdapterOptimizer(host.adapter("a"), config)
    optimizer.step()
    return 10 * optimizer.tensors()["exp_avg"].view(-1, 3)


def test_it_is_lora_and_a_never_moves() -> None:
    host, lora = hosted(linear(W), LoRAFA(rank=3), A=A, B=B), hosted(linear(W), LoRA(rank=3), A=A, B=B)
    same(host(X), lora(X))
    same(grads(host, X, DY)["B"], grads(lora, X, DY)["B"])
    assert set(grads(host, X, DY)) == {"B"}
    before, moved = tensors(host)["A"].clone(), tensors(host)["B"].clone()
    for _ in range(3):
        stepped(host, AdamWConfig(weight_decay=0.5))
    assert torch.equal(tensors(host)["A"], before) and not torch.equal(tensors(host)["B"], moved)
    assert host.adapter("a").layout.trainable_count() == 3 * 8


@pytest.mark.parametrize("rslora", [False, True])
def test_the_corrected_step_is_the_weights_gradient_projected_on_the_rows_of_a(rslora: bool) -> None:
    method = LoRAFA(rank=3, alpha=5, rslora=rslora, correct=True)
    step, s = stepped(hosted(linear(W), method, A=A, B=B)), method.scaling()
    P_A = A.T @ torch.linalg.solve(A @ A.T, A)
    same(s * step @ A, G @ P_A, 1e-9)
    same((G - s * step @ A) @ A.T, torch.zeros(8, 3, dtype=torch.float64), 1e-9)


def test_without_the_correction_the_step_is_along_bs_own_gradient() -> None:
    same(stepped(hosted(linear(W), LoRAFA(rank=3, alpha=6), A=A, B=B)), 2 * G @ A.T, 1e-9)


def test_at_full_rank_the_corrected_step_is_the_weights_own_gradient() -> None:
    square = matrix(6, 6, seed=5)
    same(2 * corrected(2 * G @ square.T, square, 2.0) @ square, G, 1e-9)


def test_directions_that_a_lacks_are_left_alone_and_not_blown_up() -> None:
    double = torch.cat([A[:1], A[:1], A[2:]]).float()
    g = (G @ double.double().T).float()
    found = corrected(g, double, 1.0)
    P_A = torch.linalg.pinv(double.double()) @ double.double()
    same(found.double() @ double.double(), G @ P_A, 1e-4)


def test_every_site_is_corrected_with_its_own_a_and_scaling_in_whatever_order_they_stand() -> None:
    host = Host(wrap(nn.Sequential(linear(W), linear(matrix(7, 8, seed=6)))))
    targets = {"include": ["0", "1"], "rank_pattern": {"1": 2}, "alpha_pattern": {"1": 9.0}}
    host.add("a", LoRAFA(rank=3, alpha=6, correct=True), targets, dtype=torch.float64)
    host.activate("a")
    adapter = host.adapter("a")
    (host(X) * matrix(5, 7, seed=7)).sum().backward()
    expected = {
        site: corrected(adapter.tensors(site)["B"].grad.clone(), adapter.tensors(site)["A"], scale)  # type: ignore[union-attr]
        for site, scale in (("0", 2.0), ("1", 4.5))
    }
    optimizer = AdapterOptimizer(adapter, PLAIN)
    optimizer.step()
    for site, wanted in expected.items():
        place = adapter.layout.places[site]["B"]
        moment = optimizer.tensors()["exp_avg"][place.offset : place.offset + place.size]
        same(10 * moment.view(place.shape), wanted)


def test_a_convolutions_kernel_counts_as_inputs() -> None:
    kernel = matrix(2, 3, 3, 3, seed=8)
    same(corrected(B[:, :2], kernel, 1.5), corrected(B[:, :2], kernel.flatten(1), 1.5))


@pytest.mark.parametrize(("method", "numbers"), [(LoRAFA(rank=3), 3), (LoRA(rank=3), 3 + 64)], ids=lambda v: str(v)[:8])
def test_r_numbers_a_token_are_saved_and_the_input_is_not(method: LoRA, numbers: int) -> None:
    host = hosted(linear(matrix(8, 64)), method)
    x, held = matrix(5, 64, seed=1).requires_grad_(True), []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = host(x)
    tokens = {t.data_ptr(): t.numel() for t in held if t.shape[-2:-1] == (5,) or t.shape == x.shape}
    assert sum(tokens.values()) == 5 * numbers
    y.sum().backward()
    same(x.grad, host.backbone.weight(SITE).matrix().sum(0).expand(5, 64))  # type: ignore[arg-type]


def test_a_frozen_factor_of_zeros_is_not_offered() -> None:
    with pytest.raises(ConfigError, match="init_factor"):
        LoRAFA(init_factor="b")
    assert "embedding" not in LoRAFA.kinds
