"""LoRA: the identities of its specification."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorica.core.errors import ConfigError, MethodError
from lorica.core.site import Site
from lorica.core.update import LinearUpdate
from lorica.methods import make_method
from lorica.methods.lora import LoRA
from tests.methods.one import SITE, effective, grads, hosted, linear, matrix, same, tensors

SHAPES = [(7, 5), (5, 7), (6, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_at_init_the_gradient_of_a_is_zero_and_that_of_b_is_s_g_a_transposed(
    shape: tuple[int, int], bias: bool
) -> None:
    o, i = shape
    host = hosted(linear(matrix(o, i), matrix(o, seed=9) if bias else None), LoRA(rank=3, alpha=6))
    x, dy = matrix(4, i, seed=1), matrix(4, o, seed=2)
    found = grads(host, x, dy)
    assert not found["A"].any()
    same(found["B"], 2.0 * (dy.T @ x) @ tensors(host)["A"].T)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_off_init_follow_the_chain_rule(shape: tuple[int, int]) -> None:
    o, i = shape
    A, B = matrix(2, i, seed=3), matrix(o, 2, seed=4)
    host = hosted(linear(matrix(o, i)), LoRA(rank=2, alpha=3), A=A, B=B)
    x, dy = matrix(4, i, seed=1), matrix(4, o, seed=2)
    found, G = grads(host, x, dy), dy.T @ x
    same(found["A"], 1.5 * B.T @ G)
    same(found["B"], 1.5 * G @ A.T)


def test_the_update_has_at_most_rank_r_and_does_not_change_under_refactoring() -> None:
    A, B, R = matrix(3, 9, seed=3), matrix(8, 3, seed=4), matrix(3, 3, seed=5)
    W = matrix(8, 9)
    host = hosted(linear(W), LoRA(rank=3), A=A, B=B)
    assert torch.linalg.matrix_rank(effective(host) - W) == 3
    x = matrix(4, 9, seed=1)
    other = hosted(linear(W), LoRA(rank=3), A=torch.linalg.solve(R, A), B=B @ R)
    same(host(x), other(x), 1e-10)


def test_rslora_with_alpha_is_lora_with_alpha_times_root_rank() -> None:
    A, B, W, x = matrix(4, 9, seed=3), matrix(8, 4, seed=4), matrix(8, 9), matrix(5, 9, seed=1)
    one = hosted(linear(W), LoRA(rank=4, alpha=3, rslora=True), A=A, B=B)
    two = hosted(linear(W), LoRA(rank=4, alpha=3 * math.sqrt(4)), A=A, B=B)
    same(one(x), two(x))
    assert LoRA(rank=16, alpha=8, rslora=True).scaling() == 2.0


def test_with_an_identity_for_a_one_step_on_b_is_the_step_of_the_full_weight() -> None:
    W, x, dy = matrix(8, 5), matrix(6, 5, seed=1), matrix(6, 8, seed=2)
    host = hosted(linear(W), LoRA(rank=5, alpha=5), A=torch.eye(5), B=torch.zeros(8, 5))
    step = grads(host, x, dy)["B"]
    host.adapter("a").set(SITE, "B", -0.1 * step)
    same(effective(host), W - 0.1 * dy.T @ x)


def test_an_embedding_is_the_linear_map_of_one_hot_tokens() -> None:
    table, A, B = matrix(11, 6), matrix(3, 11, seed=3), matrix(6, 3, seed=4)
    layer = nn.Embedding(11, 6, dtype=torch.float64)
    layer.weight.data.copy_(table)
    embedding = hosted(layer, LoRA(rank=3, alpha=2), A=A, B=B)
    dense = hosted(linear(table.T), LoRA(rank=3, alpha=2), A=A, B=B)
    ids = torch.tensor([[0, 3, 3], [10, 1, 0]])
    hot = F.one_hot(ids, 11).double()
    same(embedding(ids), dense(hot))
    dy = matrix(2, 3, 6, seed=5)
    found, expected = grads(embedding, ids, dy), grads(dense, hot, dy)
    same(found["A"], expected["A"])
    same(found["B"], expected["B"])


def test_an_embeddings_token_side_starts_at_zero_and_padding_gets_no_gradient() -> None:
    layer = nn.Embedding(11, 6, padding_idx=0, dtype=torch.float64)
    host = hosted(layer, LoRA(rank=3))
    assert not tensors(host)["A"].any() and tensors(host)["B"].any()
    found = grads(host, torch.tensor([0, 0, 4]), matrix(3, 6))["A"]
    assert not found[:, 0].any() and found[:, 4].any()


CONVS = [
    (kind, stride, padding, dilation, mode, groups)
    for kind, mode, stride, padding, dilation, groups in itertools.product(
        (nn.Conv1d, nn.Conv2d), ("zeros", "reflect", "circular"), (1, 2), (0, 2), (1, 2), (1, 2)
    )
] + [(nn.Conv3d, 1, 1, 1, "zeros", 1), (nn.Conv1d, 1, "same", 1, "zeros", 1)]


@pytest.mark.parametrize(("kind", "stride", "padding", "dilation", "mode", "groups"), CONVS)
def test_a_convolution_equals_the_convolution_with_w_plus_delta(
    kind: type[nn.Conv2d], stride: int, padding: int | str, dilation: int, mode: str, groups: int
) -> None:
    conv = kind(4, 6, 3, stride, padding, dilation, groups, True, mode, dtype=torch.float64)  # type: ignore[arg-type]
    axes = conv.weight.ndim - 2
    A = matrix(2, 4 // groups, *[3] * axes, seed=3)
    host = hosted(conv, LoRA(rank=2, alpha=3), A=A, B=matrix(6, 2, seed=4))
    x = matrix(2, 4, *[7] * axes, seed=1)
    y = host(x)
    with host.disabled():
        merged = conv._conv_forward(x, effective(host), conv.bias)
    same(y, merged)
    delta = 1.5 * torch.einsum("or,rc...->oc...", matrix(6, 2, seed=4), A)
    same(effective(host), conv.weight + delta)


def test_a_convolution_takes_input_without_a_batch_axis_as_torch_does() -> None:
    conv = nn.Conv1d(4, 6, 3, dtype=torch.float64)
    host = hosted(conv, LoRA(rank=2), A=matrix(2, 4, 3, seed=3), B=matrix(6, 2, seed=4))
    x = matrix(4, 9, seed=1)
    same(host(x), host(x[None])[0])


def test_lora_bias_adds_s_times_its_bias() -> None:
    W, x, b = matrix(8, 5), matrix(6, 5, seed=1), matrix(8, seed=6)
    host = hosted(linear(W), LoRA(rank=2, alpha=6, lora_bias=True), bias=b)
    same(host(x), x @ W.T + 3.0 * b)
    same(grads(host, x, matrix(6, 8, seed=2))["bias"], 3.0 * matrix(6, 8, seed=2).sum(0))


@pytest.mark.parametrize(
    ("fields", "factor", "variance"),
    [
        ({}, "A", 1 / (3 * 400)),
        ({"init_dist": "normal"}, "A", 1 / 400),
        ({"init_dist": "gaussian"}, "A", 1 / 16**2),
        ({"init_factor": "b"}, "B", 1 / (3 * 16)),
        ({"init_factor": "b", "init_dist": "normal"}, "B", 1 / 16),
    ],
    ids=lambda v: "-".join(map(str, v.values())) or "default" if isinstance(v, dict) else "",
)
def test_the_random_factor_has_the_declared_variance(fields: dict[str, str], factor: str, variance: float) -> None:
    host = hosted(linear(matrix(500, 400)), LoRA(rank=16, **fields))
    values = tensors(host)[factor].detach()
    assert float(values.var()) == pytest.approx(variance, rel=0.06)
    assert float(values.mean()) == pytest.approx(0.0, abs=4 * math.sqrt(variance / values.numel()))
    assert not tensors(host)["B" if factor == "A" else "A"].any()


@pytest.mark.parametrize(("factor", "moves", "stays"), [("a", "B", "A"), ("b", "A", "B")])
def test_the_first_adam_step_moves_the_zero_factor_by_the_learning_rate_and_the_other_not_at_all(
    factor: str, moves: str, stays: str
) -> None:
    host = hosted(linear(matrix(8, 5)), LoRA(rank=3, init_factor=factor))
    before = {name: t.detach().clone() for name, t in tensors(host).items()}
    optimizer = torch.optim.AdamW(host.adapter("a").optimizer_groups(), lr=1e-3, weight_decay=0.0, eps=1e-12)
    grads(host, matrix(6, 5, seed=1), matrix(6, 8, seed=2))
    optimizer.step()
    after = tensors(host)
    assert torch.equal(after[stays], before[stays])
    same((after[moves] - before[moves]).abs(), torch.full_like(before[moves], 1e-3), 1e-8)


@pytest.mark.parametrize("name", ["lora", "dora", "pissa"])
def test_a_rank_above_the_layers_is_refused_with_the_largest_that_fits(name: str) -> None:
    with pytest.raises(MethodError, match=r"Rank 6 is larger than site 'fc' \(8×5\) allows; choose at most 5"):
        hosted(linear(matrix(8, 5)), make_method(name, rank=6))
    hosted(linear(matrix(8, 5)), make_method(name, rank=5))


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match="rank"):
        LoRA(rank=rank)


def test_lora_bias_is_refused_at_an_embedding() -> None:
    with pytest.raises(MethodError, match="embedding has no bias"):
        hosted(nn.Embedding(9, 4), LoRA(rank=2, lora_bias=True))


def test_the_lowering_is_a_plain_low_rank_update() -> None:
    host = hosted(linear(matrix(8, 5)), LoRA(rank=2))
    update = host.adapter("a").update(SITE, host.backbone.weight(SITE))
    assert isinstance(update, LinearUpdate) and update.low_rank_only


def _largest_rate(n: int, factor: str) -> float:
    """The largest learning rate at which six Adam steps on one layer of width n leave outputs of size one."""
    rng = torch.Generator().manual_seed(0)
    z, target = torch.randn(n, generator=rng), 3 * torch.randn(n, generator=rng)
    method = make_method("lora", rank=4, alpha=4, init_factor=factor, init_dist="normal")
    site = Site(SITE, "linear", (n, n))
    low, high = 1e-6, 1.0
    for _ in range(14):
        rate = math.sqrt(low * high)
        start = method.init(site, None, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
        zero = {name: torch.zeros(spec.shape) for name, spec in method.params(site).items()}
        A, B = (tensor.requires_grad_(True) for tensor in (zero | start).values())
        optimizer = torch.optim.Adam([A, B], lr=rate)
        for _ in range(6):
            optimizer.zero_grad()
            (0.5 * (B @ (A @ z) - target).square().sum()).backward()
            optimizer.step()
        size = float((B @ (A @ z)).detach().square().mean().sqrt())
        low, high = (rate, high) if size < 1 else (low, rate)
    return low


@pytest.mark.parametrize(("factor", "window"), [("a", (-0.6, -0.4)), ("b", (-1.25, -0.85))])
def test_the_largest_stable_rate_falls_with_width_as_the_init_papers_exponents_say(
    factor: str, window: tuple[float, float]
) -> None:
    slope = math.log(_largest_rate(16384, factor) / _largest_rate(1024, factor)) / math.log(16)
    assert window[0] <= slope <= window[1]
