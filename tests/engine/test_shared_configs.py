"""Models made from one config object: each has its own adapters, and the config is as before once all are gone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import tiny, wrap
from lorica.models.attention import set_attention
from tests.contract.cases import close

IDS = torch.tensor([[5, 9, 20, 7, 8, 3], [30, 11, 6, 8, 40, 41]])
ITEMS = [Item(Example.whole(row), owner) for row, owner in zip(IDS.tolist(), "pl", strict=True)]


def pair(kernel: str) -> tuple[Any, Any]:
    """Two models of different weights over one config object."""
    first: Any = tiny("llama", dtype=torch.float64).module
    set_attention(first, kernel)
    second: Any = type(first)(first.config)
    second.load_state_dict(tiny("llama", seed=1, dtype=torch.float64).module.state_dict())
    second = second.double().eval()
    second.model.rotary_emb.load_state_dict(first.model.rotary_emb.state_dict())
    assert second.config is first.config
    return first, second


def hosted(module: Any) -> Host:
    host = Host(wrap(module))
    host.add("p", make_method("prefix", tokens=3, init_std=1.0), dtype=torch.float64)
    host.add("l", make_method("lora", rank=2), dtype=torch.float64).flat.add_(0.05)
    return host


def results(host: Host) -> list[Tensor]:
    """The model's own pass, and the engine's."""
    with host.rows(["p", "l"]), torch.no_grad():
        logits: Tensor = host(input_ids=IDS).logits
    return [logits, torch.stack([torch.from_numpy(r.logprobs).double() for r in Engine(host).forward(ITEMS)])]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, two in zip(found, expected, strict=True):
        close(one, two, 1e-12)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("first_to_go", [0, 1])
def test_hosts_of_models_that_share_a_config_are_each_as_alone_and_the_last_to_go_restores_it(
    kernel: str, first_to_go: int
) -> None:
    modules = pair(kernel)
    alone = [results(hosted(copy.deepcopy(module))) for module in modules]
    with torch.no_grad():
        plain = [module(input_ids=IDS).logits for module in modules]
    assert not torch.allclose(alone[0][0], alone[1][0])
    hosts = [hosted(module) for module in modules]
    for host, expected in zip(hosts, alone, strict=True):
        same(results(host), expected)
    hosts[first_to_go].detach()
    last = 1 - first_to_go
    same(results(hosts[last]), alone[last])
    with torch.no_grad():
        assert torch.equal(modules[first_to_go](input_ids=IDS).logits, plain[first_to_go])
    hosts[last].detach()
    assert modules[0].config._attn_implementation == kernel
    with torch.no_grad():
        for module, expected_logits in zip(modules, plain, strict=True):
            assert torch.equal(module(input_ids=IDS).logits, expected_logits)


def test_a_host_that_comes_back_after_both_are_gone_is_as_before() -> None:
    modules = pair("sdpa")
    alone = results(hosted(copy.deepcopy(modules[0])))
    hosts = [hosted(module) for module in modules]
    for host in hosts:
        host.detach()
    again = hosted(modules[0])
    same(results(again), alone)
    again.detach()
    assert modules[1].config._attn_implementation == "sdpa"
