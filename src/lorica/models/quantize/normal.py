"""NF4, NF3 and NF2: blocks of values of a normal-float table, with the blocks' scales in 8 bits or in float32.

In: a weight. Out: packed codes, scales, and the scales' own scales; names, bytes and rounding are those of bitsandbytes
4-bit checkpoints. Refuses to know modules.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.models.quantize.bits import ByteTable, pack, packed_size, unpack
from lorica.models.quantize.blocks import absmax, nearest, scaled
from lorica.models.quantize.codebooks import dynamic_8bit, midpoints, normal_float
from lorica.models.quantize.formats import Format, Parts, finite32

NESTED = 256
"""Scales that share one scale of theirs under double quantisation."""
CHUNK = 2**17
"""Elements that are dequantised at a time (a multiple of every block), so that intermediates stay in the cache."""


@dataclass(frozen=True, slots=True)
class NormalFloat(Format):
    """`w ≈ v[code] · c`, c the largest magnitude of `block` neighbours (rows end to end), v the table `normal_float`.

    With `double`, the c are stored as `c ≈ d[code₂] · c₂ + mean(c)`: d is `dynamic_8bit`, c₂ the largest magnitude of
    256 differences. Bits a weight at 4 bits and block 64: 4.5, with `double` 4.127. Parts: `codes` [⌈N·bits/8⌉, 1], the
    first element in the highest bits; `absmax` float32 [M], or with `double` uint8 [M], `nested_absmax` float32
    [⌈M/256⌉] and `nested_offset`, a float32 scalar. Paper: arXiv 2305.14314.
    """

    width: int = 4
    block: int = 64
    double: bool = True

    @property
    def name(self) -> str:
        return f"nf{self.width}"

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        flat_N = finite32(weight).reshape(-1)
        scale_M = absmax(flat_N, self.block)
        codes_N = nearest(flat_N, scale_M, self.block, midpoints("nf", self.width))
        zero = 2 ** (self.width - 1) - 1  # its code, also for what is left of the last byte
        codes = {"codes": pack(codes_N, self.width, fill=zero)[:, None]}
        if not self.double:
            return {**codes, "absmax": scale_M}
        offset = scale_M.mean()
        centred_M = scale_M - offset
        nested = absmax(centred_M, NESTED)
        return {
            **codes,
            "absmax": nearest(centred_M, nested, NESTED, midpoints("dynamic")),
            "nested_absmax": nested,
            "nested_offset": offset,
        }

    def scales(self, parts: Parts) -> Tensor:
        """The scale of each block, [M] float32."""
        stored = parts["absmax"]
        if not self.double:
            return stored
        values = torch.index_select(_dynamic(stored.device), 0, stored.int())
        return scaled(values, parts["nested_absmax"], NESTED).add_(parts["nested_offset"])

    def unpack(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        codes_B, scale_M = parts["codes"].reshape(-1), self.scales(parts)
        out = torch.empty(shape, dtype=dtype, device=codes_B.device)
        flat_N, count = out.view(-1), out.numel()
        step = max(self.block, CHUNK // self.block * self.block) if codes_B.device.type == "cpu" else max(1, count)
        table = None if 8 % self.width else _table(self.width, codes_B.device)
        room = None if table is None else table.room(min(step, count + 8) * self.width // 8 + 1)
        for start in range(0, count, step):
            stop = min(start + step, count)
            part_B = codes_B[start * self.width // 8 : packed_size(stop, self.width)]
            if table is None:
                codes_n = unpack(part_B, self.width, stop - start)
                values = torch.index_select(normal_float(self.width).to(part_B.device), 0, codes_n.int())
            else:
                values = table(part_B, room)[: stop - start]
            flat_N[start:stop] = scaled(values, scale_M[start // self.block : -(-stop // self.block)], self.block)
        return out

    def sizes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        count = torch.Size(shape).numel()
        blocks = -(-count // self.block)
        sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((packed_size(count, self.width), 1), torch.uint8),
            "absmax": ((blocks,), torch.uint8 if self.double else torch.float32),
        }
        if self.double:
            sizes |= {"nested_absmax": ((-(-blocks // NESTED),), torch.float32), "nested_offset": ((), torch.float32)}
        return sizes


@functools.cache
def _table(width: int, device: torch.device) -> ByteTable:
    return ByteTable(normal_float(width).to(device), width)


@functools.cache
def _dynamic(device: torch.device) -> Tensor:
    return dynamic_8bit().to(device)
