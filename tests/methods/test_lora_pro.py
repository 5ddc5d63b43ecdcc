"""LoRA-Pro: its closed form against golden rationals and least squares, and its steps against full fine-tuning."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.core.errors import ConfigError
from lorica.core.tangent import Choice, Tangent, inverse, tangent
from lorica.engine.host import Host
from lorica.methods.lora import LoRA
from lorica.methods.lora_pro import LoRAPro
from lorica.models.factory import example_inputs
from lorica.training.optimizer import AdamStep, AdapterOptimizer
from tests.methods.one import effective, hosted, linear, matrix, same, tensors
from tests.tiny import tiny

CHOICES: tuple[Choice, ...] = ("sylvester", "symmetric", "zero")
A, B, G = matrix(3, 7, seed=1), matrix(5, 3, seed=2), matrix(5, 7, seed=3)


def solved(
    A: Tensor, B: Tensor, G: Tensor, *, s: float = 2.0, choice: Choice = "sylvester", damping: float = 0.0
) -> tuple[Tangent, Tensor, Tensor]:
    at = tangent(A, B, s, damping)
    return at, *at.solve(s * B.T @ G, s * G @ A.T, choice)


def projectors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A


def projection(A: Tensor, B: Tensor, G: Tensor) -> Tensor:
    P_B, P_A = projectors(A, B)
    return P_B @ G + (torch.eye(len(P_B), dtype=P_B.dtype) - P_B) @ G @ P_A


def fractions(rows: list[list[Any]]) -> Tensor:
    return torch.tensor([[float(Fraction(value)) for value in row] for row in rows], dtype=torch.float64)


def test_the_golden_rationals_of_the_specification() -> None:
    A0 = fractions([[1, 0, 1, 0], [0, 1, 0, 1]])
    B0 = fractions([[1, 0], [0, 1], [1, 1]])
    G0 = torch.arange(12, dtype=torch.float64).view(3, 4)
    at, hA, hB = solved(A0, B0, G0)
    same(2 * B0.T @ G0, fractions([[16, 20, 24, 28], [24, 28, 32, 36]]))
    same(2 * G0 @ A0.T, fractions([[4, 8], [20, 24], [36, 40]]))
    same(hA, fractions([["8/15", "11/15", "6/5", "7/5"], ["6/5", "7/5", "28/15", "31/15"]]))
    same(hB, fractions([["-11/30", "-1/15"], ["29/30", "19/15"], ["21/10", "11/5"]]))
    expected = [
        ["1/3", "4/3", "5/3", "8/3"],
        ["13/3", "16/3", "17/3", "20/3"],
        ["23/3", "26/3", "31/3", "34/3"],
    ]
    g = at.equivalent(hA, hB)
    same(g, fractions(expected))
    same((G0 - g).abs(), torch.full_like(g, 1 / 3))
    assert float((G0 - g).square().sum()) == pytest.approx(4 / 3)
    assert float(g.square().sum()) == pytest.approx(1514 / 3)


def test_the_golden_free_matrix() -> None:
    A0, B0 = fractions([[1, 0, 1, 0], [0, 1, 0, 1]]), fractions([[1, 0], [0, 1], [1, 1]])
    G0 = torch.arange(12, dtype=torch.float64).view(3, 4)
    at = tangent(A0, B0, 2.0, 0.0)
    D = torch.linalg.inv(B0.T @ B0) @ (2 * B0.T @ G0) @ A0.T / 4
    X = at._free(D, torch.linalg.inv(A0 @ A0.T), "sylvester")
    same(X, fractions([["-2/15", "-4/15"], ["-22/15", "-8/5"]]))
    same(B0.T @ B0 @ X + X @ A0 @ A0.T, -D)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("s", [0.3, 2.0, 5.66])
def test_the_equivalent_gradient_is_the_projection_whatever_x_and_s(choice: Choice, s: float) -> None:
    at, hA, hB = solved(A, B, G, s=s, choice=choice)
    g = at.equivalent(hA, hB)
    same(g, projection(A, B, G))
    P_B, P_A = projectors(A, B)
    same(G - g, (torch.eye(5).double() - P_B) @ G @ (torch.eye(7).double() - P_A))


def test_the_residual_is_that_of_a_dense_least_squares_problem() -> None:
    r, o, i, s = 3, 5, 7, 2.0
    columns = []
    for k in range(r * i):
        h = torch.zeros(r * i, dtype=torch.float64)
        h[k] = 1
        columns.append((s * B @ h.view(r, i)).flatten())
    for k in range(o * r):
        h = torch.zeros(o * r, dtype=torch.float64)
        h[k] = 1
        columns.append((s * h.view(o, r) @ A).flatten())
    system = torch.stack(columns, 1)
    assert int(torch.linalg.matrix_rank(system)) == r * (o + i - r)
    best = G.flatten() - system @ (torch.linalg.pinv(system) @ G.flatten())
    at, hA, hB = solved(A, B, G)
    assert float((G - at.equivalent(hA, hB)).norm()) == pytest.approx(float(best.norm()), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), r=st.integers(1, 4), o=st.integers(4, 8), i=st.integers(4, 8))
def test_refactoring_the_product_changes_nothing(seed: int, r: int, o: int, i: int) -> None:
    A0, B0, G0 = matrix(r, i, seed=seed), matrix(o, r, seed=seed + 1), matrix(o, i, seed=seed + 2)
    R = torch.linalg.qr(matrix(r, r, seed=seed + 3))[0] * torch.linspace(0.5, 2, r, dtype=torch.float64)
    found = []
    for left, right in ((B0, A0), (B0 @ R, torch.linalg.inv(R) @ A0)):
        at, hA, hB = solved(right, left, G0)
        found.append(at.equivalent(hA, hB))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


def test_the_free_matrix_solves_its_equation_and_keeps_h_nearest_to_g() -> None:
    s = 2.0
    at, hA, hB = solved(A, B, G, s=s)
    gA, gB = s * B.T @ G, s * G @ A.T

    def distance(shift: Tensor) -> float:
        return float((hA + shift @ A - gA).square().sum() + (hB - B @ shift - gB).square().sum())

    D = torch.linalg.inv(B.T @ B) @ gA @ A.T / s**2
    X = at._free(D, torch.linalg.inv(A @ A.T), "sylvester")
    assert float((B.T @ B @ X + X @ A @ A.T + D).abs().max()) < 1e-12 * float(D.abs().max()) * 100
    best = distance(torch.zeros(3, 3, dtype=torch.float64))
    assert all(distance(1e-2 * matrix(3, 3, seed=k)) > best for k in range(10))


def test_the_symmetric_choice_splits_the_shared_part_evenly() -> None:
    at, hA, hB = solved(A, B, G, choice="symmetric")
    P_B, P_A = projectors(A, B)
    same(at.s_S11 * B @ hA, P_B @ G @ (torch.eye(7).double() - P_A / 2))
    same(at.s_S11 * hB @ A, (torch.eye(5).double() - P_B / 2) @ G @ P_A)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_loss_falls_as_fast_as_the_projected_gradient_is_long(choice: Choice) -> None:
    s = 2.0
    at, hA, hB = solved(A, B, G, s=s, choice=choice)
    g = at.equivalent(hA, hB)
    slope = (s * B.T @ G * hA).sum() + (s * G @ A.T * hB).sum()
    same(slope, (G * g).sum())
    same(slope, g.square().sum())
    assert float(at.overshoot(s * B.T @ G, s * G @ A.T, hA, hB)) == pytest.approx(
        s * float((hB @ hA).norm() / g.norm()), rel=1e-10
    )


@pytest.mark.parametrize("zero", ["B", "A"])
def test_while_one_factor_is_zero_the_projection_is_the_other_ones(zero: str) -> None:
    A0, B0 = (A, torch.zeros_like(B)) if zero == "B" else (torch.zeros_like(A), B)
    at, hA, hB = solved(A0, B0, G, damping=1e-8)
    P_B, P_A = projectors(A, B)
    same(at.equivalent(hA, hB), G @ P_A if zero == "B" else P_B @ G)
    assert not (hA if zero == "B" else hB).any()
    if zero == "B":
        same(hB, (2 * G @ A.T) @ torch.linalg.inv(A @ A.T) / 4)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e-12])
def test_damping_is_relative_so_a_young_b_is_projected_on_as_an_old_one(size: float) -> None:
    """An absolute 1e-8 leaves 5 % of the projector at entries of 1e-6 (512 outputs, rank 8)."""
    B0 = size * matrix(512, 8, seed=5)
    lam, Q = torch.linalg.eigh(B0.T @ B0)
    P_B = B0 @ (Q * inverse(lam, 1e-8)) @ Q.T @ B0.T
    assert float(P_B.trace()) / 8 == pytest.approx(1, abs=1e-7)


def test_a_direction_that_b_lacks_is_left_alone_though_the_gradient_is_rounded() -> None:
    B0 = matrix(64, 3, seed=5).float()
    B0[:, 2] = B0[:, 1] - B0[:, 0]  # rank 2, up to rounding
    A0, G0 = matrix(3, 32, seed=6).float(), matrix(64, 32, seed=7).float()
    at = tangent(A0, B0, 2.0, 1e-8)
    hA, hB = at.solve(2 * B0.T @ G0, 2 * G0 @ A0.T, "sylvester")
    assert float(hA.norm()) < 10 * float(G0.norm())
    wide = [t.double() for t in (A0, B0, G0)]
    P_A = torch.linalg.pinv(wide[0]) @ wide[0]
    P_B = wide[1] @ torch.linalg.pinv(wide[1], rtol=1e-5)
    expected = P_B @ wide[2] + (torch.eye(64).double() - P_B) @ wide[2] @ P_A
    assert float((at.equivalent(hA, hB).double() - expected).norm()) < 1e-4 * float(expected.norm())


def stepped(method: LoRAPro, G: Tensor, A: Tensor, B: Tensor, lr: float, steps: int = 1) -> tuple[Host, list[Tensor]]:
    """A layer whose weight has the gradient G at every step, and W' after each."""
    host = hosted(linear(torch.zeros_like(G)), method, A=A, B=B)
    optimizer, seen = AdapterOptimizer(host.adapter("a")), []
    for _ in range(steps):
        host.adapter("a").zero_grad()
        host(torch.eye(G.shape[1], dtype=G.dtype)).backward(G.T)
        optimizer.step(AdamStep(lr))
        seen.append(effective(host))
    return host, seen


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("fields", [{"alpha": 6.0}, {"alpha": 1.5}, {"alpha": 6.0, "rslora": True}], ids=str)
def test_a_step_moves_the_weight_along_the_projection_whatever_the_scaling(
    optimizer: str, choice: Choice, fields: dict[str, Any]
) -> None:
    """The authors' code has the scaling of rank 8 and alpha 16 written into it."""
    lr = 1e-6
    method = LoRAPro.parse({"rank": 3, "optimizer": optimizer, "x_choice": choice, **fields})
    before = method.scaling() * B @ A
    _, (after,) = stepped(method, G, A, B, lr)
    g = projection(A, B, G)
    direction = g if optimizer == "sgd" else projection(A, B, g / (g.abs() + 1e-8))
    torch.testing.assert_close((before - after) / lr, direction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 15, 28])
