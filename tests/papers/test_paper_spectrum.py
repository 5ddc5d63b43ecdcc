"""What a change does to the singular directions of a weight, and how far results lie apart over learning rates."""

from __future__ import annotations

import math

import pytest
import torch

from lorica.core.errors import ConfigError
from lorica.methods import make_method
from lorica.papers.kit.arena import Entry, race
from lorica.papers.kit.digits import digits_arena
from lorica.papers.kit.spectrum import Principal, changes, evenness
from lorica.papers.lora_fa import LoRAFAPaper
from lorica.papers.singlora import spreads


@pytest.fixture
def arena():
    return digits_arena(width=24, depth=2, seed=0, batch_size=16, train=100, pretrain_steps=20, norms=True)


def trained(arena, steps, *methods):
    entries = [Entry({"method": m.name}, m, targets="all-norm" if m.name == "norm" else None) for m in methods]
    race(arena, entries, steps=steps, seed=0, say=lambda text: None, parts=())
    return arena.adapters


@pytest.mark.parametrize("name", ["lora", "pissa", "milora", "delta"])
def test_a_change_is_zero_before_training_and_what_the_adapter_adds_to_the_weight_afterwards(arena, name):
    method = make_method(name)
    arena.enter([Entry({}, method)], 5, 0)
    assert all(float(delta.abs().max()) == 0 for _, _, delta in changes(arena.host, *arena.adapters))
    (adapter,) = trained(arena, 5, method)
    found = {site: W + delta for site, W, delta in changes(arena.host, adapter)}
    model, x = arena.host.model, torch.randn(7, 64)
    h = x
    with torch.no_grad():
        for i, (layer, norm) in enumerate(zip(model.layers, model.norms, strict=True)):
            h = torch.relu(norm(h @ found[f"layers.{i}"].float().T + layer.bias))
        assert torch.allclose(arena.outputs(x)[0], model.head(h), atol=1e-4)
        assert not torch.allclose(model(x), model.head(h), atol=1e-2)


def test_norm_tuning_changes_no_linear_weight(arena):
    (adapter,) = trained(arena, 2, make_method("norm"))
    assert list(changes(arena.host, adapter)) == [] and len(adapter.layout.sites) == 2


def test_the_effective_rank_of_equal_singular_values_is_their_number():
    Q = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0]
    for k in (1, 4):
        rank, largest = evenness(3.0 * Q[:, :k] @ Q[:k])
        assert rank == pytest.approx(k) and largest == pytest.approx(1 / k)
    uneven = torch.diag(torch.tensor([8.0, 1.0, 1.0], dtype=torch.float64))
    assert 1 < evenness(uneven)[0] < 3 and evenness(uneven)[1] == pytest.approx(0.8)
    assert math.isnan(evenness(torch.zeros(3, 3))[1])


def test_shares_tell_principal_from_minor_and_from_half_and_half():
    torch.manual_seed(0)
    W = torch.randn(12, 8, dtype=torch.float64)
    U, _, V = torch.linalg.svd(W, full_matrices=False)
    leading, minor = Principal(2), lambda i, j: torch.outer(U[:, i], V[j])
    inside, touching, chance = leading.shares(("a", W, minor(0, 1)))
    assert (inside, touching) == pytest.approx((1, 1)) and chance == pytest.approx(1 - (10 / 12) * (6 / 8))
    assert leading.shares(("a", W, minor(5, 6)))[:2] == pytest.approx((0, 0), abs=1e-12)
    assert leading.shares(("a", W, minor(0, 6)))[:2] == pytest.approx((0, 1), abs=1e-12)
    assert leading.shares(("a", W, minor(0, 1) + minor(5, 6)))[:2] == pytest.approx((0.5, 0.5))
    many = [leading.shares(("a", W, torch.randn(12, 8, dtype=torch.float64)))[1] for _ in range(300)]
    assert sum(many) / 300 == pytest.approx(chance, abs=0.02)
    assert math.isnan(leading.shares(("a", W, torch.zeros_like(W)))[0])


def test_the_norms_of_the_last_step_are_those_of_each_adapters_gradient(arena):
    trained(arena, 1, make_method("lora", rank=4), make_method("lora", rank=4, alpha=32.0))
    small, large = arena.norms
    assert large == pytest.approx(2 * small, rel=1e-4)  # B = 0: the gradient of B is proportional to alpha


def test_a_spread_counts_rates_near_the_best_and_what_diverged_as_the_worst():
    losses = {0.01: 0.5, 0.02: 0.3, 0.04: 0.4, 0.08: 0.9, 0.16: math.nan}
    right = {0.01: 0.8, 0.02: 0.9, 0.04: 0.85, 0.08: 0.6, 0.16: math.nan}
    rows = [
        {"method": "m", "rank": 1, "parameters": 3, "lr": lr, "validation loss": losses[lr], "test accuracy": right[lr]}
        for lr in losses
    ]
    found = spreads(rows)
    assert found["best rate"] == 0.02 and found["best"] == 0.9
    assert [found[f"spread, {k}"] for k in (2, 4, 8)] == pytest.approx([0.1, 0.3, 0.9])
    assert found["spread"] == pytest.approx(1.3 / 3)


def test_bytes_are_counted_on_language_models_alone():
    paper = LoRAFAPaper()
    with pytest.raises(ConfigError, match="cannot be 'digits'"):
        settings = paper.reduced.replace(task="digits", steps=1, width=16, train_rows=50, exact=0)
        paper.run(settings, 0, lambda text: None)
