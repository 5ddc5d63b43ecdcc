"""Packed sequences as a few padded batches, and back: for attention, which is all that is ever padded.

In: lengths of sequences that lie end to end. Out: buckets of nearly one length, with the way there and back. Refuses to
know what is computed on them. N tokens, S sequences, T padded width, H heads, K head dim.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Padded widths. Longer sequences share a batch with those of their own length alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Sequences `rows` padded to one width: places `place_n` of the padded [S · T] are the tokens `token_n`.

    `whole` says that these are all tokens of the batch in their order, which nothing has to be copied for.
    """

    rows: tuple[int, ...]
    width: int
    token_n: Tensor
    place_n: Tensor
    whole: bool

    @property
    def full(self) -> bool:
        """Whether no sequence is shorter than the width."""
        return len(self.token_n) == self.width * len(self.rows)

    def spread(self, x_NHK: Tensor) -> Tensor:
        """[S, T, H, K], zero where there is no token. Differentiable."""
        if self.whole:
            return x_NHK.view(len(self.rows), self.width, *x_NHK.shape[1:])
        result: Tensor = cast(Any, _Spread).apply(x_NHK, self)
        return result

    def gather(self, x_STHK: Tensor) -> Tensor:
        """The bucket's tokens [n, H, K], in the order of `token_n`. Differentiable."""
        flat = x_STHK.flatten(0, 1)
        return flat if self.full else flat[self.place_n]


class _Spread(torch.autograd.Function):
    """Every token has one place, so the way back copies where autograd's own would add up."""

    @staticmethod
    def forward(ctx: Any, x_NHK: Tensor, bucket: Bucket) -> Tensor:
        ctx.bucket, ctx.shape = bucket, x_NHK.shape
        own_nHK = x_NHK[bucket.token_n]
        shape = (len(bucket.rows), bucket.width, *x_NHK.shape[1:])
        if bucket.full:
            return own_nHK.view(shape)
        padded = x_NHK.new_zeros(shape)
        padded.flatten(0, 1)[bucket.place_n] = own_nHK
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        bucket, dx_NHK = ctx.bucket, grads[0].new_zeros(ctx.shape)
        dx_NHK[bucket.token_n] = bucket.gather(grads[0])
        return dx_NHK, None


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The buckets of a batch, and the order that brings their tokens, one bucket after the other, back; None: as is."""

    buckets: tuple[Bucket, ...]
    order_N: Tensor | None

    @property
    def whole(self) -> bool:
        """Whether the batch is one bucket as it lies in memory."""
        return len(self.buckets) == 1 and self.buckets[0].whole

    def join(self, pieces_nHK: list[Tensor]) -> Tensor:
        """What every bucket gathered, in the batch's order, [N, H, K]."""
        y_NHK = pieces_nHK[0] if len(pieces_nHK) == 1 else torch.cat(pieces_nHK)
        return y_NHK if self.order_N is None else y_NHK[self.order_N]


@functools.lru_cache(maxsize=64)
def plan(lengths: tuple[int, ...], prefixes: tuple[int, ...], pad: bool, device: torch.device) -> Plan:
    """Buckets of one prefix length and nearly one length; without `pad`, of one length exactly. Their places are kept
    on `device`.
    """
    starts = list(itertools.accumulate(lengths, initial=0))
    sizes = set(lengths)
    found: dict[tuple[int, int], list[int]] = {}
    for row, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        padded = pad and not prefix and len(sizes) > 1 and length <= WIDTHS[-1]
        width = WIDTHS[bisect.bisect_left(WIDTHS, length)] if padded else length
        found.setdefault((width, prefix), []).append(row)
    made = tuple(_bucket(width, rows, starts, device) for (width, _), rows in found.items())
    order_N = torch.cat([bucket.token_n for bucket in made]).argsort()
    return Plan(made, None if torch.equal(order_N, torch.arange(len(order_N), device=device)) else order_N)


def _bucket(width: int, rows: list[int], starts: list[int], device: torch.device) -> Bucket:
    token_n = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
    place_n = torch.cat(
        [torch.arange(i * width, i * width + starts[row + 1] - starts[row]) for i, row in enumerate(rows)]
    )
    whole = torch.equal(token_n, torch.arange(starts[-1])) and len(token_n) == width * len(rows)
    return Bucket(tuple(rows), width, token_n.to(device), place_n.to(device), whole)
