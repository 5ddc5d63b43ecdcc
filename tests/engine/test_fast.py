"""The engine's fast passes: who shares an input is learnt, known blocks are found, and nothing but rounding changes."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from lorica.data.example import Example
from lorica.engine import engine as engine_module
from lorica.engine.engine import Engine, Item
from lorica.engine.fast import fast_modules
from lorica.engine.fused import FusedNorm, fused_parts, gated_of, norm_of
from lorica.engine.groups import groups_of
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import Backbone
from lorica.models.builtin import FAMILIES
from tests.tiny import tiny

CAUSAL = [family for family in FAMILIES if tiny(family).is_causal_lm]
DTYPES = [torch.float32, torch.bfloat16]
OWNERS = ["lora", None, "dora", "ia3", "vera", "lora", ["dora", "lora"], "delta", "norm", None, "dropped"]


def residents(family: str, dtype: torch.dtype) -> Host:
    """Adapters that touch every part of an update."""
    host = Host(tiny(family, dtype=dtype))
    for seed, name in enumerate(["lora", "dora", "ia3", "vera", "delta", "norm"]):
        rank = {"rank": 4} if name in ("lora", "dora", "vera") else {}
        host.add(name, make_method(name, **rank), seed=seed)
    host.add("dropped", make_method("lora", rank=3, dropout=0.5), seed=9)
    for seed, adapter in enumerate(host.adapters.values()):
        adapter.flat.add_(0.05 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)))
    return host


def items(owners: list[object]) -> list[Item]:
    rng = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 120, (5 + (7 * i) % 30,), generator=rng).tolist() for i in range(len(owners))]
    return [Item(Example.whole(row), owner) for row, owner in zip(rows, owners, strict=True)]  # type: ignore[arg-type]


def run(host: Host, batch: list[Item]) -> tuple[Tensor, dict[str, Tensor]]:
    for adapter in host.adapters.values():
        adapter.forwards = 0
        adapter.zero_grad()
    results = Engine(host).forward_backward(batch)
    return torch.cat([torch.tensor(r.logprobs) for r in results]), {
        name: adapter.grad.clone() for name, adapter in host.adapters.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", CAUSAL)
def test_a_fast_pass_equals_a_plain_one_up_to_rounding(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, batch = residents(family, dtype), items(OWNERS)
    fast, grads = run(host, batch)
    monkeypatch.setattr(engine_module, "fast_modules", lambda executor: nullcontext())
    plain, plain_grads = run(host, batch)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert (fast - plain).abs().max() < tolerance
    for name, grad in grads.items():
        assert (grad - plain_grads[name]).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * plain_grads[name].norm()
        assert grad.any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_fast_pass_is_repeatable_bit_for_bit(dtype: torch.dtype) -> None:
    host, batch = residents("qwen3", dtype), items(OWNERS)
    first, second = run(host, batch), run(host, batch)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize(
    ("family", "shared"),
    [
        (
            "llama",
            {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",), ("lm_head",)},
        ),
        ("gpt2", {("c_attn",), ("c_proj",), ("c_fc",), ("lm_head",)}),
    ],
)
def test_maps_of_one_input_are_found(family: str, shared: set[tuple[str, ...]]) -> None:
    host = Host(tiny(family))
    groups = groups_of(host.executor)
    assert {tuple(m.site.rsplit(".", 1)[-1] for m in group.members) for group in groups} == shared
    assert sum(len(g.members) for g in groups) == sum(site.kind == "linear" for site in host.backbone.sites.values())
    assert groups_of(host.executor) is groups


def test_groups_are_learnt_anew_when_a_weight_has_changed() -> None:
    host = Host(tiny("llama"))
    before = groups_of(host.executor)
    assert groups_of(host.executor) is before
    host.backbone.module_of("model.layers.0.self_attn.q_proj").weight.data.add_(1.0)
    host.backbone.invalidate()
    assert groups_of(host.executor) is not before


@pytest.mark.parametrize(
    ("family", "norms", "gated"), [("llama", 5, 2), ("qwen3", 9, 2), ("gemma", 5, 2), ("gpt2", 0, 0)]
)
def test_norms_and_gated_blocks_are_recognised_by_what_they_compute(family: str, norms: int, gated: int) -> None:
    found = fused_parts(tiny(family, dtype=torch.bfloat16))
    assert (len(found[0]), len(found[1])) == (norms, gated)


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fused_norm_is_the_module_bit_for_bit_and_its_gradient_to_rounding(family: str, dtype: torch.dtype) -> None:
    module = next(m for m in tiny(family, dtype=dtype).module.modules() if type(m).__name__.endswith("RMSNorm"))
    fused = norm_of(module)
    assert isinstance(fused, FusedNorm)
    rng = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 5, module.weight.shape[0], generator=rng)).to(dtype).requires_grad_(True)
    dy = torch.randn(x.shape, generator=rng).to(dtype)
    y, expected = fused(x), module(x)
    assert torch.equal(y, expected)
    ours, theirs = (torch.autograd.grad(out, x, dy)[0].float() for out in (y, expected))
    assert (ours - theirs).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * theirs.norm()


def test_a_norm_or_block_of_another_form_keeps_its_own_forward() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)

    class OddBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    with torch.no_grad():
        assert norm_of(OddRMSNorm()) is None
        assert gated_of(OddBlock()) is None


def forwards(backbone: Backbone) -> dict[str, object]:
    return {name: m.__dict__["forward"] for name, m in backbone.module.named_modules() if "forward" in m.__dict__}


def test_calls_of_the_model_itself_never_meet_the_fast_forwards() -> None:
    host = residents("qwen3", torch.float32)
    before = forwards(host.backbone)
    with fast_modules(host.executor):
        assert len(forwards(host.backbone)) > len(before)
    assert forwards(host.backbone) == before
    with pytest.raises(ZeroDivisionError), fast_modules(host.executor):
        raise ZeroDivisionError
    assert forwards(host.backbone) == before
    Engine(host).forward_backward(items(["lora"]))
    assert forwards(host.backbone) == before


def test_autocast_keeps_the_plain_forwards() -> None:
    host = residents("qwen3", torch.float32)
    before = forwards(host.backbone)
    with torch.autocast("cpu", dtype=torch.bfloat16), fast_modules(host.executor):
        assert forwards(host.backbone) == before


def test_a_copy_of_a_used_backbone_learns_its_own_groups() -> None:
    host = residents("llama", torch.float32)
    Engine(host).forward_backward(items(["lora"]))
    copied = copy.deepcopy(host.detach())
    groups = groups_of(Host(copied).executor)
    assert all(m.module is copied.module_of(m.site) for group in groups for m in group.members)


def test_a_gated_block_keeps_gate_and_up_and_not_their_product() -> None:
    host = Host(tiny("llama", intermediate_size=80))
    host.add("lora", make_method("lora", rank=2))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() == -1:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        Engine(host).forward_backward(items(["lora"]))
    wide = {t.data_ptr(): t for t in kept if t.shape[-1] == 80 and t.ndim == 2 and t.shape[0] > 2}
    assert len(wide) == 2 * 2  # of each of two layers
    assert len({t.untyped_storage().data_ptr() for t in wide.values()}) == 2  # one joint output each
