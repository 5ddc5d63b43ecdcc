"""Fused experts: the routed tokens of each expert meet that expert's updates, row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from lorica.core.errors import MethodError
from lorica.core.update import LinearUpdate
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import wrap
from tests.contract.cases import close, perturb
from tests.tiny import tiny

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


def test_experts_with_biases_and_a_gate_of_their_own_are_their_tokens_one_by_one() -> None:
    config = transformers.GptOssConfig(hidden_size=6, intermediate_size=5, num_local_experts=3, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    module = GptOssExperts(config).double()
    rng = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=rng)
    host = Host(wrap(torch.nn.ModuleDict({"experts": module})))
    adapter = host.add("a", make_method("lora", rank=2, lora_bias=True), "all-expert", dtype=torch.float64)
    perturb(adapter, 0.3)
    x = torch.randn(8, 6, generator=rng, dtype=torch.float64)
    index = torch.stack([torch.randperm(3, generator=rng)[:2] for _ in range(8)])
    share = torch.rand(8, 2, generator=rng, dtype=torch.float64)
    plain = module(x, index, share)
    host.activate("a")
    found = module(x, index, share)
    assert (found - plain).abs().max() > 0.1
    host.merge("a")
    close(module(x, index, share), found, 1e-12)


def test_experts_that_are_not_told_their_tokens_are_refused() -> None:
    text = transformers.Llama4TextConfig(hidden_size=6, intermediate_size=5, num_local_experts=3)
    module = Llama4TextExperts(text)
    torch.nn.init.ones_(module.gate_up_proj), torch.nn.init.ones_(module.down_proj)
    host = Host(wrap(torch.nn.ModuleDict({"experts": module})))
    perturb(host.add("a", make_method("lora", rank=2), "all-expert"), 0.3)
    x = torch.ones(3, 6)
    plain = module(x)
    host.activate("a")
    with pytest.raises(MethodError, match="Llama4TextExperts does not say which tokens an expert sees"):
        module(x)
    host.merge("a")  # what the hint says can be done
    assert (module(x) - plain).abs().max() > 0.1


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_router_chooses_by_its_adapted_logits_row_by_row(dropout: float) -> None:
    host = moe(num_experts_per_tok=4)  # all of them, so that a small change of logits shows
    for seed, name in enumerate("ab"):
        method = make_method("lora", rank=2, dropout=dropout)
        perturb(host.add(name, method, "mlp.gate", seed=seed, dtype=torch.float64), 0.5, seed)
    module, site = host.backbone.module_of("model.layers.0.mlp.gate"), "model.layers.0.mlp.gate"
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with host.rows(["b", None, "a"]):
        found = module(x)
    for rows, owner in ((slice(0, 4), "b"), (slice(4, 8), None), (slice(8, 12), "a")):
        weight = host.backbone.weight(site).matrix()
        if owner is not None:
            update = host.adapter(owner).update(site, host.backbone.weight(site))
            assert isinstance(update, LinearUpdate)
            weight = update.effective(weight)
        logits = x[rows] @ weight.T
        close(found[0][rows], logits, 1e-12)
        close(found[1][rows], logits.softmax(-1, dtype=torch.float32).sort(-1, descending=True)[0].double(), 1e-6)
    with host.rows(["b", None, "a"]):
        logits = host(input_ids=IDS).logits
        logits.sum().backward()
    assert host.adapter("a").grad.any() and host.adapter("b").grad.any()


def test_routers_are_adapted_only_when_they_are_named() -> None:
    host = moe()
    for targets in ("all-linear", "all", "all-expert"):
        sites = host.layout(make_method("lora", rank=2), targets).sites.values()
        assert sites and not any(site.router for site in sites)
    assert all(site.router for site in host.layout(make_method("lora", rank=2), "mlp.gate").sites.values())
