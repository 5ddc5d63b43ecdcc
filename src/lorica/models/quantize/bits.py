"""Codes of a few bits in bytes, and back.

In: unsigned codes, one an element. Out: a stream of bytes without padding between codes. Refuses to know what a code
means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.core.errors import ConfigError

WORD = 8
"""Codes that are packed together: `WORD` of them fill whole bytes at any width."""


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: `⌈count · bits / 8⌉`."""
    return -(-count * bits // 8)


def pack(codes_N: Tensor, bits: int, *, low_first: bool = False, fill: int = 0) -> Tensor:
    """Codes below `2^bits`, [N] uint8, as `packed_size(N, bits)` bytes.

    The first code takes the highest bits of its byte; with `low_first` (two or four codes a byte only) the lowest. What
    is left of the last byte holds the code `fill`. Raises ConfigError for a width that is not 1 to 8.
    """
    _check(bits, low_first)
    count = codes_N.numel()
    if bits == 8:
        return codes_N.reshape(-1).to(torch.uint8)
    if 8 % bits == 0:
        per_byte = 8 // bits
        fields = _padded(codes_N.reshape(-1), per_byte, fill).view(-1, per_byte)
        out_B = torch.zeros_like(fields[:, 0])
        for place, shift in enumerate(_shifts(bits, low_first)):
            out_B |= fields[:, place] << shift
        return out_B
    words = _padded(codes_N.reshape(-1), WORD, fill).view(-1, WORD).long()
    word_M = sum((words[:, k] << bits * (WORD - 1 - k) for k in range(WORD)), torch.zeros_like(words[:, 0]))
    parts = [(word_M >> 8 * (bits - 1 - k)) & 0xFF for k in range(bits)]
    return torch.stack(parts, dim=1).to(torch.uint8).reshape(-1)[: packed_size(count, bits)].clone()


def unpack(bytes_B: Tensor, bits: int, count: int, *, low_first: bool = False) -> Tensor:
    """The `count` codes that `pack` wrote, [count] uint8."""
    _check(bits, low_first)
    flat_B = bytes_B.reshape(-1)
    if bits == 8:
        return flat_B[:count]
    if 8 % bits == 0:
        fields = [(flat_B >> shift) & (2**bits - 1) for shift in _shifts(bits, low_first)]
        return torch.stack(fields, dim=1).reshape(-1)[:count]
    words = _padded(flat_B, bits).view(-1, bits).long()
    word_M = sum((words[:, k] << 8 * (bits - 1 - k) for k in range(bits)), torch.zeros_like(words[:, 0]))
    codes = [(word_M >> bits * (WORD - 1 - k)) & (2**bits - 1) for k in range(WORD)]
    return torch.stack(codes, dim=1).to(torch.uint8).reshape(-1)[:count]


def byte_table(values_K: Tensor, bits: int, *, low_first: bool = False) -> Tensor:
    """What each byte stands for, [256, 8 / bits], where code k stands for `values_K[k]`: unpacking by one lookup."""
    every = torch.arange(256, dtype=torch.uint8, device=values_K.device)
    per_byte = 8 // bits
    return values_K[unpack(every, bits, 256 * per_byte, low_first=low_first).long()].view(256, per_byte)


class ByteTable:
    """Looking up the values of bytes: `values_K[code]` of every code in them, end to end, float32."""

    def __init__(self, values_K: Tensor, bits: int, *, low_first: bool = False) -> None:
        table = byte_table(values_K, bits, low_first=low_first)
        self.per_byte = table.shape[1]
        # as one wide element a byte, which torch gathers several times as fast as a row
        self._wide = table.view(torch.int64 if self.per_byte == 2 else torch.complex128).flatten()

    def __call__(self, bytes_B: Tensor, scratch: Tensor | None = None) -> Tensor:
        """The values, in `scratch` (`room`) where that is given: fresh memory costs more than the gathering."""
        found = None if scratch is None else scratch[: bytes_B.numel()]
        return torch.index_select(self._wide, 0, bytes_B.int(), out=found).view(torch.float32)

    def room(self, count: int) -> Tensor:
        """Scratch memory for the values of `count` bytes."""
        return self._wide.new_empty(count)


def _shifts(bits: int, low_first: bool) -> list[int]:
    """By how many bits each code of a byte is shifted, first code first."""
    shifts = list(range(0, 8, bits))
    return shifts if low_first else shifts[::-1]


def _padded(flat: Tensor, multiple: int, fill: int = 0) -> Tensor:
    short = -flat.numel() % multiple
    return torch.nn.functional.pad(flat, (0, short), value=fill) if short else flat


def _check(bits: int, low_first: bool) -> None:
    if not 1 <= bits <= 8:
        raise ConfigError(f"A code has 1 to 8 bits, not {bits}.")
    if low_first and 8 % bits:
        raise ConfigError(f"Codes of {bits} bits cross bytes, so they are stored high bits first.")
