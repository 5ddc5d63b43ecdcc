"""Our packed NF4 is bitsandbytes' own: bytes, scales, keys and gradients, in both directions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.core.errors import FormatError, MethodError
from lorica.models.quantize import bnb
from lorica.models.quantize.codebooks import dynamic_8bit, normal_float
from lorica.models.quantize.functions import packed_as, quantize
from lorica.models.quantize.linear import QuantizedLinear
from lorica.models.quantize.normal import NormalFloat
from lorica.models.quantize.state import from_state, to_state

pytest.importorskip("bitsandbytes")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WHOLE = [(64, 64), (48, 128), (96, 192)]
"""Shapes whose rows are whole blocks: bitsandbytes' CPU kernel reads others wrongly, see below."""


@pytest.fixture(autouse=True)
def theirs() -> Iterator[Any]:
    # it says that an optional package is absent, and compiles what takes odd shapes
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        import bitsandbytes

        yield bitsandbytes


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def test_both_tables_are_theirs_bit_for_bit(theirs: Any) -> None:
    assert torch.equal(normal_float(4), theirs.functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_8bit(), theirs.functional.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", [*WHOLE, (10, 7), (5, 65), (1, 1), (300, 257)], ids=str)
def test_codes_scales_and_values_are_theirs(
    theirs: Any, shape: tuple[int, int], block: int, dtype: torch.dtype
) -> None:
    weight = normal(*shape, dtype=dtype)
    codes, state = theirs.functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    packed = quantize(weight, "nf4", block=block)
    assert torch.equal(packed.parts["codes"], codes)
    assert torch.equal(packed.parts["absmax"], state.absmax)
    if shape[1] % block == 0 or shape[1] % 2:
        assert torch.equal(packed.dense(dtype), theirs.functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", [(64, 64), (300, 257), (1024, 768)], ids=str)
def test_scales_of_scales_are_theirs_but_where_their_cpu_kernel_is_not_the_nearest(
    theirs: Any, shape: tuple[int, int]
) -> None:
    weight = normal(*shape)
    packed = quantize(weight, "nf4", double=True)
    _, state = theirs.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed.parts["nested_offset"], state.offset)
    assert torch.equal(packed.parts["nested_absmax"], state.state2.absmax)
    ours, other = packed.parts["absmax"].int(), state.absmax.flatten().int()
    odd = (ours != other).nonzero().flatten()
    # their kernel looks values up in a table with steps of 2⁻¹⁵, so what it takes is no nearer, and hardly farther
    centred = quantize(weight, "nf4").parts["absmax"] - state.offset
    unit = centred / state.state2.absmax.repeat_interleave(256)[: len(centred)]
    far, near = ((dynamic_8bit()[codes] - unit).abs()[odd] for codes in (other, ours))
    assert len(odd) <= 0.01 * len(ours)
    assert bool((near <= far).all()) and bool((far - near < 2**-14).all())


def test_scales_of_scales_are_those_of_their_exact_path(theirs: Any) -> None:
    scales = quantize(normal(512, 512), "nf4").parts["absmax"]
    centred = scales - scales.mean()
    operators: Any = torch.ops.bitsandbytes
    codes, nested = operators.quantize_blockwise(centred.double(), dynamic_8bit(), 256)  # no kernel has float64
    packed = quantize(normal(512, 512), "nf4", double=True)
    assert torch.equal(packed.parts["absmax"], codes)
    assert torch.equal(packed.parts["nested_absmax"], nested)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [*WHOLE, (64, 96), (32, 32), (10, 7), (1, 1), (4, 48)], ids=str)
def test_their_kernel_reads_our_memory_to_the_same_bits(
    shape: tuple[int, int], double: bool, dtype: torch.dtype
) -> None:
    packed = quantize(normal(*shape, dtype=dtype), "nf4", double=double)
    assert torch.equal(bnb.dequantize(packed, dtype), packed.dense(dtype))


def test_rows_that_are_no_whole_blocks_are_what_their_own_call_gets_wrong(theirs: Any) -> None:
    """A fault of bitsandbytes 0.50.2 on CPUs with AVX-512 that `bnb.dequantize` steps around."""
    packed = quantize(normal(64, 96), "nf4")
    _, state = theirs.functional.quantize_4bit(normal(64, 96), blocksize=64, quant_type="nf4")
    direct = theirs.functional.dequantize_4bit(packed.parts["codes"], state)
    if torch.equal(direct, packed.dense()):
        pytest.skip("this build of bitsandbytes reads them rightly")
    assert (direct - normal(64, 96)).norm() > 2 * (packed.dense() - normal(64, 96)).norm()
    assert torch.equal(bnb.dequantize(packed, torch.float32), packed.dense())


