"""The values that few-bit codes stand for, each from its rule.

In: a number of bits. Out: float32 tables. Refuses to know tensors of weights and how codes are stored.
"""

from __future__ import annotations

import functools
from statistics import NormalDist

import torch
from torch import Tensor

from lorica.core.errors import ConfigError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the four-bit float with two exponent bits and one of mantissa; bit 3 of a code is its sign."""

EDGE = round(1 - (1 / 32 + 1 / 30) / 2, 7)
"""The outermost quantile of a normal-float table, to seven digits as in the published tables: 0.9677083."""


@functools.cache
def normal_float(bits: int) -> Tensor:
    """The `2^bits` values of NF-`bits`, ascending, float32 in [−1, 1] with an exact zero.

    With q = `EDGE` the values above zero are `Φ⁻¹` at the first `2^(bits−1)` of the `2^(bits−1) + 1` equally spaced
    points from q down to ½; those below are `−Φ⁻¹` at the first `2^(bits−1) − 1` of `2^(bits−1)` points. All are
    divided by the largest. QLoRA (arXiv 2305.14314) for 4 bits, LoftQ (2310.08659) for fewer. Points and quotients are
    float32, because stored checkpoints hold those bits. Raises ConfigError below 2 or above 8 bits.
    """
    if not 2 <= bits <= 8:
        raise ConfigError(f"A normal-float table has 2 to 8 bits, not {bits}.")
    half = 2 ** (bits - 1)
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        points = torch.linspace(EDGE, 0.5, count + 1, dtype=torch.float32)
        return [quantile(point) for point in points[:-1].tolist()]

    values = torch.tensor(sorted([*(-v for v in side(half - 1)), 0.0, *side(half)]), dtype=torch.float32)
    return values / values.max()


@functools.cache
def dynamic_8bit() -> Tensor:
    """The 256 values of the signed dynamic 8-bit map, ascending, float32 (arXiv 1511.04561, as bitsandbytes has it).

    Decade e = −6 … 0 holds `2^(e+6)` magnitudes, the middles of equal parts of `[0.1, 1] · 10^e`, and their negatives;
    0 and 1 are added. So the largest is 1 and the smallest −0.99297. Computed in float32 step by step, because stored
    checkpoints hold those bits.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [sign * middle for middle in middles.tolist() for sign in (1.0, -1.0)]
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def e2m1() -> Tensor:
    """What the sixteen E2M1 codes stand for, float32: 0 … 6, then −0 … −6."""
    return torch.tensor([*E2M1, *(-v for v in E2M1)])


@functools.cache
def midpoints(kind: str, bits: int = 4) -> Tensor:
    """Decision boundaries of a sorted table: `kind` is `nf` or `dynamic`."""
    values = normal_float(bits) if kind == "nf" else dynamic_8bit()
    return (values[:-1] + values[1:]) / 2