def test_blocks_of_any_size_are_one_step(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 rows of 7, one, two, or four at a time."""
    expected = stepped(LoRAPro(rank=3), G, A, B, 0.01, 3)[1]
    monkeypatch.setattr("lorica.methods.lora_pro.BLOCK", block)
    torch.testing.assert_close(stepped(LoRAPro(rank=3), G, A, B, 0.01, 3)[1], expected, rtol=1e-9, atol=1e-12)


def test_the_first_step_of_adam_has_size_one() -> None:
    """The authors' code corrects the bias one step ahead, so its first step has 0.744 of that size."""
    r = 5
    A0, B0 = matrix(r, 7, seed=8), matrix(5, r, seed=9)
    _, (after,) = stepped(LoRAPro(rank=r, alpha=r), G, A0, B0, 1e-7)
    torch.testing.assert_close((B0 @ A0 - after) / 1e-7, G.sign(), rtol=1e-4, atol=1e-4)


def test_at_full_rank_it_follows_full_adamw() -> None:
    A0, B0, lr = matrix(5, 7, seed=8), matrix(5, 5, seed=9), 1e-6
    method = LoRAPro(rank=5, alpha=10)
    weight = torch.nn.Parameter(2 * B0 @ A0)
    full = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0)
    host = hosted(linear(torch.zeros_like(G)), method, A=A0, B=B0)
    optimizer, start = AdapterOptimizer(host.adapter("a")), weight.detach().clone()
    for step in range(5):
        G_t = matrix(5, 7, seed=20 + step)
        host.adapter("a").zero_grad()
        host(torch.eye(7, dtype=torch.float64)).backward(G_t.T)
        optimizer.step(AdamStep(lr))
        weight.grad = G_t
        full.step()
    travel = float((weight - start).detach().abs().max())
    assert travel > 2 * lr
    assert float((effective(host) - weight).detach().abs().max()) < 1e-4 * travel


