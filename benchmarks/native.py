"""Kernels in C beside torch's own operations, on the service's small model: the same passes and tokens, both ways.

In: nothing. Out: times and ratios of one run. Where the machine has no C compiler both are torch's, and all ratios 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.decode import Ours, step_times
from benchmarks.models import RANK
from benchmarks.server import BATCH, SIZES, TOKENS, VOCABULARY
from benchmarks.timing import command, least
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.methods.lora import LoRA
from lorica.models import tiny

WAYS = {"kernels": True, "torch's operations": False}


def host_of(native: bool, tenants: int) -> Host:
    """A model of its own with so many adapters."""
    host = Host(tiny("qwen3", vocab_size=VOCABULARY, **SIZES)).set_native(native)
    for i in range(tenants):
        adapter = host.add(f"a{i}", LoRA(rank=RANK, alpha=2 * RANK), seed=i)
        adapter.flat.add_(0.01 * torch.randn_like(adapter.flat))
    return host


def trained(host: Host, rows: int, tokens: int) -> Callable[[], object]:
    """A pass forth and back."""
    engine, ids = Engine(host), [(7 * i) % VOCABULARY for i in range(tokens + 1)]
    return lambda: engine.forward_backward([Item(Example.whole(ids), "a0") for _ in range(rows)])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """A pass over four tokens, one of a batch, a token of one row and of many."""
    hosts = {way: host_of(native, options.tenants) for way, native in WAYS.items()}
    many: list[str | None] = [f"a{i}" for i in range(options.tenants)]
    found = {
        "4 tokens trained": least({way: trained(host, 1, 4) for way, host in hosts.items()}, 20 * options.rounds, 2),
        f"{BATCH}×{TOKENS} tokens trained": least(
            {way: trained(host, BATCH, TOKENS) for way, host in hosts.items()}, options.rounds
        ),
        "a token of one adapter": step_times(
            {way: Ours(host, ["a0"]) for way, host in hosts.items()}, options.tokens, options.rounds
        ),
        f"a token each of {options.tenants} adapters": step_times(
            {way: Ours(host, many) for way, host in hosts.items()}, options.tokens, options.rounds
        ),
    }
    return {
        name: {f"{way}, ms": round(1e3 * value, 2) for way, value in times.items()}
        | {"over torch's": round(times["torch's operations"] / times["kernels"], 2)}
        for name, times in found.items()
    }


def main() -> None:
    """Run, and print."""
    command(__doc__, "native", measure, tenants=32, tokens=64, rounds=4)


if __name__ == "__main__":
    main()
