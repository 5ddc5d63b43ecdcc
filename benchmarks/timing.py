"""Timing on a machine that others share: one thread, process CPU time, variants in turn, ratios of minima.

In: named callables. Out: the least time of each. Refuses to know what is timed.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def seconds(run: Callable[[], object]) -> float:
    """What one call costs: CPU time of this process on one thread of a CPU, else wall time with the device idle at
    both ends.
    """
    on_cuda = torch.cuda.is_available()
    clock = time.perf_counter if on_cuda or torch.get_num_threads() > 1 else time.process_time
    if on_cuda:
        torch.cuda.synchronize()
    start = clock()
    run()
    if on_cuda:
        torch.cuda.synchronize()
    return clock() - start


def least(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """The least seconds of each callable, over rounds in which every one has its turn."""
    for run in runs.values():
        for _ in range(warmup):
            run()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run))
    return best


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "device": device, "load": os.getloadavg()} | {
        "threads": torch.get_num_threads(),
        **packages,
    }


def show(title: str, rows: Mapping[str, Any]) -> None:
    """A table for people on stdout."""
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:44s} {value}", flush=True)


def as_json(rows: Mapping[str, Any]) -> str:
    """The same for machines."""
    return json.dumps(rows, indent=1, default=str)
