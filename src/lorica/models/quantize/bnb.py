"""bitsandbytes as a second pair of hands: the same bytes, unpacked by its kernels.

In: a packed NF4 weight of ours. Out: the dequantised weight, bit for bit ours on the CPU; or a `Linear4bit` over the
same memory, and back. Optional: nothing here is imported until it is used. Refuses to quantise: our codes are exact.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn

from lorica.core.errors import MethodError, MissingError
from lorica.models.quantize.codebooks import dynamic_8bit, normal_float
from lorica.models.quantize.formats import Packed
from lorica.models.quantize.normal import NESTED, NormalFloat

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("bitsandbytes") is not None


def takes(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether bitsandbytes has the format and the dtype. Meta tensors have nothing to unpack."""
    form = packed.format
    return isinstance(form, NormalFloat) and form.width == 4 and dtype in DTYPES and not packed.parts["codes"].is_meta


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Ŵ by bitsandbytes' kernel. Raises MissingError where it is not installed.

    It is asked for one long row: of rows that are no whole number of blocks its CPU kernel (0.50.2, AVX-512) mistakes
    the scales.
    """
    flat = Packed(packed.format, (math.prod(packed.shape),), packed.parts)
    functional = _package().functional
    result: Tensor = functional.dequantize_4bit(packed.parts["codes"], quant_state=_quant_state(flat, dtype))
    return result.view(packed.shape)


def to_linear4bit(packed: Packed, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Module:
    """A `bitsandbytes.nn.Linear4bit` over the same packed memory.

    On CPUs with AVX512-BF16 bitsandbytes would repack such a weight in place in its first forward of an eval mode, and
    later gradients would be lost; that is switched off. Raises MissingError, and MethodError for another format.
    """
    package = _package()
    if not takes(packed, dtype):
        raise MethodError(f"bitsandbytes has no {packed.format.name} in {str(dtype)[6:]}.")
    out_features, in_features = packed.shape
    module: Any = package.nn.Linear4bit(in_features, out_features, bias is not None, compute_dtype=dtype, device="meta")
    weight = package.nn.Params4bit(
        packed.parts["codes"], requires_grad=False, quant_state=_quant_state(packed, dtype), bnb_quantized=True
    )
    weight.module = module
    module.weight, module.quant_state = weight, weight.quant_state
    module.support_avx512bf16_for_cpu = False
    if bias is not None:
        module.bias = bias
    result: nn.Module = module
    return result


def _quant_state(packed: Packed, dtype: torch.dtype) -> Any:
    """bitsandbytes' record of a weight's scales, over our tensors."""
    form, parts = packed.format, packed.parts
    assert isinstance(form, NormalFloat)
    make = _package().functional.QuantState
    device = parts["codes"].device
    nested: dict[str, Any] = {}
    if form.double:
        state2 = make(absmax=parts["nested_absmax"], blocksize=NESTED, code=_tables(device)[1], dtype=torch.float32)
        nested = {"offset": parts["nested_offset"], "state2": state2}
    return make(
        absmax=parts["absmax"],
        shape=torch.Size(packed.shape),
        code=_tables(device)[0],
        blocksize=form.block,
        quant_type="nf4",
        dtype=dtype,
        **nested,
    )


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of codes and of codes of scales, on a device."""
    with torch.inference_mode(False):  # they serve passes of every mode
        return normal_float(4).to(device), dynamic_8bit().to(device)


def _package() -> Any:
    if not installed():
        raise MissingError("bitsandbytes is not installed.", hint="pip install bitsandbytes, or use backend=torch.")
    import bitsandbytes

    return bitsandbytes
