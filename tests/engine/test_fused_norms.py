"""Norms under adapters in packed passes: one node each, which equals the site's own forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.executor import Work
from lorica.engine.fused import FusedNorm, fused_parts, norm_of
from lorica.engine.fused_norms import AdaptedNorm
from lorica.engine.groups import standing_in
from lorica.engine.host import Host
from lorica.engine.sites import NormForward
from lorica.methods.norm import Norm
from tests.tiny import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUTE: list[str | list[str] | None] = ["a", None, "b", ["a", "b"]]
LENGTHS = [5, 3, 4, 6]


def host_of(family: str, dtype: torch.dtype, adapters: torch.dtype = torch.float32) -> Host:
    """Two adapters; a quarter of the differences is zero, and some are far below half a unit of the weight."""
    host = Host(tiny(family, dtype=dtype))
    for seed, name in enumerate("ab"):
        rng = torch.Generator().manual_seed(seed)
        flat = host.add(name, Norm(), dtype=adapters).flat
        flat.add_(torch.randn(flat.shape, generator=rng) * 10 ** -torch.randint(1, 5, flat.shape, generator=rng))
        flat[::4] = 0
    return host


def both(host: Host) -> tuple[NormForward, AdaptedNorm]:
    """The first norm's own forward, and the one of packed passes."""
    module = next(m for m in host.backbone.module.modules() if type(m).__name__.endswith("RMSNorm"))
    own = module.__dict__["forward"]
    assert isinstance(own, NormForward)
    with torch.no_grad(), host.disabled():
        bare = norm_of(module)
    assert isinstance(bare, FusedNorm)
    return own, AdaptedNorm(own, bare)


def outcome(host: Host, forward: NormForward, x: Tensor, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y, dx, and the gradient of each adapter."""
    leaf = x.clone().requires_grad_(True)
    for adapter in host.adapters.values():
        adapter.zero_grad()
    route = host.rows(ROUTE, lengths=LENGTHS)
    with route, standing_in([(forward.module, forward)]):
        y = forward.module(leaf)
    y.backward(dy)
    assert leaf.grad is not None
    return y.detach(), [leaf.grad.float(), *(adapter.grad.clone() for adapter in host.adapters.values())]


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_it_is_the_sites_own_forward_bit_for_bit_and_its_gradients_to_rounding(
    family: str, dtype: torch.dtype, adapters: torch.dtype
) -> None:
    host = host_of(family, dtype, adapters)
    own, fused = both(host)
    rng = torch.Generator().manual_seed(0)
    x, dy = (2 * torch.randn(1, sum(LENGTHS), own.site.shape[0], generator=rng).to(dtype) for _ in range(2))
    (y, grads), (expected, wanted) = outcome(host, fused, x, dy), outcome(host, own, x, dy)
    assert y.dtype == expected.dtype and torch.equal(y, expected)
    tolerance = 1e-5 if adapters == torch.float32 == dtype else 2e-2
    for grad, want in zip(grads, wanted, strict=True):
        assert want.any()
        assert (grad - want).norm() <= tolerance * want.norm()


def test_where_the_difference_is_zero_it_is_the_base_bit_for_bit() -> None:
    host = host_of("qwen3", torch.bfloat16)
    own, fused = both(host)
    host.adapter("a").flat.zero_()
    x = torch.randn(1, 7, own.site.shape[0], generator=torch.Generator().manual_seed(1)).bfloat16()
    with host.rows(["a"], lengths=[7]):
        assert torch.equal(fused(x), type(own.module).forward(own.module, x))


def test_norms_are_found_and_used_though_they_were_adapted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_of("qwen3", torch.bfloat16)
    assert len(fused_parts(host.backbone)[0]) == 9
    seen: list[nn.Module] = []
    run = AdaptedNorm._run

    def watched(norm: AdaptedNorm, x: Tensor, item: Work | None) -> Tensor:
        seen.append(norm.module)
        return run(norm, x, item)

    monkeypatch.setattr(AdaptedNorm, "_run", watched)
    Engine(host).forward_backward([Item(Example.whole(list(range(3, 20))), "a")])
    assert len(set(seen)) == 9
