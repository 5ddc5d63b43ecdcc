"""Ragged sequences: ours packed end to end over HF PEFT's padded batch, one LoRA step each.

In: nothing. Out: times and ratios of one run. Twenty-four log-normal lengths between 16 and 447 tokens, padding making
more than three times as many.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import PeftTrainer, device, qwen3
from benchmarks.timing import command, least
from benchmarks.train import OurTrainer
from lorica.data.example import Example


def lengths(count: int) -> list[int]:
    """Log-normal lengths, clipped to [16, 447], the longest always there."""
    rng = torch.Generator().manual_seed(0)
    drawn = torch.exp(4.4 + 0.9 * torch.randn(count, generator=rng)).clamp(16, 447).int().tolist()
    return [*drawn[:-1], 447]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, longest]."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device())
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device())
    return ids_BT, mask_BT


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One step over the same sequences."""
    count, base = options.sequences, qwen3(options.width, dtype=options.dtype, shape=options.shape)
    rng = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 32_000, (n,), generator=rng).tolist() for n in lengths(count)]
    examples = [Example.whole(row) for row in rows]
    ids_BT, mask_BT = padded(rows)
    ours, theirs = OurTrainer(base, "lora"), PeftTrainer(base)
    times = least({"ours": lambda: ours.step(examples), "peft": lambda: theirs.step(ids_BT, mask_BT)}, options.rounds)
    real = sum(map(len, rows))
    return {
        "sequences": count,
        "tokens": real,
        "tokens with padding": ids_BT.numel(),
        "ours, tokens/s": round(real / times["ours"]),
        "peft padded, tokens/s": round(real / times["peft"]),
        "packed over PEFT padded": round(times["peft"] / times["ours"], 2),
        "of which the padding itself": round(ids_BT.numel() / real, 2),
    }


def main() -> None:
    """Run, and print."""
    command(
        __doc__,
        "packing",
        measure,
        dtype="bfloat16",
        width=512,
        shape="",
        sequences=24,
        rounds=4,
    )


if __name__ == "__main__":
    main()
