"""Packed sequences as a few padded batches, and back: for attention, which is all that is ever padded.

In: lengths of sequences that lie end to end. Out: buckets of nearly one length, with the way there and back. What is
padded is the sequence's own last token again, so it is finite where the sequence is, and a causal query before it never
sees it. Refuses to know what is computed on them. N tokens, P padded ones, S sequences, T width, H heads, K head dim.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Sequences between two of these share a batch. Longer ones do with those of their own length alone."""
STEP = 16
"""A batch is as wide as its longest sequence, rounded up to this."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences `rows`, padded to one width."""

    rows: tuple[int, ...]
    width: int

    @property
    def places(self) -> int:
        return len(self.rows) * self.width


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The buckets of a batch, one after the other in padded places: `token_P` is what token each place holds, `place_N`
    which place each token has. None where they are the batch as it lies in memory, for which nothing is copied.
    """

    buckets: tuple[Bucket, ...]
    token_P: Tensor | None
    place_N: Tensor | None

    @property
    def whole(self) -> bool:
        """Whether the batch is one bucket as it lies in memory."""
        return self.token_P is None and len(self.buckets) == 1

    def spread(self, x_NHK: Tensor) -> list[Tensor]:
        """Each bucket's [S, T, H, K]. Differentiable; the gradient of what was padded is left out."""
        made = self.split(x_NHK) if self.token_P is None else cast(Any, _Spread).apply(x_NHK, self)
        return [
            x.view(len(bucket.rows), bucket.width, *x.shape[1:]) for bucket, x in zip(self.buckets, made, strict=True)
        ]

    def join(self, pieces_STHK: Sequence[Tensor]) -> Tensor:
        """The batch's tokens of what every bucket gave, [N, H, K]. Differentiable."""
        flat = [piece.flatten(0, 1) for piece in pieces_STHK]
        if self.token_P is None:
            return flat[0] if len(flat) == 1 else torch.cat(flat)
        result: Tensor = cast(Any, _Join).apply(self, *flat)
        return result

    def split(self, x_PHK: Tensor) -> tuple[Tensor, ...]:
        """The places of each bucket."""
        if len(self.buckets) == 1:
            return (x_PHK,)
        return cast("tuple[Tensor, ...]", x_PHK.split([bucket.places for bucket in self.buckets]))


class _Spread(torch.autograd.Function):
    """Every token has one place that counts, so the way back copies where autograd's own would add up."""

    @staticmethod
    def forward(ctx: Any, x_NHK: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        assert plan.token_P is not None
        ctx.plan = plan
        return plan.split(x_NHK.index_select(0, plan.token_P))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.cat(grads).index_select(0, ctx.plan.place_N), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *pieces: Tensor) -> Tensor:
        assert plan.place_N is not None
        ctx.plan = plan
        return torch.cat(pieces).index_select(0, plan.place_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, (dy_NHK,) = ctx.plan, grads
        dx_PHK = dy_NHK.new_zeros(len(plan.token_P), *dy_NHK.shape[1:])
        return None, *plan.split(dx_PHK.index_copy_(0, plan.place_N, dy_NHK))


@functools.lru_cache(maxsize=64)
def plan(lengths: tuple[int, ...], prefixes: tuple[int, ...], pad: bool, device: torch.device) -> Plan:
    """Buckets of one prefix length and nearly one length; without `pad`, of one length exactly. Their places are kept
    on `device`.
    """
    starts = list(itertools.accumulate(lengths, initial=0))
    found: dict[tuple[int, int], list[int]] = {}
    for row, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        padded = pad and not prefix and length <= WIDTHS[-1]
        kind = WIDTHS[bisect.bisect_left(WIDTHS, length)] if padded else length
        found.setdefault((kind, prefix), []).append(row)
    buckets = tuple(Bucket(tuple(rows), _width([lengths[row] for row in rows])) for rows in found.values())
    token_P, place_N, first = [], torch.empty(starts[-1], dtype=torch.long), 0
    for bucket in buckets:
        for row in bucket.rows:
            own = torch.arange(starts[row], starts[row + 1])
            place_N[own] = torch.arange(first, first + len(own))
            token_P.append(torch.cat([own, own[-1:].expand(bucket.width - len(own))]))
            first += bucket.width
    if torch.equal(torch.cat(token_P), torch.arange(starts[-1])):
        return Plan(buckets, None, None)
    return Plan(buckets, torch.cat(token_P).to(device), place_N.to(device))


def _width(lengths: list[int]) -> int:
    """Of a bucket with these sequences."""
    longest = max(lengths)
    return longest if len(set(lengths)) == 1 else -(-longest // STEP) * STEP
