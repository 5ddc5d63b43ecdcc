"""Gain and forgetting are differences to the base, on the examples that were given; asking trains nothing."""

from __future__ import annotations

import pytest
import torch

from lorica.client.local import Service
from lorica.core.errors import DataError, MethodError
from lorica.data.example import Example
from lorica.methods import make_method
from lorica.models import tiny
from lorica.recipes.forgetting import mean_loss, measure_forgetting, task_losses
from lorica.training.optimizer import AdamWConfig

TARGET = [Example.whole([5, 6, 7, 8, 9, 10])]
SOURCE = [Example.whole([20, 3, 41, 17]), Example((9, 30, 31), (0.0, 0.0, 2.0))]


@pytest.fixture(scope="module")
def trained():
    """A service with a low rank, all weights, and a soft prompt: each trained on the target for a few steps."""
    service = Service(tiny("llama"))
    clients = [
        service.training_client(method, name=name, optimizer=AdamWConfig(lr=lr), steps=6)
        for name, method, lr in (
            ("low", make_method("lora", rank=1), 2e-2),
            ("full", make_method("delta"), 2e-3),
            ("prompt", make_method("prompt", tokens=2), 1e-1),
        )
    ]
    for _ in range(6):
        service.forward_backward([(client, TARGET) for client in clients])
        for client in clients:
            client.optim_step()
    return service


def adapters(service):
    return [service.host.adapter(name) for name in ("low", "full", "prompt")]


def test_gain_is_what_the_target_lost_and_forgetting_what_the_source_gained(trained):
    before = trained.host.adapter("full").flat.clone()
    for row in measure_forgetting(trained, adapters(trained), {"t": TARGET}, {"s": SOURCE}):
        adapter = trained.host.adapter(row.adapter)
        ((target,), (source,)) = row.targets, row.sources
        assert (target.data, target.before) == ("t", mean_loss(trained, None, TARGET, "target"))
        assert (source.data, source.after) == ("s", mean_loss(trained, adapter, SOURCE, "source"))
        assert row.gained == target.before - target.after > 0.1
        assert row.forgotten == source.after - source.before == source.change
        assert row.parameters == adapter.layout.trainable_count() and row.method == adapter.method.name
    assert torch.equal(before, trained.host.adapter("full").flat)


def test_every_adapter_is_asked_about_every_set_before_and_after(trained):
    more = {"one": SOURCE[:1], "two": SOURCE[1:]}
    rows = measure_forgetting(trained, adapters(trained), {"t": TARGET, "again": TARGET}, more)
    for row in rows:
        after = task_losses(trained, trained.host.adapter(row.adapter), more)
        before = task_losses(trained, None, more)
        assert [(s.data, s.before, s.after) for s in row.sources] == [(n, before[n], after[n]) for n in ("one", "two")]
        assert row.forgotten == pytest.approx(sum(after[n] - before[n] for n in more) / 2)
        assert row.gained == pytest.approx(row.targets[0].before - row.targets[0].after)
        assert [target["change"] for target in row.to_dict()["targets"]] == [-row.gained] * 2
    for empty in ({"targets": {}, "sources": more}, {"targets": more, "sources": {}}):
        with pytest.raises(DataError, match="at least one set of each kind"):
            measure_forgetting(trained, adapters(trained), **empty)


def test_a_rank_is_counted_where_a_matrix_changes_and_grouped_by_role_and_layer(trained):
    low, full, prompt = measure_forgetting(trained, adapters(trained), {"t": TARGET}, {"s": SOURCE})
    assert {site.count for site in low.components} == {1} and prompt.components == ()
    assert low.by_role().keys() == full.by_role().keys() and low.by_role()["k_proj"] == (1.0, 32)
    assert full.by_layer().keys() == {"0", "1"} and full.by_role()["q_proj"][0] > 1
    mean = sum(site.count for site in full.components if site.role == "up_proj") / 2
    assert full.by_role()["up_proj"] == (mean, 64) and full.to_dict()["gained"] == full.gained
    (wide,) = measure_forgetting(trained, [trained.host.adapter("full")], {"t": TARGET}, {"s": SOURCE}, share=0.99)
    assert wide.by_role()["q_proj"][0] > full.by_role()["q_proj"][0]


def test_a_mean_loss_is_weighted_by_tokens(trained):
    one, two = (mean_loss(trained, None, [example], "x") for example in SOURCE)
    assert mean_loss(trained, None, SOURCE, "x") == pytest.approx((3 * one + 2 * two) / 5, rel=1e-5)


def test_examples_without_a_trained_token_and_wrong_shares_are_refused(trained):
    silent = [Example((1, 2, 3), (0.0, 0.0, 0.0))]
    with pytest.raises(DataError, match="No token of the old has a loss weight"):
        measure_forgetting(trained, adapters(trained), {"t": TARGET}, {"old": silent})
    with pytest.raises(MethodError, match=r"The share is 2\.0"):
        measure_forgetting(trained, adapters(trained), {"t": TARGET}, {"s": SOURCE}, share=2.0)
