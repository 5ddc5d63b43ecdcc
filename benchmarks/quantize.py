"""Packed weights: time to unpack one, beside bitsandbytes, and what a base and a LoRA step on it cost.

In: nothing. Out: times, ratios and bytes of one run, on the CPU or, where there is one, on the GPU. Both unpack the
same bytes, to the same values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import RANK, device, qwen3
from benchmarks.timing import command, least
from lorica.client.local import Service
from lorica.data.example import Example
from lorica.methods.lora import LoRA
from lorica.models.backbone import Backbone, wrap
from lorica.models.quantize import bnb
from lorica.models.quantize.apply import quantize_backbone
from lorica.models.quantize.config import Quantization
from lorica.models.quantize.functions import quantize
from lorica.models.quantize.linear import QuantizedLinear
from lorica.training.optimizer import AdamWConfig

KINDS = ("nf4", "nf3", "nf2", "nvfp4", "uniform4")


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device(), dtype)


def unpacking(size: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One square weight, unpacked to `dtype`."""
    weight = normal(size, size, dtype=dtype)
    packed = {kind: quantize(weight, kind, double=True) for kind in KINDS}
    runs: dict[str, Any] = {kind: partial(one.dense, dtype) for kind, one in packed.items()}
    if bnb.installed() and bnb.takes(packed["nf4"], dtype):
        runs["bitsandbytes nf4"] = partial(bnb.dequantize, packed["nf4"], dtype)
        assert torch.equal(runs["bitsandbytes nf4"](), packed["nf4"].dense(dtype))
    times = least(runs, rounds)
    found: dict[str, Any] = {f"unpack {kind}, ms": round(1e3 * spent, 2) for kind, spent in times.items()}
    if "bitsandbytes nf4" in times:
        found["unpack nf4, ours over bitsandbytes"] = round(times["nf4"] / times["bitsandbytes nf4"], 2)
    for kind, one in packed.items():
        found[f"bits a weight, {kind}"] = round(8 * one.nbytes / weight.numel(), 3)
    return found


def products(size: int, tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Forward and backward of one linear map."""
    weight, x = normal(size, size, dtype=dtype), normal(tokens, size, dtype=dtype)
    packed = quantize(weight, "nf4", double=True)
    dense = nn.Linear(size, size, bias=False, device=weight.device, dtype=dtype).requires_grad_(False)
    modules: dict[str, nn.Module] = {"dense": dense, "nf4": QuantizedLinear(packed, None, dtype=dtype)}
    if bnb.installed() and bnb.takes(packed, dtype):
        modules["bitsandbytes nf4"] = bnb.to_linear4bit(packed, None, dtype).train()

    def run(module: nn.Module) -> None:
        leaf = x.detach().requires_grad_()
        module(leaf).sum().backward()

    times = least({name: partial(run, module) for name, module in modules.items()}, rounds)
    return {f"linear forth and back, {name}, ms": round(1e3 * spent, 2) for name, spent in times.items()}


def steps(width: int, rows: int, tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One LoRA step on a base in full and on packed ones, and what the bases take."""
    bases: dict[str, Backbone] = {"full": wrap(qwen3(width, dtype=dtype))}
    for kind in ("nf4", "nvfp4"):
        bases[kind] = quantize_backbone(wrap(qwen3(width, dtype=dtype)), Quantization.parse({"kind": kind}))
    rng = torch.Generator().manual_seed(1)
    batch = [Example.whole(torch.randint(3, 32_000, (tokens,), generator=rng).tolist()) for _ in range(rows)]
    clients = {
        name: Service(base, token_budget=1 << 20).training_client(LoRA(rank=RANK), optimizer=AdamWConfig(lr=1e-4))
        for name, base in bases.items()
    }

    def step(name: str) -> None:
        clients[name].forward_backward(batch)
        clients[name].optim_step()

    times = least({name: partial(step, name) for name in bases}, rounds)
    found: dict[str, Any] = {f"LoRA step, {name} base, s": round(spent, 3) for name, spent in times.items()}
    found |= {f"base in memory, {name}, MB": round(base.weight_bytes() / 1e6, 1) for name, base in bases.items()}
    linear = {n: sum(m.packed.nbytes for m in b.packed_modules()) for n, b in bases.items() if b.quantization}
    full = sum(
        s.out_features * s.in_features for s in bases["full"].sites.values() if s.kind == "linear" and not s.head
    )
    return found | {
        f"linear weights, {n} over {str(dtype)[6:]}": round(size / (full * dtype.itemsize), 4)
        for n, size in linear.items()
    }


def main() -> None:
    """Run, and print."""
    command(
        __doc__,
        "quantize",
        lambda o: {
            **unpacking(o.size, o.dtype, o.rounds),
            **products(o.size, o.tokens * o.rows, o.dtype, o.rounds),
            **steps(o.width, o.rows, o.tokens, o.dtype, o.rounds),
        },
        dtype="bfloat16",
        size=2048,
        width=512,
        rows=4,
        tokens=64,
        rounds=5,
    )


if __name__ == "__main__":
    main()
