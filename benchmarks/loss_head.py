"""The loss head at 32 thousand and 152 thousand tokens of vocabulary: peak memory, time, and how exact it is.

In: nothing. Out: for transformers' float32 logits, cross-entropy in the base's dtype, and ours: time over the two
products that no head can do without, memory above the inputs, the largest error of a log-probability.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import device
from benchmarks.timing import command, least
from lorica.engine.prepack import FrozenMaps, worth_packing
from lorica.recipes import memory
from lorica.recipes.memory import current_bytes, forget_peak
from lorica.training.loss_head import linear_logprobs

ROWS, WIDTH = 1024, 1024


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that a call takes above what is there before it."""
    gc.collect()
    if not torch.cuda.is_available():
        ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    before = current_bytes()
    run()
    return memory.peak_bytes() - before


def measure(vocabulary: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """All variants on one hidden state and head."""
    rng = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(ROWS, WIDTH, generator=rng).to(dtype).to(device()).requires_grad_(True)
    weight_VD = (0.02 * torch.randn(vocabulary, WIDTH, generator=rng)).to(dtype).to(device())
    targets_N = torch.randint(vocabulary, (ROWS,), generator=rng).to(device())
    maps = FrozenMaps([weight_VD])
    maps.packs = worth_packing([weight_VD], copies=2)

    def ours() -> Tensor:
        logprobs_N = linear_logprobs(hidden_ND, maps.forward, maps.back, vocabulary, targets_N)
        (-logprobs_N.sum()).backward()
        return logprobs_N.detach()

    def theirs(wide: bool) -> None:
        logits_NV = hidden_ND @ weight_VD.T
        F.cross_entropy(logits_NV.float() if wide else logits_NV, targets_N, reduction="sum").backward()

    def limit() -> None:
        with torch.no_grad():
            for start in range(0, ROWS, 128):
                maps.back(maps.forward(hidden_ND[start : start + 128]))

    runs: dict[str, Callable[[], object]] = {
        "ours": ours,
        "float32 logits": lambda: theirs(True),
        f"{dtype} logits".removeprefix("torch."): lambda: theirs(False),
        "two products": limit,
    }
    times = least(runs, rounds)
    with torch.no_grad():
        exact_N = torch.cat(
            [_exact(h, weight_VD, t) for h, t in zip(hidden_ND.split(64), targets_N.split(64), strict=True)]
        )
    error = float((ours().double() - exact_N).abs().max())
    report: dict[str, Any] = {"ours: largest error of a log-probability": f"{error:.1e}"}
    for name, run in runs.items():
        report[f"{name}: time over two products"] = round(times[name] / times["two products"], 2)
        if name != "two products":
            report[f"{name}: peak, MB"] = round(peak_bytes(run) / 1e6)
    return {f"{vocabulary:,}: {name}": value for name, value in report.items()}


def _exact(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Log-probabilities in float64 of the same half-precision inputs."""
    logp_NV = (hidden_ND.double() @ weight_VD.double().T).log_softmax(-1)
    return logp_NV.gather(1, targets_N[:, None])[:, 0]


def main() -> None:
    """Run, and print."""

    def run(options: argparse.Namespace) -> dict[str, Any]:
        report: dict[str, Any] = {}
        for vocabulary in map(int, options.vocabularies.split(",")):
            report |= measure(vocabulary, options.dtype, options.rounds)
        return report

    command(__doc__, "loss head", run, dtype="bfloat16", vocabularies="32000,152000", rounds=3)


if __name__ == "__main__":
    main()