def test_the_first_step_from_init_a_moves_b_alone() -> None:
    host = hosted(linear(torch.zeros_like(G)), LoRAPro(rank=3, optimizer="sgd"))
    A0 = tensors(host)["A"].detach().clone()
    host(torch.eye(7, dtype=torch.float64)).backward(G.T)
    AdapterOptimizer(host.adapter("a")).step(AdamStep(0.01))
    assert torch.equal(tensors(host)["A"], A0)
    same(effective(host), -0.01 * G @ (torch.linalg.pinv(A0) @ A0), 1e-10)


def test_state_in_the_factors_goes_through_adamw() -> None:
    method = LoRAPro(rank=3, alpha=6, state="factor")
    host, _ = stepped(method, G, A, B, 1e-3)
    _, hA, hB = solved(A, B, G, damping=method.damping)
    same(tensors(host)["A"], A - 1e-3 * hA / (hA.abs() + 1e-8), 1e-9)
    same(tensors(host)["B"], B - 1e-3 * hB / (hB.abs() + 1e-8), 1e-9)
    assert method.plain_steps is False and LoRAPro().plain_steps and LoRAPro(optimizer="sgd").plain_steps


def attached(*methods: LoRA) -> Host:
    host = Host(tiny("llama", dtype=torch.float64))
    for name, method in zip("abc", methods, strict=False):
        host.add(name, method, ["q_proj", "down_proj"], seed=ord(name), dtype=torch.float64)
    return host


