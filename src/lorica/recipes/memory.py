"""How much memory a run will need, and how much it needed.

In: a training client and its examples. Out: bytes by purpose. The largest micro-batch of a step is rehearsed, since no
formula knows an allocator; where it would not fit, its need is scaled up from a small one instead.
Refuses to know configs and files.
"""

from __future__ import annotations

import importlib
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorica.client.local import TrainingClient
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes. `total` is the peak of the process (on a GPU: of torch's allocations there).

    `weights`, `adapter` and `optimizer` (gradient and two moments) are counted; `working` is what one micro-batch adds.
    `rehearsed` says whether that micro-batch was run; if not, `working` was scaled up from a smaller one.
    """

    total: int
    weights: int
    adapter: int
    optimizer: int
    working: int
    rehearsed: bool


def estimate(client: TrainingClient, examples: Sequence[Example], batch_size: int) -> MemoryEstimate:
    """What training this client with batches of `batch_size` needs. Gradients and random state stay as they were."""
    for late in ("torch._dynamo", "matplotlib.backends.backend_agg"):  # a run loads these later; they are not small
        importlib.import_module(late)
    backbone, adapter = client.service.host.backbone, client.adapter
    element = adapter.flat.element_size()
    beneath = sum(one.flat.numel() * one.flat.element_size() for one in client.stack[:-1])
    frozen = beneath + sum(
        t.numel() * t.element_size() for one in client.stack for owned in one.frozen.values() for t in owned.values()
    )
    moments = 2 * adapter.flat.numel() * element
    before, earlier = current_bytes(), peak_bytes()
    longest = sorted(examples, key=len, reverse=True)[:batch_size]
    forget_peak()
    _rehearse(client, longest[:1])
    peak, working = peak_bytes(), peak_bytes() - before
    largest = _largest(longest, client.service.engine.token_budget)
    times = sum(map(len, largest)) / len(longest[0])
    fits = working * (times - 1) < free_bytes()
    if fits:
        for _ in range(2):  # an allocator settles at the second
            _rehearse(client, largest)
        peak, working = peak_bytes(), peak_bytes() - before
    else:
        peak, working = before + round(working * times), round(working * times)
    return MemoryEstimate(
        total=max(earlier, peak + moments),
        weights=backbone.weight_bytes(),
        adapter=adapter.flat.numel() * element + frozen,
        optimizer=moments + adapter.flat.numel() * element,
        working=working,
        rehearsed=fits,
    )


def _largest(longest: Sequence[Example], token_budget: int) -> list[Example]:
    """As many of the longest examples as one micro-batch holds; at least one."""
    chosen, room = [longest[0]], token_budget - len(longest[0])
    for example in longest[1:]:
        if len(example) > room:
            break
        chosen.append(example)
        room -= len(example)
    return chosen


def _rehearse(client: TrainingClient, examples: Sequence[Example]) -> None:
    """One forward and backward pass that leaves no trace in the adapter."""
    adapter = client.adapter
    before, rng = adapter.remember(), torch.get_rng_state()
    engine = Engine(client.service.host, token_budget=sum(map(len, examples)))
    engine.forward_backward([Item(example, client.stack) for example in examples])
    adapter.restore(before)
    torch.set_rng_state(rng)


def free_bytes() -> int:
    """Bytes that can still be had: of the GPU, or of the machine. Where the system does not say, there is no limit."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    found = _proc("/proc/meminfo", "MemAvailable")
    return sys.maxsize if found is None else found


def _proc(path: str, key: str) -> int | None:
    """Bytes of one line of a file of procfs; None where there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def forget_peak() -> None:
    """Let the peak begin anew from what is in use, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def current_bytes() -> int:
    """Bytes in use now: of the process, or allocated on the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:  # no procfs: the peak so far is the nearest thing
        return peak_bytes()


def peak_bytes() -> int:
    """The most bytes in use so far: of the process, or allocated on the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # what getrusage says begins with the peak of the process that started this one
    own = _proc("/proc/self/status", "VmHWM")
    if own is not None:
        return own
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
