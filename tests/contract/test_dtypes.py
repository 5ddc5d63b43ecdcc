"""Half-precision bases with float32 adapters, and autocast."""

from __future__ import annotations

import pytest
import torch

from tests.contract.cases import DEVICE, Case, add, attached, close, every_kind, gradient, inputs, loss, output, small


@every_kind
@pytest.mark.parametrize("compute", [None, torch.float32], ids=["compute-bf16", "compute-fp32"])
def test_a_bfloat16_base_trains_float32_masters_close_to_the_exact_gradient(
    case: Case, compute: torch.dtype | None
) -> None:
    every = {"num_experts_per_tok": 4} if case.family == "qwen3-moe" else {}  # rounding may choose other experts
    exact = attached(case, **every)
    half = attached(case, dtype=torch.bfloat16, **every).set_compute(compute)
    for site in exact.backbone.sites.values():  # the exact model has the half one's rounded weights
        if site.kind not in ("attention", "input"):
            owner, attribute, _ = exact.backbone.parameter(site.name)
            twin, _, _ = half.backbone.parameter(site.name)
            getattr(owner, attribute).data.copy_(getattr(twin, attribute))
            if getattr(owner, "bias", None) is not None:
                owner.bias.data.copy_(twin.bias)  # type: ignore[operator,union-attr]
    exact.backbone.invalidate()
    adapter = half.adapter("a")
    assert adapter.flat.dtype == torch.float32
    exact.adapter("a").flat.copy_(adapter.flat)
    for site, param, tensor in list(adapter.named_tensors()):
        if not tensor.requires_grad:
            exact.adapter("a").set(site, param, tensor)
    given = inputs(exact)
    found = gradient(half, "a", _rounded(given))
    expected = gradient(exact, "a", given)
    assert found.dtype == torch.float32 and found.isfinite().all()
    cosine = torch.nn.functional.cosine_similarity(found.double(), expected, dim=0)
    assert cosine > 0.99
    y = output(half, _rounded(given))
    assert y.dtype == torch.bfloat16
    assert (y.double() - output(exact, given)).norm() < 0.06 * output(exact, given).norm()


def _rounded(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in given.items()}


@every_kind
def test_autocast_gives_what_the_base_gives_it_and_float32_gradients(case: Case) -> None:
    # on a GPU, rounding chose other experts
    every = {"num_experts_per_tok": 4} if case.family == "qwen3-moe" and DEVICE.type != "cpu" else {}
    host = attached(case, dtype=torch.float32, **every)
    given = inputs(host)
    plain = gradient(host, "a", given)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        with host.disabled():
            base = output(host, given)
        y = output(host, given)
        assert y.dtype == base.dtype
        host.adapter("a").zero_grad()
        value = loss(y.float())
    value.backward()
    found = host.adapter("a").grad
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert torch.nn.functional.cosine_similarity(found, plain, dim=0) > 0.98


@every_kind
def test_a_mixed_batch_in_bfloat16_has_each_row_as_alone(case: Case) -> None:
    host = attached(case, dtype=torch.bfloat16)
    add(host, "b", small("lora"), seed=2)
    given = inputs(host, rows=4)
    with host.rows(["b", "a", None, "a"]):
        y = output(host, given)
    host.activate("a")
    pair = output(host, {key: value[[1, 3]] for key, value in given.items()})
    close(y[[1, 3]].float(), pair.float(), 2e-2)
