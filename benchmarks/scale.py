"""Many adapters: registering and switching them, a step beside 10,000 of them, attaching to 210 maps, loading beside
64.

In: nothing. Out: times and ratios of one run. The step is forward and backward of eight tenants in one batch; the host
with one registered tenant and the host with 10,000 share their frozen weights and take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import LINEARS, another, device, qwen3
from benchmarks.timing import command, least
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host, attach
from lorica.methods.lora import LoRA
from lorica.models.backbone import wrap

TENANTS, TOKENS, VOCABULARY = 8, 64, 8000


class Steps:
    """Forward and backward of some tenants of a host in one batch."""

    def __init__(self, host: Host, names: list[str]) -> None:
        self.engine = Engine(host)
        rng = torch.Generator().manual_seed(0)
        self.examples = [
            Example.whole(torch.randint(3, VOCABULARY, (TOKENS + 1,), generator=rng).tolist()) for _ in range(TENANTS)
        ]
        self.names = names

    def __call__(self) -> None:
        self.engine.forward_backward([Item(e, name) for e, name in zip(self.examples, self.names, strict=False)])


def registered(count: int, rounds: int, peft_count: int) -> dict[str, Any]:
    """Adapters of rank 1 on four layers: `count` beside one, and PEFT with `peft_count` beside it."""
    base = qwen3(width=512, layers=4, vocabulary=VOCABULARY)
    # copies first: a copy of a model with hooks would carry them
    baseline, *copies = [another(base) for _ in range(4)]
    one, few, many = (Host(wrap(module)) for module in copies)
    method = LoRA(rank=1, alpha=2)
    for i in range(TENANTS):
        few.add(f"a{i}", method, seed=i)
    start = least({"add": lambda: [many.add(f"a{len(many.adapters)}", method) for _ in range(count)]}, 1, 0)["add"]
    names, last = [f"a{i}" for i in range(TENANTS)], [f"a{count - 1 - i}" for i in range(TENANTS)]
    turn = [0]

    def switch() -> None:
        turn[0] = (turn[0] + 7919) % (count - TENANTS)
        with many.rows([f"a{turn[0] + i}" for i in range(TENANTS)]):
            pass

    one.add("a0", method)
    times = least({"switch": switch}, 200) | least(
        {
            "one tenant of one": Steps(one, ["a0"]),
            "one tenant of many": Steps(many, last[:1]),
            "eight tenants of eight": Steps(few, names),
            "eight tenants of many": Steps(many, last),
        },
        rounds,
    )
    return {
        "parameters of an adapter": many.adapter("a0").flat.numel(),
        f"register, ms each ({count})": round(1e3 * start / count, 3),
        f"switch {TENANTS} of {count} tenants, ms": round(1e3 * times["switch"], 4),
        f"step of one tenant, {count} registered over 1": round(
            times["one tenant of many"] / times["one tenant of one"], 3
        ),
        f"step of {TENANTS} tenants, {count} registered over {TENANTS}": round(
            times["eight tenants of many"] / times["eight tenants of eight"], 3
        ),
    } | (peft_residents(baseline, peft_count) if peft_count else {})


def peft_residents(base: nn.Module, count: int) -> dict[str, Any]:
    """The same of PEFT, with fewer adapters: adding one costs it time in proportion to those that are there."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=1, lora_alpha=2, target_modules=LINEARS)
    model_ = get_peft_model(base, config, adapter_name="a0")
    ids = torch.randint(3, VOCABULARY, (1, TOKENS)).to(device())

    def step() -> None:
        model_(input_ids=ids, labels=ids).loss.backward()
        model_.zero_grad(set_to_none=True)

    alone = least({"step": step}, 5)["step"]
    for i in range(1, count):
        model_.add_adapter(f"a{i}", config)
    names = iter(range(1, 10**6))
    times = least({"switch": lambda: model_.set_adapter(f"a{next(names) % count}"), "step": step}, 5)
    return {
        f"peft: set_adapter, ms ({count})": round(1e3 * times["switch"], 2),
        f"peft: step, {count} registered over 1": round(times["step"] / alone, 3),
    }


def life_cycle(rounds: int) -> dict[str, Any]:
    """Thirty layers, 210 maps, an adapter of 5 MB: attach to all, and load a folder beside 64 residents."""
    from peft import LoraConfig, get_peft_model

    base = qwen3(width=256, layers=30, vocabulary=VOCABULARY)
    method = LoRA(rank=8, alpha=16)
    host = Host(wrap(another(base)))
    for i in range(64):
        host.add(f"a{i}", method, seed=i)
    counter = iter(range(10**6))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)
    with tempfile.TemporaryDirectory() as folder:
        path = host.save(Path(folder) / "adapter", "a0")
        fresh = [wrap(another(base)) for _ in range(rounds + 1)]
        copies = [another(base) for _ in range(rounds + 1)]
        runs: dict[str, Callable[[], object]] = {
            "attach": lambda: attach(fresh.pop(), method),
            "load": lambda: host.load(path, f"loaded{next(counter)}"),
            "peft": lambda: get_peft_model(copies.pop(), config),
        }
        times = least(runs, rounds)
    size = host.adapter("a0").flat.numel() * 4 / 1e6
    return {
        "maps": len(host.adapter("a0").layout.sites),
        "adapter, MB": round(size, 1),
        "attach, ms (fingerprint included)": round(1e3 * times["attach"], 1),
        "peft: get_peft_model, ms": round(1e3 * times["peft"], 1),
        "load beside 64 residents, ms": round(1e3 * times["load"], 1),
    }


def main() -> None:
    """Run, and print."""
    command(
        __doc__,
        "many adapters",
        lambda o: registered(o.count, o.rounds, o.peft) | life_cycle(o.rounds),
        count=10_000,
        peft=100,
        rounds=15,
    )


if __name__ == "__main__":
    main()
