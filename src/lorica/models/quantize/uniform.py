"""Equally spaced levels over one tensor's clipped range: LoftQ's second quantiser.

In: a weight. Out: packed codes, the lowest level and the step. Refuses to know modules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.models.quantize.bits import pack, packed_size, unpack
from lorica.models.quantize.formats import Format, Parts, finite32

SPREAD = 2.0
"""Standard deviations around the mean that are kept."""


@dataclass(frozen=True, slots=True)
class Uniform(Format):
    """`w ≈ low + step · code`: w is clipped to mean ± 2 std, and `2^bits` levels span what is left, end to end.

    The clipping is the format's rule: it spends levels on the bulk. It makes the format not idempotent (the clipped
    weight has a smaller deviation). Parts: `codes` uint8 [⌈N·bits/8⌉, 1], `low` and `step`, float32 scalars. Used by
    LoftQ (arXiv 2310.08659).
    """

    width: int = 4

    @property
    def name(self) -> str:
        return f"uniform{self.width}"

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        flat_N = finite32(weight).reshape(-1)
        mean, reach = flat_N.mean(), SPREAD * flat_N.std(correction=1 if flat_N.numel() > 1 else 0)
        kept_N = flat_N.clamp(mean - reach, mean + reach)
        low, high = kept_N.aminmax()
        step = (high - low) / (2**self.width - 1)
        codes_N = ((kept_N - low) / torch.where(step > 0, step, 1.0)).round_()
        return {"codes": pack(codes_N.to(torch.uint8), self.width)[:, None], "low": low, "step": step}

    def unpack(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        codes_N = unpack(parts["codes"], self.width, torch.Size(shape).numel())
        return codes_N.float().mul_(parts["step"]).add_(parts["low"]).to(dtype).view(shape)

    def sizes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        count = torch.Size(shape).numel()
        return {
            "codes": ((packed_size(count, self.width), 1), torch.uint8),
            "low": ((), torch.float32),
            "step": ((), torch.float32),
        }
