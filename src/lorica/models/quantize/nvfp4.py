"""NVFP4: four-bit floats in blocks of 16 along the input, an 8-bit float a block, one float32 scale a tensor.

In: a weight [O, I]. Out: packed codes (first element in the low bits), block scales, tensor scale; arithmetic of the
published format, exact in float32. Refuses to know modules and hardware.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.models.quantize.bits import ByteTable, pack
from lorica.models.quantize.codebooks import E2M1, e2m1
from lorica.models.quantize.formats import Format, Parts, finite32

BLOCK = 16
LARGEST = E2M1[-1]
SCALE_LARGEST = 448.0
"""Largest E4M3 value."""
SCALE_SMALLEST = 2.0**-6
"""Smallest normal E4M3 value; the format has no smaller block scale."""


def encode_e2m1(values: Tensor) -> Tensor:
    """Codes of the nearest E2M1 values, uint8: ties go to the even code, 6 is the largest, bit 3 is the sign."""
    size = values.abs().contiguous()
    # at these bounds the even neighbour is the lower one; at the others it is the upper one
    down, up = (torch.tensor(b, device=values.device) for b in ((0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)))
    codes = torch.bucketize(size, down, out_int32=True) + torch.bucketize(size, up, out_int32=True, right=True)
    return (codes | torch.signbit(values).int() << 3).to(torch.uint8)


@dataclass(frozen=True, slots=True)
class NVFP4(Format):
    """`w ≈ e2m1[code] · s_b · t`: `t = amax / (448 · 6)`, `s_b = E4M3(clamp(amax_b / (6t), 2⁻⁶, 448))`.

    With `two_level=False` t is 1. Rows are filled up to whole blocks with zeros. 4.5 bits a weight. Parts: `codes`
    uint8 [O, 8·⌈I/16⌉], `scale` float8_e4m3fn [O, ⌈I/16⌉], `tensor_scale` a float32 scalar. An all-zero weight has t =
    1. Used by QeRL (arXiv 2510.11696).
    """

    two_level: bool = True

    @property
    def name(self) -> str:
        return "nvfp4"

    def pack(self, weight: Tensor, tensor_scale: Tensor | None = None) -> dict[str, Tensor]:
        """The stored tensors; `tensor_scale` fixes t, so that a weight of this format gives its own codes again."""
        wide = finite32(weight)
        flat_OI = wide.reshape(wide.shape[0] if wide.ndim else 1, -1)
        blocks_OMK = torch.nn.functional.pad(flat_OI, (0, -flat_OI.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        amax_OM = blocks_OMK.abs().amax(2)
        if tensor_scale is None:
            tensor_scale = amax_OM.max() / (SCALE_LARGEST * LARGEST)
            if not self.two_level or tensor_scale == 0:
                tensor_scale = torch.ones_like(tensor_scale)
        wanted = (amax_OM / LARGEST / tensor_scale).clamp(SCALE_SMALLEST, SCALE_LARGEST)
        scale_OM = wanted.to(torch.float8_e4m3fn)
        codes = encode_e2m1(blocks_OMK / (scale_OM.float() * tensor_scale)[:, :, None])
        packed_OB = pack(codes, 4, low_first=True).view(flat_OI.shape[0], -1)
        return {"codes": packed_OB, "scale": scale_OM, "tensor_scale": tensor_scale}

    def unpack(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        codes_OB, scale_OM = parts["codes"], parts["scale"].float() * parts["tensor_scale"]
        rows, columns = codes_OB.shape[0], torch.Size(shape).numel() // max(1, codes_OB.shape[0])
        values = _table(codes_OB.device)(codes_OB.reshape(-1)).view(rows, -1, BLOCK)
        return values.mul_(scale_OM[:, :, None]).view(rows, -1)[:, :columns].to(dtype).reshape(shape)

    def sizes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows = shape[0]
        blocks = -(-(torch.Size(shape).numel() // rows) // BLOCK)
        return {
            "codes": ((rows, blocks * BLOCK // 2), torch.uint8),
            "scale": ((rows, blocks), torch.float8_e4m3fn),
            "tensor_scale": ((), torch.float32),
        }


@functools.cache
def _table(device: torch.device) -> ByteTable:
    return ByteTable(e2m1().to(device), 4, low_first=True)
