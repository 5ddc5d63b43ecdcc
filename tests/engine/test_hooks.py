"""Hooks stand on instances, come off again, and carry each pass's route through recomputation."""

from __future__ import annotations

import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorica.core.errors import MethodError, RouteError
from lorica.engine.host import Host, attach
from lorica.methods import make_method
from tests.contract.cases import perturb
from tests.tiny import tiny

LORA = make_method("lora", rank=2)
IDS = torch.tensor([[5, 9, 20], [7, 8, 30]])


def test_classes_keep_their_own_forward_and_other_models_are_untouched() -> None:
    other = tiny("llama", dtype=torch.float64)
    before = other.module(input_ids=IDS).logits
    forwards = {type(m): type(m).forward for m in other.module.modules()}
    host = attach(tiny("llama", dtype=torch.float64), LORA, "all", dtype=torch.float64)
    host.add("p", make_method("prefix"))
    host.activate("p")
    host(input_ids=IDS)
    assert {cls: cls.forward for cls in forwards} == forwards
    assert torch.equal(other.module(input_ids=IDS).logits, before)


def test_a_forward_set_on_an_instance_before_is_called_and_put_back() -> None:
    layer = nn.Linear(3, 3)
    seen = []

    def own(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return nn.Linear.forward(layer, x)

    layer.forward = own  # type: ignore[method-assign]
    host = attach(nn.Sequential(layer), LORA, "0")
    host(torch.zeros(2, 3))
    assert seen == [(2, 3)]
    host.detach()
    assert layer.__dict__["forward"] is own


def test_users_own_hooks_still_run() -> None:
    base = tiny("llama")
    calls = []
    base.module_of("model.layers.0.self_attn.q_proj").register_forward_hook(lambda *_: calls.append(1))
    host = attach(base, LORA, "q_proj")
    host(input_ids=IDS)
    assert calls == [1]


def test_positional_and_keyword_inputs_are_the_same() -> None:
    host = attach(tiny("llama", dtype=torch.float64), LORA, dtype=torch.float64)
    perturb(host.adapter())
    host.add("p", make_method("prompt", tokens=2), dtype=torch.float64)
    host.activate("default", "p")
    assert torch.equal(host(IDS).logits, host(input_ids=IDS).logits)


def test_checkpointing_that_lorica_does_not_know_of_is_refused_in_backward() -> None:
    host = attach(tiny("llama", dtype=torch.float64), LORA, dtype=torch.float64)
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    site = host.backbone.module_of("model.layers.0.self_attn.q_proj")
    y = checkpoint(site, x, use_reentrant=False)
    with pytest.raises(RouteError, match="recomputes this forward pass without its route") as caught:
        y.sum().backward()
    assert caught.value.hint and "host.checkpointing()" in caught.value.hint


def test_a_plain_module_cannot_checkpoint() -> None:
    with pytest.raises(MethodError, match="Only transformers models"):
        attach(nn.Sequential(nn.Linear(3, 3)), LORA, "0").checkpointing()


def test_switching_between_forward_and_backward_does_not_change_the_gradient() -> None:
    host = Host(tiny("llama", dtype=torch.float64))
    for seed, name in enumerate("ab"):
        perturb(host.add(name, LORA, dtype=torch.float64, seed=seed), seed=seed)
    grads = []
    for checkpointed in (False, True):
        for switched in (False, True):
            if checkpointed:
                host.checkpointing()
            host.adapter("a").zero_grad()
            host.activate("a")
            host.train()
            loss = host(input_ids=IDS).logits.square().mean()
            if switched:
                host.activate("b")
            loss.backward()
            grads.append(host.adapter("a").grad.clone())
            assert not host.adapter("b").grad.any()
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-12, atol=1e-14)


def test_detaching_frees_the_host_and_its_adapters() -> None:
    host = attach(tiny("llama"), LORA)
    host.add("p", make_method("prefix"))
    base = host.detach()
    gone = weakref.ref(host)
    del host
    gc.collect()
    assert gone() is None
    assert pickle.loads(pickle.dumps(base.module)) is not None  # nothing of ours is left that cannot be pickled


def test_two_hosts_in_two_threads_do_not_mix() -> None:
    hosts = [attach(tiny("llama", dtype=torch.float64), make_method("prefix"), seed=i) for i in range(2)]
    expected = [host(input_ids=IDS).logits for host in hosts]
    wrong: list[int] = []

    def run(index: int) -> None:
        for _ in range(5):
            with torch.no_grad():
                if not torch.equal(hosts[index](input_ids=IDS).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
