"""Routers of experts whose forward is their own: casts of the weight are followed, other products are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.core.errors import MethodError
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import wrap
from tests.contract.cases import close, perturb
from tests.tiny import tiny

CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda t: t.float(),
    "to": lambda t: t.to(torch.float32),
    "to-like": lambda t: t.to(torch.ones(1)),
    "to-keyword": lambda t: t.to(dtype=torch.float32),
    "type": lambda t: t.type(torch.float32),
    "double": lambda t: t.double(),
    "twice": lambda t: t.float().double(),
}


class CastingRouter(nn.Module):
    """Makes its logits in a wider dtype, as DeepSeek's and many others do."""

    def __init__(
        self, cast: Callable[[Tensor], Tensor], inside: int = 12, experts: int = 5, bias: bool = False
    ) -> None:
        super().__init__()
        self.cast = cast
        self.weight = nn.Parameter(torch.randn(experts, inside, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.ones(experts)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.cast(self.bias)
        return F.linear(self.cast(x), self.cast(self.weight), bias).softmax(-1)


class CosineRouter(CastingRouter):
    """Its logits are products with another matrix, made from the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight)).softmax(-1)


class MatmulRouter(CastingRouter):
    """Calls `F.linear` for something else."""

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, torch.eye(x.shape[-1], dtype=x.dtype)) @ self.weight.T).softmax(-1)


def gated(router: nn.Module, dtype: torch.dtype) -> Host:
    host = Host(wrap(nn.ModuleDict({"gate": router.to(dtype)})))
    for seed, name in enumerate("ab"):
        perturb(host.add(name, make_method("lora", rank=2), "gate", seed=seed), 0.3, seed)
    return host


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cast", list(CASTS))
def test_a_router_that_casts_its_weight_is_adapted_in_the_dtype_it_casts_to(cast: str, bias: bool) -> None:
    router = CastingRouter(CASTS[cast], bias=bias)
    host = gated(router, torch.bfloat16)
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1)).bfloat16()
    plain = router(x)
    with host.rows(["b", None, "a"]):
        found = router(x)
    assert found.dtype == CASTS[cast](x).dtype
    for rows, owner in ((slice(0, 2), "b"), (slice(2, 4), None), (slice(4, 6), "a")):
        if owner is None:
            assert torch.equal(found[rows], plain[rows])
            continue
        weight: Any = host.adapter(owner).update("gate", host.backbone.weight("gate"))
        weight = weight.effective(router.weight.double())
        shift = 0 if router.bias is None else router.bias.double()
        close(found[rows].double(), (x[rows].double() @ weight.T + shift).softmax(-1), 1e-6)
    with host.rows(["b", None, "a"]):
        router(x).square().sum().backward()
    assert host.adapter("a").grad.any() and host.adapter("b").grad.any()


@pytest.mark.parametrize("kind", [CosineRouter, MatmulRouter])
def test_a_router_whose_logits_are_no_product_with_its_weight_is_refused(kind: type[CastingRouter]) -> None:
    router = kind(CASTS["float"])
    host = gated(router, torch.float32)
    x = torch.ones(4, 12)
    plain = router(x)
    with (
        host.rows(["a", None]),
        pytest.raises(MethodError, match=rf"{kind.__name__} makes its logits in a way.*at site 'gate'") as caught,
    ):
        router(x)
    assert caught.value.hint == "Leave routers out of the targets."
    assert torch.equal(router(x), plain)
    with host.rows([None, None]):
        assert torch.equal(router(x), plain)


def test_a_bfloat16_model_whose_router_casts_has_each_row_as_alone_and_gradients() -> None:
    base = tiny("qwen3-moe", dtype=torch.bfloat16, num_experts_per_tok=4)
    gates = [module for name, module in base.module.named_modules() if name.endswith("mlp.gate")]
    plain = type(gates[0]).forward

    class CastRouter(type(gates[0])):  # type: ignore[misc]
        """The family's own router in float32."""

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = F.linear(hidden_states.reshape(-1, self.hidden_dim).float(), self.weight.float())
            top, index = logits.softmax(-1).topk(self.top_k, dim=-1)
            return logits, top / top.sum(-1, keepdim=True), index

    for gate in gates:
        gate.__class__ = CastRouter
    assert type(gates[0]).forward is not plain
    host = Host(wrap(base.module))
    for seed, name in enumerate("ab"):
        perturb(host.add(name, make_method("lora", rank=2), "mlp.gate", seed=seed), 0.5, seed)
    rows: list[tuple[tuple[int, ...], str | None]] = [((5, 9, 20, 7), "a"), ((8, 3, 9), None), ((30, 11, 6, 8), "b")]
    batch = [Item(Example.whole(tokens), owner) for tokens, owner in rows]
    results = Engine(host).forward_backward(batch)
    assert host.adapter("a").grad.any() and host.adapter("b").grad.any()
    for item, result in zip(batch, results, strict=True):
        ids = torch.tensor([item.example.tokens])
        with host.rows([item.adapter]), torch.no_grad():
            logprobs = host(input_ids=ids[:, :-1]).logits[0].float().log_softmax(-1)
        expected = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        assert result.logprobs == pytest.approx(expected.tolist(), abs=0.1)
