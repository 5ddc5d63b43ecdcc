"""One tenant's training step: ours over HF PEFT's and over the frozen floor, and the activations that both save.

In: nothing. Out: times and ratios of one run. The floor is the frozen model's forward and the backward pass down to its
first activations, which no PEFT method can do without: the engine's own floor, with transformers' beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import PeftTrainer, another, device, qwen3, variant_of
from benchmarks.timing import command, least, products_share
from lorica.client.local import Service, TrainingClient
from lorica.data.example import Example
from lorica.methods import make_method
from lorica.models.backbone import wrap
from lorica.recipes.compare.costs import Saved
from lorica.training.optimizer import AdamWConfig


def examples_of(ids_BT: Tensor) -> list[Example]:
    """Rows of token ids as examples that train every token but the first."""
    return [Example.whole(row) for row in ids_BT.tolist()]


class OurTrainer:
    """One client of one variant over the whole batch."""

    def __init__(self, base: nn.Module, variant: str) -> None:
        method, settings = variant_of(variant)
        self.service = Service(wrap(another(base)), token_budget=1 << 20)
        self.client: TrainingClient = self.service.training_client(
            make_method(method, **settings), optimizer=AdamWConfig(lr=1e-4)
        )

    def step(self, examples: list[Example]) -> float:
        loss = self.client.forward_backward(examples).mean
        self.client.optim_step()
        return loss


class _Leaf(nn.Embedding):
    """Embeddings with respect to which a pass is differentiated."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).detach().requires_grad_(torch.is_grad_enabled())


class OurFloor:
    """The engine over base rows, differentiated with respect to the embeddings."""

    def __init__(self, base: nn.Module) -> None:
        self.backbone = wrap(another(base))
        self.service = Service(self.backbone, token_budget=1 << 20)
        self.backbone.module_of("input").__class__ = _Leaf  # no hook, which the engine would make room for

    def step(self, examples: list[Example]) -> None:
        from lorica.engine.engine import Item

        self.service.engine.forward_backward([Item(example, None) for example in examples])


class TheirFloor:
    """The same of the transformers model itself."""

    def __init__(self, base: nn.Module) -> None:
        self.model: Any = another(base).train()

    def step(self, ids_BT: Tensor) -> None:
        embeds_BTD = self.model.get_input_embeddings()(ids_BT).detach().requires_grad_(True)
        self.model(inputs_embeds=embeds_BTD, labels=ids_BT, use_cache=False).loss.backward()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of every method and floor in turn, then saved bytes."""
    base, names = qwen3(options.width, dtype=options.dtype, shape=options.shape), options.methods.split(",")
    ids_BT = torch.randint(3, 32_000, (options.rows, options.tokens), generator=torch.Generator().manual_seed(1)).to(
        device()
    )
    examples = examples_of(ids_BT)
    ours = {name: OurTrainer(base, name) for name in names}
    theirs = {name: PeftTrainer(base, name) for name in names}
    floor, their_floor = OurFloor(base), TheirFloor(base)
    runs: dict[str, Callable[[], object]] = {
        "floor": lambda: floor.step(examples),
        "transformers' floor": lambda: their_floor.step(ids_BT),
    }
    for name in names:
        runs[name] = lambda name=name: ours[name].step(examples)  # type: ignore[misc]
        runs[f"peft {name}"] = lambda name=name: theirs[name].step(ids_BT)  # type: ignore[misc]
    times = least(runs, options.rounds, warmup=2)
    report: dict[str, Any] = {f"{name}, ms": round(1e3 * value, 1) for name, value in times.items()}
    report["floor: speed over transformers' floor"] = round(times["transformers' floor"] / times["floor"], 2)
    for name in names:
        report[f"{name}: speed over PEFT"] = round(times[f"peft {name}"] / times[name], 2)
        report[f"{name}: time over the floor"] = round(times[name] / times["floor"], 2)
        report[f"peft {name}: time over transformers' floor"] = round(
            times[f"peft {name}"] / times["transformers' floor"], 2
        )
    for name, run in runs.items() if not torch.cuda.is_available() else ():
        report[f"{name}: share of matrix products"] = round(products_share(run), 2)
    for name in names:
        report |= saved_bytes(name, base, ours[name], theirs[name], ids_BT, examples)
    return report


def kept_by(base: nn.Module, client: TrainingClient, examples: list[Example]) -> Saved:
    """What one of our passes keeps for its backward pass."""
    frozen = [t for held in client.adapter.frozen.values() for t in held.values()]
    with Saved([*base.parameters(), client.adapter.flat, *frozen]) as saved:
        client.forward_backward(examples)
    return saved


def saved_bytes(
    name: str, base: nn.Module, ours: OurTrainer, theirs: PeftTrainer, ids_BT: Tensor, examples: list[Example]
) -> dict[str, Any]:
    """What each keeps for its backward pass."""
    own = [*base.parameters(), *theirs.model.parameters(), *theirs.model.buffers()]
    with Saved(own) as their_saved:
        theirs.loss(ids_BT)
    our_saved = kept_by(base, ours.client, examples)
    return {
        f"{name}: saved activations, MB": round(our_saved.bytes / 1e6, 1),
        f"peft {name}: saved activations, MB": round(their_saved.bytes / 1e6, 1),
        f"{name}: saved activations, PEFT's over ours": round(their_saved.bytes / our_saved.bytes, 2),
    }


def main() -> None:
    """Run, and print."""
    command(
        __doc__,
        "training",
        measure,
        dtype="bfloat16",
        rows=4,
        tokens=128,
        width=1024,
        shape="",
        methods="lora,dora,vera,vera-256",
        rounds=8,
    )


if __name__ == "__main__":
    main()