def run(host: Host, names: str, steps: int, optimizers: dict[str, AdapterOptimizer] | None = None) -> None:
    given = example_inputs(host.backbone, rows=len(names))
    optimizers = optimizers or {name: AdapterOptimizer(host.adapter(name)) for name in names}
    for _ in range(steps):
        with host.rows(list(names)):
            y = host(**given).logits
        y.square().mean(dim=(1, 2)).sum().backward()
        for name in names:
            optimizers[name].step(AdamStep(1e-3))


METHODS = [LoRAPro(rank=3), LoRAPro(rank=3, optimizer="sgd"), LoRAPro(rank=3, state="factor")]
IDS = ["full", "sgd", "factor"]


def test_in_a_mixed_batch_each_adapter_steps_as_it_does_alone() -> None:
    together = attached(LoRAPro(rank=3), LoRA(rank=4), LoRAPro(rank=2, optimizer="sgd", alpha=5))
    run(together, "abc", 3)
    for name, method in zip(
        "abc", [LoRAPro(rank=3), LoRA(rank=4), LoRAPro(rank=2, optimizer="sgd", alpha=5)], strict=True
    ):
        host = attached(*[method] * 3)
        given = example_inputs(host.backbone, rows=3)
        row = {key: value["abc".index(name) : "abc".index(name) + 1] for key, value in given.items()}
        optimizer = AdapterOptimizer(host.adapter(name))
        for _ in range(3):
            with host.rows([name]):
                y = host(**row).logits
            y.square().mean(dim=(1, 2)).sum().backward()
            optimizer.step(AdamStep(1e-3))
        torch.testing.assert_close(host.adapter(name).flat, together.adapter(name).flat, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_a_resumed_run_is_the_run_that_never_stopped(method: LoRAPro) -> None:
    whole = attached(method)
    run(whole, "a", 5)
    first = attached(method)
    optimizer = AdapterOptimizer(first.adapter("a"))
    run(first, "a", 2, {"a": optimizer})
    second = attached(method)
    second.adapter("a").flat.copy_(first.adapter("a").flat)
    resumed = AdapterOptimizer(second.adapter("a"))
    resumed.load_state_dict(optimizer.state_dict())
    run(second, "a", 3, {"a": resumed})
    assert torch.equal(second.adapter("a").flat, whole.adapter("a").flat)


def state_of(adapter: Adapter, method: LoRAPro) -> dict[str, Tensor]:
    optimizer = AdapterOptimizer(adapter)
    adapter.grad.fill_(1e-3)
    optimizer.step(AdamStep(1e-3))
    return optimizer.tensors()


@pytest.mark.parametrize(("method", "name"), list(zip(METHODS, IDS, strict=True)), ids=IDS)
def test_the_state_is_what_the_variant_says(method: LoRAPro, name: str) -> None:
    adapter = attached(method).adapter("a")
    kept = state_of(adapter, method)
    moments = {key: value for key, value in kept.items() if "exp_avg" in key}
    shapes = {tuple(value.shape) for value in moments.values()}
    if name == "full":
        assert shapes == {site.shape for site in adapter.layout.sites.values()}
    else:
        assert shapes == ({(adapter.layout.size,)} if name == "factor" else set())
    assert float(kept["state/overshoot"]) >= 0


@pytest.mark.parametrize("kind", ["embedding", "conv", "half"])
def test_other_sites_and_dtypes_step_too(kind: str) -> None:
    if kind == "conv":
        layer: torch.nn.Module = torch.nn.Conv2d(4, 6, 3, dtype=torch.float64)
        x: Tensor = matrix(2, 4, 5, 5)
    elif kind == "embedding":
        layer, x = torch.nn.Embedding(11, 5, dtype=torch.float64), torch.tensor([[1, 2, 3]])
    else:
        layer, x = linear(matrix(6, 5)), matrix(4, 5)
    host = hosted(layer, LoRAPro(rank=2))
    if kind == "half":
        host.adapter("a").to(dtype=torch.bfloat16)
    before, optimizer = host(x).detach(), AdapterOptimizer(host.adapter("a"))
    for _ in range(2):
        (host(x) * matrix(*before.shape, seed=4).to(before)).sum().backward()
        optimizer.step(AdamStep(1e-2))
    assert torch.isfinite(host.adapter("a").flat).all()
    assert not torch.equal(host(x), before)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lora_bias": True}, "no bias"),
        ({"lr_ratio": 16}, "one rate"),
        ({"optimizer": "sgd", "state": "factor"}, "keeps no state"),
        ({"x_choice": "best"}, "x_choice"),
        ({"damping": -1}, "damping"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_in_one_sentence(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        LoRAPro(**fields)
    assert "\n" not in str(caught.value)


def test_every_pair_of_choices_is_one_projection() -> None:
    found = [at.equivalent(hA, hB) for at, hA, hB in (solved(A, B, G, choice=c) for c in CHOICES)]
    for one, other in itertools.pairwise(found):
        same(one, other)


def test_a_zero_gradient_leaves_the_factors_as_they_are() -> None:
    host = hosted(linear(matrix(5, 7)), LoRAPro(rank=3), A=A, B=B)
    before = host.adapter("a").flat.clone()
    AdapterOptimizer(host.adapter("a")).step(AdamStep(0.1))
    assert torch.equal(host.adapter("a").flat, before)
