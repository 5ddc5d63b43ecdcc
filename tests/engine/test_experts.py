"""Fused experts: the routed tokens of each expert meet that expert's updates, row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import tiny
from tests.contract.cases import close, perturb

HOME = "model.layers.0.mlp.experts"
IDS = torch.randint(3, 120, (3, 5), generator=torch.Generator().manual_seed(0))


def moe(**overrides: int) -> Host:
    return Host(tiny("qwen3-moe", dtype=torch.float64, **overrides))


def by_hand(host: Host, x_NH: Tensor, index_NK: Tensor, weight_NK: Tensor, owners: list[str | None]) -> Tensor:
    """Each token by itself through dense effective weights."""
    base, out = host.backbone, []

    def weight(param: str, expert: int, owner: str | None) -> Tensor:
        site = f"{HOME}.{expert}.{param}"
        own = base.weight(site).matrix()
        if owner is None or site not in host.adapter(owner).layout.sites:
            return own
        return host.adapter(owner).update(site, base.weight(site)).effective(own)  # type: ignore[union-attr]

    for x, index, share, owner in zip(x_NH, index_NK.tolist(), weight_NK, owners, strict=True):
        y = torch.zeros_like(x)
        for expert, w in zip(index, share, strict=True):
            gate, up = (weight("gate_up_proj", expert, owner) @ x).chunk(2)
            y = y + w * (weight("down_proj", expert, owner) @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3", "delta"])
@pytest.mark.parametrize(
    "targets", [f"re:{HOME}.*", f"{HOME}.1.down_proj", f"re:{HOME}.2.*"], ids=["all", "one", "expert"]
)
def test_a_module_of_experts_is_its_tokens_one_by_one(method: str, targets: str) -> None:
    host = moe()
    fields = {"rank": 2} if method in ("lora", "dora", "vera") else {}
    for seed, name in enumerate("ab"):
        perturb(host.add(name, make_method(method, **fields), targets, seed=seed, dtype=torch.float64), 0.3, seed)
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(12, 32, generator=rng, dtype=torch.float64)
    index = torch.stack([torch.randperm(4, generator=rng)[:2] for _ in range(12)])
    share = torch.rand(12, 2, generator=rng, dtype=torch.float64)
    module = host.backbone.module_of(f"{HOME}.0.down_proj")
    with host.rows(["b", None, "a"]):
        y = module(x, index, share)
    close(y, by_hand(host, x, index, share, ["b"] * 4 + [None] * 4 + ["a"] * 4), 1e-12)


def test_one_adapted_expert_leaves_the_others_and_other_layers_on_the_models_own_path() -> None:
    host = moe()
    perturb(host.add("a", make_method("lora", rank=2), f"{HOME}.3.down_proj", dtype=torch.float64), 0.3)
    host.activate("a")
    assert list(host._hooks.forwards) == [f"{HOME}.3.down_proj"]
    y = host(input_ids=IDS).logits
    with host.disabled():
        assert not torch.allclose(y, host(input_ids=IDS).logits)


def test_an_expert_that_no_token_reaches_gets_exactly_no_gradient() -> None:
    host = moe()
    adapter = host.add("a", make_method("lora", rank=2), f"re:{HOME}.*", dtype=torch.float64)
    perturb(adapter, 0.3)
    host.activate("a")
    x = torch.randn(3, 32, dtype=torch.float64)
    module = host.backbone.module_of(f"{HOME}.0.down_proj")
    module(x, torch.tensor([[0, 2]] * 3), torch.full((3, 2), 0.5, dtype=torch.float64)).sum().backward()
    for expert in range(4):
        for param in ("gate_up_proj", "down_proj"):
            leaf = adapter.tensors(f"{HOME}.{expert}.{param}")["B"]
            assert leaf.grad is not None and bool(leaf.grad.any()) == (expert in (0, 2))


def test_experts_for_tokens_that_another_device_serves_are_skipped() -> None:
    host = moe()
    perturb(host.add("a", make_method("lora", rank=2), f"re:{HOME}.*", dtype=torch.float64), 0.3)
    host.activate("a")
    module = host.backbone.module_of(f"{HOME}.0.down_proj")
    x, share = torch.randn(2, 32, dtype=torch.float64), torch.tensor([[0.5, 0.5]] * 2, dtype=torch.float64)
    both = module(x, torch.tensor([[0, 4], [4, 4]]), share)
    alone = module(x[:1], torch.tensor([[0, 4]]), share[:1])
    close(both[:1], alone, 1e-12)
    assert not both[1].any()


@pytest.mark.parametrize("chosen", [1, 4])
def test_any_number_of_experts_for_each_token(chosen: int) -> None:
    host = moe(num_experts_per_tok=chosen)
    perturb(host.add("a", make_method("lora", rank=2), "all-expert", dtype=torch.float64), 0.1)
    host.add("b", make_method("ia3"), "all-expert", dtype=torch.float64)
    with host.rows(["a", "b", ["b", "a"]]):
        y = host(input_ids=IDS).logits
    for row, names in enumerate((("a",), ("b",), ("b", "a"))):
        host.activate(*names)
        close(y[row], host(input_ids=IDS[row : row + 1]).logits[0], 1e-11)
