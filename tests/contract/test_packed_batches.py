"""Packed mixed batches through the engine are each example alone through the plain model."""

from __future__ import annotations

import pytest
import torch

from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.models.builtin import FAMILIES
from tests.contract.cases import CASES, DEVICE, METHODS, Case, add, backbone, close, known, logits, small

every_causal = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.slow) if family in ("qwen3", "gemma") else family
        for family in FAMILIES
        if known(family).is_causal_lm
    ],
)
"""Those whose sites are those of others in the slow run."""
Rows = list[str | list[str] | None]


def residents(family: str, *, head: bool) -> tuple[Host, Rows]:
    """An adapter of every method that fits, and who each example belongs to: unsorted, repeated, the base, a stack."""
    host = Host(backbone(family))
    for index, name in enumerate(METHODS):
        if Case(family, name) in CASES:
            add(host, name, small(name), seed=index, head=head)
    add(host, "tall", small("lora", rank=4), seed=40, head=head)
    add(host, "absent", small("lora"), seed=41, head=head)
    names = [name for name in host.adapters if name != "absent"]
    return host, ["lora", None, *names[::-1], None, ["dora", "ia3", "lora"], ["prompt", "prefix"], "lora"]


def example(seed: int, length: int) -> Example:
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 120, (length,), generator=rng).tolist()
    weights = [0.0, *torch.rand(length - 1, generator=rng).round(decimals=2).tolist()]
    return Example(tuple(tokens), tuple(weights), f"row {seed}")


def alone(host: Host, item: Item) -> tuple[float, list[float]]:
    """Loss and log-probabilities from the model's own logits; gradients accumulate."""
    ids = torch.tensor([item.example.tokens], device=DEVICE)
    with host.rows([item.adapter]):
        y = logits(host.model(input_ids=ids[:, :-1]))[0].log_softmax(-1)
        logprobs = y.gather(1, ids[0, 1:, None])[:, 0]
        loss = -(logprobs * logprobs.new_tensor(item.example.weights[1:])).sum()
        if loss.requires_grad:
            loss.backward()
    return float(loss.detach()), logprobs.tolist()


@pytest.mark.parametrize("head", [False, True], ids=["head-frozen", "head-adapted"])
@every_causal
def test_a_packed_mix_of_every_method_is_each_example_alone(family: str, head: bool) -> None:
    host, owners = residents(family, head=head)
    items = [Item(example(i, 2 + (5 * i) % 9), owner) for i, owner in enumerate(owners)]
    results = Engine(host, token_budget=48).forward_backward(items)
    grads = {name: adapter.grad.clone() for name, adapter in host.adapters.items()}
    for adapter in host.adapters.values():
        adapter.zero_grad()
    for item, result in zip(items, results, strict=True):
        loss, logprobs = alone(host, item)
        assert result.loss == pytest.approx(loss, rel=1e-6)
        assert result.logprobs == pytest.approx(logprobs, rel=1e-9)
    for name, adapter in host.adapters.items():
        assert grads[name].any() == (name != "absent")
        close(grads[name], adapter.grad, 1e-8)


@every_causal
def test_the_token_budget_changes_nothing(family: str) -> None:
    host, owners = residents(family, head=False)
    items = [Item(example(i, 2 + (5 * i) % 9), owner) for i, owner in enumerate(owners)]
    found = []
    for budget in (1, 4096):
        for adapter in host.adapters.values():
            adapter.zero_grad()
        results = Engine(host, token_budget=budget).forward_backward(items)
        found.append((torch.tensor([r.loss for r in results]), [a.grad.clone() for a in host.adapters.values()]))
    close(found[1][0], found[0][0], 1e-6)
    close(torch.cat(found[1][1]), torch.cat(found[0][1]), 1e-8)


@every_causal
def test_checkpointing_a_packed_mix_with_dropout_changes_no_gradient(family: str) -> None:
    host, _ = residents(family, head=False)
    add(host, "dropped", small("lora", dropout=0.5), seed=50, head=False)
    items = [
        Item(example(i, 4 + i), owner) for i, owner in enumerate(["dropped", None, "dora", ["lora", "dropped"], "norm"])
    ]
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            host.checkpointing()
        for adapter in host.adapters.values():
            adapter.forwards = 0
            adapter.zero_grad()
        Engine(host).forward_backward(items)
        grads.append(torch.cat([adapter.grad.clone() for adapter in host.adapters.values()]))
    close(grads[1], grads[0], 1e-12)


@every_causal
def test_forward_alone_gives_the_same_numbers_and_no_gradient(family: str) -> None:
    host, owners = residents(family, head=False)
    items = [Item(example(i, 2 + (5 * i) % 9), owner) for i, owner in enumerate(owners)]
    engine = Engine(host)
    losses = [r.loss for r in engine.forward(items)]
    assert not any(adapter.grad.any() for adapter in host.adapters.values())
    assert [r.loss for r in engine.forward_backward(items)] == pytest.approx(losses, rel=1e-9)
