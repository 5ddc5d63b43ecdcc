"""Many tenants: one joint batch of ours over HF PEFT's tenants one after the other, optimisers included.

In: nothing. Out: times and ratios of one run. Each tenant has an adapter and an optimiser of its own; PEFT's time for T
tenants is T times that of one of its steps, switching not counted. Ours one by one stands beside the joint batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.models import PeftTrainer, another, device, qwen3, variant_of
from benchmarks.timing import command, least
from benchmarks.train import examples_of
from lorica.client.local import Service, TrainingClient
from lorica.data.example import Example
from lorica.methods import make_method
from lorica.models.backbone import wrap
from lorica.training.optimizer import AdamWConfig


class Tenants:
    """Clients of one service with one sequence each."""

    def __init__(self, base: nn.Module, count: int, tokens: int, methods: list[str]) -> None:
        self.service = Service(wrap(another(base)), token_budget=1 << 20)
        rng = torch.Generator().manual_seed(1)
        self.ids_TN = torch.randint(3, 32_000, (count, tokens), generator=rng)
        self.examples: list[Example] = examples_of(self.ids_TN)
        self.clients: list[TrainingClient] = [
            self.service.training_client(
                make_method(method, **settings), name=f"t{i}", seed=i, optimizer=AdamWConfig(lr=1e-4)
            )
            for i in range(count)
            for method, settings in [variant_of(methods[i % len(methods)])]
        ]

    def joint(self) -> None:
        """One pass for all, then each optimiser."""
        self.service.forward_backward([(c, [e]) for c, e in zip(self.clients, self.examples, strict=True)])
        for client in self.clients:
            client.optim_step()

    def one_by_one(self) -> None:
        """Each alone."""
        for client, example in zip(self.clients, self.examples, strict=True):
            client.forward_backward([example])
            client.optim_step()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every batch (tenants, tokens of each)."""
    batches = [(int(count), int(tokens)) for count, tokens in (s.split("x") for s in options.batches.split(","))]
    base = qwen3(options.width, dtype=options.dtype, shape=options.shape)
    report: dict[str, Any] = {}
    theirs = PeftTrainer(base)
    for count, tokens in batches:
        ours = Tenants(base, count, tokens, options.methods.split(","))
        ids_1N = ours.ids_TN[:1].to(device())
        runs: dict[str, Callable[[], object]] = {
            "joint": ours.joint,
            "ours one by one": ours.one_by_one,
            "peft one": lambda ids_1N=ids_1N: theirs.step(ids_1N),  # type: ignore[misc]
        }
        times = least(runs, options.rounds)
        label = f"{count} tenants × {tokens} tokens"
        report |= {
            f"{label}: joint, tokens/s": round(count * tokens / times["joint"]),
            f"{label}: joint over PEFT one by one": round(count * times["peft one"] / times["joint"], 2),
            f"{label}: joint over ours one by one": round(times["ours one by one"] / times["joint"], 2),
        }
    return report


def main() -> None:
    """Run, and print."""
    command(
        __doc__, "tenants", measure,
        dtype="bfloat16", width=1024, shape="", batches="8x64,16x16", methods="lora", rounds=6,
    )  # fmt: skip


if __name__ == "__main__":
    main()
