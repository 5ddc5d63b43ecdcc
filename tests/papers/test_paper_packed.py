"""What the papers on packed bases measure: bits, errors, shares of a gain, and the entropy of rollouts."""

from __future__ import annotations

import pytest
import torch

from lorica.client.local import Service
from lorica.core.errors import DataError
from lorica.data.example import Example
from lorica.methods.lora import LoRA
from lorica.models import load, tiny
from lorica.papers.kit.noisy import Rollouts, Tenants, entropy, prompt
from lorica.papers.kit.packed import bits, share_of_gain, weight_error
from lorica.papers.kit.table import Table

ROWS = [
    Example((5, 6, 7, 8, 9), (0.0, 0.0, 1.0, 1.0, 1.0), "one"),
    Example((9, 8, 7, 6, 5, 4), (0.0, 0.0, 0.0, 1.0, 1.0, 1.0), "two"),
]


def test_bits_are_those_of_the_format_and_the_error_is_nf4s() -> None:
    full, packed = load("nano", dtype="bfloat16"), load("nano", dtype="bfloat16", quantize="nf4")
    assert bits(full) == 16 and bits(packed) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-4)
    assert 0.085 < weight_error(packed, full) < 0.1  # 0.092 on normal weights
    with pytest.raises(DataError, match="no packed weight"):
        weight_error(full, full)


def test_a_share_of_the_gain_counts_from_the_start_of_the_full_base() -> None:
    rows = [
        {"base": "bf16", "start loss": 5.0, "test loss": 1.0},
        {"base": "nf4", "start loss": 6.0, "test loss": 2.0},
    ]
    table = Table.of([rows, rows], ("base",), ("start loss", "test loss"))
    assert share_of_gain(table, "nf4").values == (0.75, 0.75)
    assert share_of_gain(table, "bf16").values == (1.0, 1.0)


def test_a_prompt_ends_before_the_first_trained_token() -> None:
    assert [prompt(row) for row in ROWS] == [[5, 6], [9, 8, 7]]


def test_entropy_is_that_of_the_distributions_that_tokens_are_drawn_from_whatever_stands_beside_them() -> None:
    service = Service(tiny("llama"))
    rollouts = [([5, 6], [7, 8, 9]), ([9, 8, 7], [6, 5, 4, 3, 2])]
    single = [entropy(service.host, [(None, rollout)]) for rollout in rollouts]
    together = entropy(service.host, [(None, rollout) for rollout in rollouts])
    assert together == pytest.approx((3 * single[0] + 5 * single[1]) / 8, rel=1e-5)
    logits_TV = service.host.model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 1:4]
    assert single[0] == pytest.approx(
        float(torch.distributions.Categorical(logits=logits_TV).entropy().mean()), rel=1e-5
    )


def test_noise_follows_its_schedule_for_each_tenant_and_repeats_by_its_seed() -> None:
    service = Service(tiny("llama"))
    adapters = [service.training_client(LoRA(rank=2), name=name, seed=i).adapter for i, name in enumerate("ab")]
    settings = Rollouts(stages=3, draws=2, prompts=2, tokens=12)
    tenants = Tenants(service, adapters, ROWS, settings, seed=3)
    rows = tenants.followed(0.3, 0.03)
    assert [row["sigma"] for row in rows] == pytest.approx([0.0, 0.3, 0.03])
    gains = [float(row["entropy gain"]) for row in rows]
    assert gains[0] == 0 and abs(gains[1]) > abs(gains[2]) > 0
    assert rows == tenants.followed(0.3, 0.03)
    assert tenants.repeated(5.0)["same seed"] == 1 > float(tenants.repeated(5.0)["other seed"])
    assert set(service.host.adapters) == {"a", "b"}  # no draw is left