def linear4bit(theirs: Any, weight: Tensor, double: bool) -> Any:
    """Their own module, quantised by them."""
    module = theirs.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=True,
        compute_dtype=weight.dtype,
        compress_statistics=double,
        quant_type="nf4",
    )
    module.weight = theirs.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double, blocksize=64
    )
    module.bias = nn.Parameter(normal(weight.shape[0], dtype=weight.dtype, seed=3))
    module.to("cpu")
    module.weight = module.weight.to("cpu") if module.weight.bnb_quantized else module.weight._quantize("cpu")
    module.support_avx512bf16_for_cpu = False
    return module


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_of_theirs_loads_into_ours_and_back(theirs: Any, dtype: torch.dtype, double: bool) -> None:
    weight = normal(48, 128, dtype=dtype)
    module = linear4bit(theirs, weight, double)
    state = module.state_dict()
    ours = QuantizedLinear(
        packed_as(NormalFloat(4, 64, False), torch.zeros(48, 128)),
        nn.Parameter(torch.zeros(48, dtype=dtype)),
        dtype=dtype,
    )
    ours.load_state_dict(state)
    x = normal(5, 128, dtype=dtype, seed=4)
    dense = theirs.functional.dequantize_4bit(module.weight, module.weight.quant_state)
    assert torch.equal(ours.dense(), dense)
    assert torch.equal(ours(x), torch.nn.functional.linear(x, dense, module.bias))
    again = ours.state_dict()
    assert set(again) == set(state)
    for key, value in again.items():
        if "quant_state" in key:
            assert _settings(value) == _settings(state[key])
        else:
            assert torch.equal(value, state[key].data.reshape(value.shape)), key


def _settings(value: Tensor) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(bytes(value.tolist()))
    return found


@pytest.mark.parametrize("double", [False, True])
def test_what_we_save_their_record_reads_to_the_same_values(theirs: Any, double: bool) -> None:
    packed = quantize(normal(48, 128), "nf4", double=double)
    state = to_state(packed, torch.float32)
    rest = {key.removeprefix("weight."): value for key, value in state.items() if key != "weight"}
    record = theirs.functional.QuantState.from_dict(rest, torch.device("cpu"))
    assert torch.equal(theirs.functional.dequantize_4bit(state["weight"], record), packed.dense())
    assert record.shape == (48, 128) and record.nested == double


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_their_module_over_our_memory_is_not_repacked_in_eval_mode(theirs: Any, dtype: torch.dtype) -> None:
    """Their first eval forward on a CPU with AVX512-BF16 repacks in place: wrong values later, and lost gradients."""
    packed = quantize(normal(64, 128, dtype=dtype), "nf4", double=True)
    module: Any = bnb.to_linear4bit(packed, None, dtype).eval()
    x = normal(3, 128, dtype=dtype, seed=2)
    with torch.no_grad():
        module(x)
    assert module.weight.data_ptr() == packed.parts["codes"].data_ptr()
    assert torch.equal(theirs.functional.dequantize_4bit(module.weight, module.weight.quant_state), packed.dense(dtype))
    leaf = x.clone().requires_grad_()
    module.train()(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.ones(3, 64, dtype=dtype) @ packed.dense(dtype), rtol=1e-2, atol=1e-2)


def test_their_backend_on_the_cpu_gives_the_same_outputs_and_gradients() -> None:
    packed = quantize(normal(40, 96), "nf4", double=True)
    found = []
    for backend in ("torch", "bitsandbytes"):
        module = QuantizedLinear(packed, None, dtype=torch.float32, backend=backend)
        x = normal(3, 96, seed=1).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        assert x.grad is not None
        found.append((y.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_formats_that_they_lack_are_refused_by_the_bridge() -> None:
    with pytest.raises(MethodError, match="no nvfp4"):
        bnb.to_linear4bit(quantize(normal(4, 16), "nvfp4"), None, torch.float32)
    assert not bnb.takes(quantize(normal(4, 16), "nf3"), torch.float32)
    assert not bnb.takes(quantize(normal(4, 16), "nf4"), torch.float64)


def test_a_damaged_state_dict_is_refused_with_what_is_wrong() -> None:
    form, packed = NormalFloat(4, 64, True), quantize(normal(48, 128), "nf4", double=True)
    state = to_state(packed, torch.float32)
    key = "weight.quant_state.bitsandbytes__nf4"
    cases = {
        "shape": {**state, key: to_state(quantize(normal(48, 64), "nf4", double=True), torch.float32)[key]},
        "is missing": {k: v for k, v in state.items() if k != "weight.nested_absmax"},
        "another table": {**state, "weight.quant_map": state["weight.quant_map"] * 1.01},
        "not as it should": {**state, key: state[key][:-3]},
        "is right": {**state, "weight.absmax": state["weight.absmax"][:-1]},
        "dense": {"weight": normal(48, 128)},
    }
    for message, damaged in cases.items():
        with pytest.raises(FormatError, match=message):
            from_state(damaged, form, (48, 128))
