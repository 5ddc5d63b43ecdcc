"""Timing on a machine that others share: one thread, process CPU time, variants in turn, ratios of minima.

In: named callables. Out: the least time of each. Refuses to know what is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch

from lorica.engine.native.proved import kernels_for
from lorica.recipes.compare.costs import seconds

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


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


PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
"""Matrix products, as torch's profiler names them on a CPU."""


def products_share(run: Callable[[], object]) -> float:
    """The share of matrix products in one call's time on the CPU: no engine can do without most of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(spent.get(name, 0.0) for name in PRODUCTS) / sum(spent.values())


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "device": device, "load": os.getloadavg()} | {
        "threads": torch.get_num_threads(),
        "kernels in C": kernels_for(torch.float32) is not None,
        **packages,
    }


def command(
    doc: str | None, title: str, measure: Callable[[argparse.Namespace], Mapping[str, Any]], **flags: Any
) -> None:
    """A benchmark's command line: a flag for each of `flags`, which gives its default, then run and print.

    `dtype` is given by name and handed on as torch's. --json prints one document, the environment included; in a table
    a value that is a mapping is one row.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    for name, default in flags.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    options = parser.parse_args()
    said = ", ".join(f"{name} {getattr(options, name)}" for name in flags)
    if "dtype" in flags:
        options.dtype = getattr(torch, options.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = measure(options)
    if options.json:
        print(json.dumps({"benchmark": title, "flags": said} | environment() | dict(report), indent=1, default=str))
        return
    print(f"\n{title} ({said})")
    for name, value in (environment() | dict(report)).items():
        row = "  ".join(f"{key} {own}" for key, own in value.items()) if isinstance(value, Mapping) else value
        print(f"  {name:52s} {row}", flush=True)
