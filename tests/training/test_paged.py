"""Paged moments: refused with a sentence where there is no CUDA; equal to plain ones where there is."""

from __future__ import annotations

import pytest
import torch

from lorica.core.errors import MissingError
from lorica.engine.host import Host
from lorica.methods.lora import LoRA
from lorica.models import tiny
from lorica.training.optimizer import AdamWConfig, AdapterOptimizer


def stepped(paged: bool, device: str) -> torch.Tensor:
    base = tiny("llama")
    base.module.to(device)
    adapter = Host(base).add("a", LoRA(rank=2), "q_proj")
    optimizer = AdapterOptimizer(adapter, AdamWConfig(paged=paged), steps=3)
    for step in range(3):
        adapter.grad.copy_(torch.linspace(-1, 1 + step, adapter.grad.numel()))
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    return adapter.flat.cpu()


def test_without_cuda_paged_moments_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(MissingError, match="the adapter is on cpu") as caught:
        stepped(True, "cpu")
    assert "Leave `paged` out" in str(caught.value.hint)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_paged_moments_step_as_plain_ones_do() -> None:
    pytest.importorskip("bitsandbytes")
    assert torch.equal(stepped(True, "cuda"), stepped(False, "cuda"))
