"""Stacks in packed passes: sums where all levels are sums, and the gradients of plain autograd for any of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.methods import make_method
from tests.contract.cases import close, perturb, run_dense
from tests.tiny import tiny

ROWS = [(5, 9, 20, 7, 8, 3), (30, 11, 6), (9, 9, 5, 5, 7), (17, 4, 4), (8, 8, 3, 2)]
ATTENTION = ["q_proj", "k_proj", "v_proj"]
ALL = [*ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj"]


def items(owners: list[Any]) -> list[Item]:
    rng = torch.Generator().manual_seed(4)
    weights = [(0.0, *torch.rand(len(row) - 1, generator=rng).tolist()) for row in ROWS]
    return [Item(Example(row, own), owner) for row, own, owner in zip(ROWS, weights, owners, strict=True)]


def run(host: Host, owners: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    for adapter in host.adapters.values():
        adapter.zero_grad()
    results = Engine(host).forward_backward(items(owners))
    logprobs = torch.tensor([p for r in results for p in r.logprobs], dtype=torch.float64)
    return logprobs, {name: adapter.grad.clone() for name, adapter in host.adapters.items()}


@pytest.mark.parametrize("owner", [["a", "b"], ["b", "a"]], ids="".join)
def test_two_stacked_loras_are_one_of_their_joined_ranks(owner: list[str]) -> None:
    host = Host(tiny("llama", dtype=torch.float64))
    for seed, (name, rank) in enumerate({"a": 2, "b": 3}.items()):
        method = make_method("lora", rank=rank, alpha=rank)
        perturb(host.add(name, method, ALL, seed=seed, dtype=torch.float64), 0.1, seed)
    both = host.add("both", make_method("lora", rank=5, alpha=5), ALL, dtype=torch.float64)
    a, b = host.adapter("a"), host.adapter("b")
    for site in both.layout.sites:
        one, two = a.tensors(site), b.tensors(site)
        both.set(site, "A", torch.cat([one["A"], two["A"]]))
        both.set(site, "B", torch.cat([one["B"], two["B"]], dim=1))
    stacked, grads = run(host, [owner, None, "a", owner, owner])
    joined, wide = run(host, ["both", None, "a", "both", "both"])
    close(stacked, joined, 1e-6)
    _, alone = run(host, [None, None, "a", None, None])
    for site, places in both.layout.places.items():
        wide_A, wide_B = (wide["both"][p.offset : p.offset + p.size].view(p.shape) for p in places.values())
        for name, adapter, ranks in (("a", a, slice(0, 2)), ("b", b, slice(2, 5))):
            own = grads[name] - alone[name]
            found = {k: own[p.offset : p.offset + p.size].view(p.shape) for k, p in adapter.layout.places[site].items()}
            close(found["A"], wide_A[ranks], 1e-5)
            close(found["B"], wide_B[:, ranks], 1e-5)


STACKS: dict[str, list[tuple[str, dict[str, Any], list[str]]]] = {
    "lora-lora": [("lora", {"rank": 2}, ALL), ("lora", {"rank": 3}, ALL)],
    "elsewhere": [("lora", {"rank": 2}, ATTENTION), ("lora", {"rank": 3}, ["v_proj", "down_proj", "lm_head"])],
    "three": [("lora", {"rank": 2}, ALL), ("vera", {"rank": 4}, ATTENTION), ("lora", {"rank": 3}, ALL)],
    "dora-lora": [("dora", {"rank": 2}, ALL), ("lora", {"rank": 3}, ALL)],
    "lora-ia3": [("lora", {"rank": 2}, ALL), ("ia3", {}, ["k_proj", "v_proj", "down_proj"])],
}


@pytest.mark.parametrize("kind", list(STACKS))
@pytest.mark.parametrize("turned", [False, True])
def test_a_stack_in_a_packed_mix_has_the_gradients_of_plain_autograd(kind: str, turned: bool) -> None:
    host = Host(tiny("llama", dtype=torch.float64))
    for seed, (method, fields, targets) in enumerate(STACKS[kind]):
        adapter = host.add(f"{seed}", make_method(method, **fields), targets, seed=seed, dtype=torch.float64)
        perturb(adapter, 0.1, seed)
    stack = list(host.adapters)[:: -1 if turned else 1]
    owners: list[Any] = [stack, stack[0], None, stack, [stack[-1]]]
    found, grads = run(host, owners)
    for adapter in host.adapters.values():
        adapter.zero_grad()
    expected = []
    for item, owner in zip(items(owners), owners, strict=True):
        names = [owner] if isinstance(owner, str) else owner or []
        ids = torch.tensor([item.example.tokens])
        logits = run_dense(host, [host.adapter(name) for name in names], {"input_ids": ids[:, :-1]})[0]
        logprobs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected.append(logprobs.detach())
        if names:
            (-(logprobs * torch.tensor(item.example.weights[1:])).sum()).backward()
    close(found, torch.cat(expected), 1e-6)
    for name, adapter in host.adapters.items():
        assert adapter.grad.any()
        close(grads[name], adapter.grad, 1e-5)
