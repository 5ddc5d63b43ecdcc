"""Dense deltas: the step of the full weight, and slices of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorica.core.errors import ConfigError, MethodError
from lorica.methods.delta import Delta
from tests.methods.one import SITE, effective, grads, hosted, linear, matrix, same

W, X, DY = matrix(8, 5), matrix(6, 5, seed=1), matrix(6, 8, seed=2)
G = DY.T @ X


def test_its_gradient_is_that_of_the_weight_and_its_adam_step_is_full_fine_tuning() -> None:
    host = hosted(linear(W), Delta())
    same(grads(host, X, DY)["delta"], G)
    full = W.clone().requires_grad_(True)
    full.grad = G.clone()
    torch.optim.AdamW([full], lr=1e-2, weight_decay=0.0).step()
    torch.optim.AdamW(host.adapter("a").optimizer_groups(), lr=1e-2, weight_decay=0.0).step()
    same(effective(host), full)


def test_a_slice_is_trained_and_the_rest_is_the_base_bit_for_bit() -> None:
    host = hosted(linear(W), Delta(rows=(2, 5), columns=(1, 4)), delta=matrix(3, 3, seed=3))
    same(grads(host, X, DY)["delta"], G[2:5, 1:4])
    changed = effective(host)
    assert torch.equal(changed[:2], W[:2]) and torch.equal(changed[5:], W[5:])
    assert torch.equal(changed[:, :1], W[:, :1]) and torch.equal(changed[:, 4:], W[:, 4:])
    same(changed[2:5, 1:4], W[2:5, 1:4] + matrix(3, 3, seed=3))
    same(host(X), X @ changed.T)


def test_at_an_embedding_columns_are_tokens() -> None:
    layer = nn.Embedding(9, 4, dtype=torch.float64)
    host = hosted(layer, Delta(columns=(2, 4)), delta=matrix(4, 2, seed=3))
    ids = torch.arange(9)
    y = host(ids)
    with host.disabled():
        base = host(ids)
    same(y - base, F.pad(matrix(4, 2, seed=3).T, (0, 0, 2, 5)))


def test_at_a_convolution_the_kernel_is_whole() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dtype=torch.float64)
    host = hosted(conv, Delta(rows=(1, 3)), delta=matrix(2, 4, 3, 3, seed=3))
    x = matrix(2, 4, 7, 7, seed=1)
    y, changed = host(x), effective(host)
    with host.disabled():
        same(y, conv._conv_forward(x, changed, conv.bias))


def test_with_its_bias_the_whole_layer_is_trained_and_a_slice_has_the_bias_of_its_rows() -> None:
    b0, db = matrix(8, seed=6), matrix(3, seed=7)
    host = hosted(linear(W, b0), Delta(rows=(2, 5), bias=True), bias=db)
    same(host(X), X @ W.T + b0 + F.pad(db, (2, 3)))
    same(grads(host, X, DY)["bias"], DY.sum(0)[2:5])
    specs = host.adapter("a").layout.specs[SITE]
    assert specs["delta"].decay and not specs["bias"].decay
    without = hosted(linear(W), Delta(bias=True))
    assert set(without.adapter("a").layout.specs[SITE]) == {"delta"}


@pytest.mark.parametrize(
    ("layer", "fields", "words"),
    [
        (nn.Linear(5, 8), {"rows": (0, 9)}, r"rows \[0, 9\) do not fit site 'fc', which has 8"),
        (nn.Linear(5, 8), {"columns": (3, 3)}, r"columns \[3, 3\) do not fit"),
        (nn.Linear(5, 8), {"rows": (-1, 2)}, "do not fit"),
        (nn.LayerNorm(5), {"columns": (0, 2)}, "norm and has no columns"),
    ],
)
def test_a_slice_that_does_not_fit_is_refused(layer: nn.Module, fields: dict[str, tuple[int, int]], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        hosted(layer, Delta(**fields))


def test_a_span_of_three_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="rows"):
        Delta(rows=(1, 2, 3))


def test_a_norm_may_train_some_features() -> None:
    host = hosted(nn.LayerNorm(5, dtype=torch.float64), Delta(rows=(1, 3)), delta=matrix(2, seed=3))
    assert host.adapter("a").layout.specs[SITE]["delta"].shape == (2,)
    x = matrix(4, 5)
    y = host(x)
    with host.disabled():
        base = host(x)
    assert torch.equal(y[:, [0, 3, 4]], base[:, [0, 3, 4]])
    assert not torch.equal(y[:, 1:3], base[:, 1:3])
