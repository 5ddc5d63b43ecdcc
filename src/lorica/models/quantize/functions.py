"""Quantising a tensor and back, by the name of a format: what everybody but this package calls.

    packed = quantize(W, "nf4", block=64, double=False);  W_hat = packed.dense()

In: a tensor and a kind. Out: a `Packed`. Refuses to know modules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.core.errors import ConfigError, did_you_mean
from lorica.models.quantize.formats import Format, Packed
from lorica.models.quantize.normal import NormalFloat
from lorica.models.quantize.nvfp4 import NVFP4
from lorica.models.quantize.uniform import Uniform


def format_of(kind: str, *, block: int = 64, double: bool = True) -> Format:
    """The format called `nf2` … `nf4`, `uniform2` … `uniform8` or `nvfp4`. `block` and `double` are those of `nf…`.

    Raises ConfigError for an unknown kind.
    """
    formats: dict[str, Format] = {f"nf{width}": NormalFloat(width, block, double) for width in (2, 3, 4)}
    formats |= {f"uniform{width}": Uniform(width) for width in (2, 3, 4, 8)}
    formats["nvfp4"] = NVFP4()
    if kind not in formats:
        raise ConfigError(
            f"There is no quantised format {kind!r}.{did_you_mean(kind, formats) or f' There are {list(formats)}.'}"
        )
    return formats[kind]


def quantize(weight: Tensor, kind: str, *, block: int = 64, double: bool = False) -> Packed:
    """A weight in a few bits; deterministic, float32 arithmetic, on the weight's own device.

    Raises ConfigError for an unknown kind, FormatError for values that are not finite.
    """
    return packed_as(format_of(kind, block=block, double=double), weight)


def packed_as(form: Format, weight: Tensor) -> Packed:
    """A weight in a format; on the meta device, tensors of the right sizes. Raises FormatError."""
    shape = tuple(weight.shape)
    if weight.is_meta:
        return Packed(
            form, shape, {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in form.sizes(shape).items()}
        )
    return Packed(form, shape, form.pack(weight))


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that was stored, rounded once to `dtype`."""
    return packed.dense(dtype)
