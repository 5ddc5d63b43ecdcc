"""Every registered method: its step over the frozen floor and over our LoRA's, what it keeps, and PEFT beside it.

In: nothing. Out: ratios of one run. Each method has its targets and its default settings, or with --rank the rank that
all have; it takes turns with the floor, with LoRA and, where PEFT reads its folder, with PEFT over the same adapter.
Eight different methods share one batch, over the same batch of eight LoRAs.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import PeftTrainer, device, qwen3
from benchmarks.tenants import Tenants
from benchmarks.timing import command, least
from benchmarks.train import OurFloor, OurTrainer, examples_of, kept_by
from lorica.core.errors import LoricaError
from lorica.core.update import LinearUpdate
from lorica.data.example import Example
from lorica.methods import all_methods
from lorica.recipes.compare.costs import Saved

MIXED = ("lora", "dora", "vera", "ia3", "pissa", "lora_fa", "miss", "norm")
"""The eight of the mixed batch, where they are measured; others take the places of those that are not."""
TENANTS = 8


class Bench:
    """One model and batch, with the floor and LoRA, which every method takes turns with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rounds: int = options.rounds
        self.how = f"rank-{options.rank}" if options.rank else "default"
        self.base: nn.Module = qwen3(options.width, options.layers, dtype=options.dtype)
        rng = torch.Generator().manual_seed(1)
        self.ids_BT: Tensor = torch.randint(3, 32_000, (options.rows, options.tokens), generator=rng).to(device())
        self.examples: list[Example] = examples_of(self.ids_BT)
        self.floor, self.lora = OurFloor(self.base), OurTrainer(self.base, f"{self.how}:lora")
        with Saved(list(self.base.parameters())) as saved:
            self.floor.step(self.examples)
        self.floor_bytes = saved.bytes

    def row(self, name: str) -> dict[str, Any]:
        """One method's figures. Raises LoricaError where it does not fit the model."""
        ours = self.lora if name == "lora" else OurTrainer(self.base, f"{self.how}:{name}")
        runs: dict[str, Callable[[], object]] = {
            "floor": partial(self.floor.step, self.examples),
            "lora": partial(self.lora.step, self.examples),
            "ours": partial(ours.step, self.examples),
        }
        theirs, why = self.peft(ours) if all_methods()[name].peft is not None else (None, "")
        if theirs is not None:
            runs["peft"] = partial(theirs.step, self.ids_BT)
        times = least(runs, self.rounds)
        kept = kept_by(self.base, ours.client, self.examples).bytes
        row = {
            "over floor": round(times["ours"] / times["floor"], 2),
            "over LoRA": round(times["ours"] / times["lora"], 2),
            "keeps MB": round(kept / 1e6, 1),
            "over floor, MB": round((kept - self.floor_bytes) / 1e6, 1),
            "lowers to": "A, B" if lowers_to_factors(ours) else "more",
        }
        if theirs is not None:
            own = [*self.base.parameters(), *theirs.model.parameters(), *theirs.model.buffers()]
            with Saved(own) as saved:
                theirs.loss(self.ids_BT)
            row |= {
                "PEFT over ours": round(times["peft"] / times["ours"], 2),
                "PEFT keeps MB": round(saved.bytes / 1e6, 1),
            }
        return row | ({"PEFT": why} if why else {})

    def peft(self, ours: OurTrainer) -> tuple[PeftTrainer | None, str]:
        """PEFT over the adapter's own folder, or why it has none."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                ours.service.host.save(folder, ours.client.adapter)
                theirs = PeftTrainer(self.base, folder=Path(folder))
                theirs.step(self.ids_BT)
            except Exception as error:  # whatever PEFT raises: then there is nothing to compare with
                return None, f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        return theirs, ""

    def mixed(self, names: list[str], tokens: int) -> float:
        """A joint step of eight different methods over one of eight LoRAs, a row each."""
        mixed = Tenants(self.base, TENANTS, tokens, [f"{self.how}:{name}" for name in names])
        plain = Tenants(self.base, TENANTS, tokens, [f"{self.how}:lora"])
        times = least({"mixed": mixed.joint, "lora": plain.joint}, self.rounds)
        return times["mixed"] / times["lora"]


def lowers_to_factors(ours: OurTrainer) -> bool:
    """Whether low-rank products beside linear maps are all that the method does."""
    adapter, weight = ours.client.adapter, ours.service.host.backbone.weight
    if any(site.kind != "linear" for site in adapter.layout.sites.values()):
        return False
    updates = [adapter.update(name, weight(name)) for name in adapter.layout.sites]
    return all(isinstance(u, LinearUpdate) and bool(u.factors) and u.low_rank_only for u in updates)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every method in turn, then the mixed batch, then the worst of each."""
    bench = Bench(options)
    names = list(all_methods()) if options.methods == "all" else options.methods.split(",")
    rows: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {"the floor keeps, MB": round(bench.floor_bytes / 1e6, 1)}
    for name in names:
        try:
            report[name] = rows[name] = bench.row(name)
        except LoricaError as error:
            report[name] = f"does not fit: {error.message}"
        gc.collect()
    order = [name for name in (*MIXED, *rows) if name in rows]
    eight = list(dict.fromkeys(order))[:TENANTS]
    report[f"mixed batch of {', '.join(eight)}: time over all LoRA"] = round(bench.mixed(eight, options.tokens), 2)
    peft = {name: row["PEFT over ours"] for name, row in rows.items() if "PEFT over ours" in row}
    factors = {name: row["over LoRA"] for name, row in rows.items() if row["lowers to"] == "A, B"}
    worst = min(peft, key=lambda name: peft[name], default=None)
    slowest = max(factors, key=lambda name: factors[name], default=None)
    report["least speed over PEFT"] = None if worst is None else f"{peft[worst]} ({worst})"
    report["most time of an A, B method over LoRA"] = None if slowest is None else f"{factors[slowest]} ({slowest})"
    return report


def main() -> None:
    """Run, and print."""
    command(
        __doc__, "methods", measure,
        dtype="bfloat16", width=1024, layers=8, rows=4, tokens=128, rank=0, methods="all", rounds=3,
    )  # fmt: skip


if __name__ == "__main__":
    main()
