"""Learning LoRA-Soups' weights: only they move, the loss falls, and the result is a plain adapter."""

from __future__ import annotations

import math

import pytest
import torch

from lorica.adapters.lineage import Data, Lineage
from lorica.client.local import Service
from lorica.core.errors import ConfigError, DataError, MethodError
from lorica.data.example import Example
from lorica.methods import make_method
from lorica.recipes.compose import SoupsConfig, learn_soup, loss_on
from lorica.training.optimizer import AdamWConfig
from tests.tiny import tiny

TASKS = {
    "up": [Example.whole([5, 6, 7, 8, 9, 10]), Example.whole([7, 8, 9, 10, 11])],
    "down": [Example.whole([40, 39, 38, 37, 36]), Example.whole([44, 43, 42, 41, 40])],
}


@pytest.fixture
def service():
    """Two adapters of other ranks, each trained on one of two tasks."""
    service = Service(tiny("llama"))
    clients = {
        name: service.training_client(
            make_method("lora", rank=rank), name=name, optimizer=AdamWConfig(lr=2e-2), steps=20, seed=rank
        )
        for name, rank in (("up", 2), ("down", 3))
    }
    for _ in range(20):
        service.forward_backward([(client, TASKS[name]) for name, client in clients.items()])
        for client in clients.values():
            client.optim_step()
    return service


def learn(service, examples, **changes):
    adapters = [service.host.adapter(name) for name in ("up", "down")]
    test = changes.pop("test", None)
    return learn_soup(service, adapters, examples, SoupsConfig(steps=20, **changes), test=test)


def test_weights_go_to_the_adapter_that_fits_and_the_factors_stay(service):
    before = {name: service.host.adapter(name).flat.clone() for name in ("up", "down")}
    found = learn(service, TASKS["up"], lr=0.3, weighting="softmax")
    zero, uniform, single, learnt = found.rows
    assert [row.name for row in found.rows] == ["zero", "uniform", "best single", "lora_soups"]
    assert single.weights == (1.0, 0.0) and learnt.loss < uniform.loss < zero.loss
    weights = torch.tensor(list(found.log["weights"].values()))
    assert weights.sum(1).allclose(torch.ones(len(weights))) and weights[:, 0].mean() > 0.6
    assert len({tuple(row.tolist()) for row in weights}) == len(weights)  # a site has its own
    for name, flat in before.items():
        assert torch.equal(service.host.adapter(name).flat, flat)
    assert len(found.log["losses"]) == 20 and found.log["losses"][-1] < found.log["losses"][0]


def test_the_result_is_plain_lora_of_the_sum_of_the_ranks_and_resident(service):
    found = learn(service, TASKS["up"] + TASKS["down"], weighting="free", test=loss_on(service, TASKS["down"]))
    assert service.host.adapter("composed") is found.adapter and found.adapter.method.name == "lora"
    assert found.report.lowest == found.report.highest == 5
    assert found.row.loss == loss_on(service, TASKS["up"] + TASKS["down"])(found.adapter)
    assert found.row.test == loss_on(service, TASKS["down"])(found.adapter)
    assert sorted(service.host.adapters) == ["composed", "down", "up"]


def test_the_lineage_says_parents_and_how_the_weights_were_learnt(service):
    adapters = [service.host.adapter(name) for name in ("up", "down")]
    data = Data("few.jsonl", "ab" * 32, 2)
    found = learn_soup(service, adapters, TASKS["up"], SoupsConfig(steps=2, seed=3), data=data)
    lineage = Lineage.from_meta(found.adapter.meta)
    assert [(parent.relation, parent.weight) for parent in lineage.parents] == [("merged-from", None)] * 2
    assert lineage.how == "cat" and lineage.data == data
    assert lineage.settings["learnt"]["how"] == "lora_soups" and lineage.settings["learnt"]["seed"] == 3


def test_equal_seeds_learn_equal_weights(service):
    found = []
    for seed in (1, 1, 2):
        found.append(learn(service, TASKS["up"] + TASKS["down"], spread=1.0, batch_size=2, seed=seed).log["weights"])
        service.host.delete("composed")
    assert found[0] == found[1] != found[2]


def test_what_cannot_be_learnt_is_one_sentence_and_leaves_nothing(service):
    with pytest.raises(DataError, match="No token of the examples has a loss weight"):
        learn(service, [Example((5, 6), (0.0, 0.0))])
    service.host.adapter("up").flat[3] = math.inf
    with pytest.raises((MethodError, ValueError), match="not finite"):
        learn(service, TASKS["up"])
    assert sorted(service.host.adapters) == ["down", "up"]
    with pytest.raises(ConfigError, match="weighting"):
        SoupsConfig(weighting="soft")
