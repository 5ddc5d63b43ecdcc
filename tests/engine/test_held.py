"""Held adapters: they act in every pass, nothing of them changes, and what is above them is trained as by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.training.optimizer import AdamWConfig, AdapterOptimizer
from tests.contract.cases import close, perturb, run_dense
from tests.tiny import tiny

ROWS = [(5, 9, 20, 7, 8, 3), (30, 11, 6), (9, 9, 5, 5, 7)]
STACKS = [
    (("lora", {"rank": 2}), ("lora", {"rank": 3})),
    (("dora", {"rank": 2}), ("lora", {"rank": 3})),
    (("lora", {"rank": 2}), ("dora", {"rank": 3})),
    (("vera", {"rank": 4}), ("ia3", {})),
    (("pissa", {"rank": 2}), ("miss", {"rank": 2})),
]


def items(owner: Any) -> list[Item]:
    rng = torch.Generator().manual_seed(4)
    return [Item(Example(row, (0.0, *torch.rand(len(row) - 1, generator=rng).tolist())), owner) for row in ROWS]


def made(stack: Any) -> Host:
    host = Host(tiny("llama", dtype=torch.float64))
    for seed, (name, (method, fields)) in enumerate(zip(("below", "above"), stack, strict=True)):
        on = "below" if name == "above" else None
        perturb(host.add(name, make_method(method, **fields), seed=seed, dtype=torch.float64, on=on), 0.1, seed)
    return host


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: "-".join(name for name, _ in stack))
def test_the_gradient_reaches_the_new_adapter_alone_and_is_autograds(stack: Any) -> None:
    host = made(stack)
    below, above = host.adapter("below"), host.adapter("above")
    results = Engine(host).forward_backward(items(["below", "above"]))
    found = above.grad.clone()
    above.zero_grad()
    assert below._grad is None or not below.grad.any()
    total = torch.zeros((), dtype=torch.float64)
    for item, result in zip(items(None), results, strict=True):
        ids = torch.tensor([item.example.tokens])
        logits = run_dense(host, [below, above], {"input_ids": ids[:, :-1]})[0]
        logprobs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        loss = -(logprobs * torch.tensor(item.example.weights[1:])).sum()
        close(torch.tensor(result.loss, dtype=torch.float64), loss.detach(), 1e-6)
        total = total + loss
    total.backward()
    close(found, above.grad, 1e-5)


def test_training_above_leaves_every_bit_of_what_is_below() -> None:
    host = made(((("adalora"), {"rank": 2}), ("lora", {"rank": 2, "dropout": 0.3})))
    below, above = host.adapter("below"), host.adapter("above")
    flat, counter = below.flat.clone(), below.forwards
    frozen = {(site, p): value.clone() for site, own in below.frozen.items() for p, value in own.items()}
    start = above.flat.clone()
    optimizer = AdapterOptimizer(above, AdamWConfig(lr=1e-2), steps=3)
    for _ in range(3):
        Engine(host).forward_backward(items(["below", "above"]))
        optimizer.step()
    assert not torch.equal(above.flat, start)
    assert torch.equal(below.flat, flat)
    assert below.forwards == counter
    assert above.forwards == 3
    assert all(torch.equal(below.frozen[site][p], value) for (site, p), value in frozen.items())


def test_dropout_of_what_is_below_is_off_as_in_evaluation() -> None:
    host = made((("lora", {"rank": 2, "dropout": 0.5}), ("lora", {"rank": 2})))
    engine = Engine(host)
    trained = engine.forward_backward(items(["below", "above"]))
    evaluated = engine.forward(items(["below", "above"]))
    assert [r.loss for r in trained] == pytest.approx([r.loss for r in evaluated], rel=1e-12)


def test_through_the_live_module_a_held_adapter_counts_no_pass_and_gets_no_gradient() -> None:
    host = made((("lora", {"rank": 2, "dropout": 0.5}), ("lora", {"rank": 2})))
    host.activate("below", "above")
    host.train()
    host(input_ids=torch.tensor([ROWS[0]])).logits.sum().backward()
    assert (host.adapter("below").forwards, host.adapter("above").forwards) == (0, 1)
    assert not host.adapter("below").grad.any()
    assert host.adapter("above").grad.any()


@pytest.mark.parametrize("below", [("prompt", {"tokens": 2}), ("prefix", {"tokens": 3})], ids=lambda m: m[0])
def test_virtual_tokens_and_prefixes_can_be_stood_on(below: Any) -> None:
    host = made((below, ("lora", {"rank": 2})))
    Engine(host).forward_backward(items(["below", "above"]))
    assert host.adapter("above").grad.any()
    assert not host.adapter("below").grad.any()
