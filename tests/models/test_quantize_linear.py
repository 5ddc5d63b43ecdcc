"""The packed linear module: the dense one's outputs and gradients, packed bytes alone in memory and between passes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.models.quantize.functions import format_of, packed_as
from lorica.models.quantize.linear import QuantizedLinear

KINDS = ["nf4", "nf3", "nf2", "nvfp4", "uniform4", "uniform3"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(
    kind: str = "nf4", dtype: torch.dtype = torch.float32, *, bias: bool = True, shape: tuple[int, int] = (24, 80)
) -> QuantizedLinear:
    packed = packed_as(format_of(kind), normal(*shape))
    own = nn.Parameter(normal(shape[0], dtype=dtype, seed=1)) if bias else None
    return QuantizedLinear(packed, own, dtype=dtype).requires_grad_(False)


def bits(module: QuantizedLinear) -> dict[str, Tensor]:
    return {name: part.reshape(-1).view(torch.uint8).clone() for name, part in module.packed.parts.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_input_gradients_are_those_of_the_dequantised_weight(
    kind: str, dtype: torch.dtype, bias: bool
) -> None:
    module = made(kind, dtype, bias=bias)
    x = normal(2, 5, 80, dtype=dtype, seed=2).requires_grad_()
    dy = normal(2, 5, 24, dtype=dtype, seed=3)
    y = module(x)
    y.backward(dy)
    assert torch.equal(y, F.linear(x, module.dense(), module.bias))
    assert torch.equal(x.grad, dy @ module.dense())  # type: ignore[arg-type]
    assert list(module.parameters()) == ([] if module.bias is None else [module.bias])


def test_no_gradient_reaches_weight_or_bias_and_no_bit_changes() -> None:
    module = made()
    before = bits(module)
    x = normal(3, 80).requires_grad_()
    module(x).square().sum().backward()
    assert module.weight.grad is None and not module.weight.requires_grad
    assert all(p.grad is None for p in module.parameters())
    assert same(bits(module), before)


def test_only_packed_tensors_are_saved_between_the_passes() -> None:
    module = made(shape=(64, 64))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(normal(3, 64).requires_grad_())
    held = {part.data_ptr() for part in module.packed.parts.values()}
    assert saved and all(tensor.data_ptr() in held for tensor in saved)


def test_a_weight_that_changes_between_forward_and_backward_is_noticed() -> None:
    module = made()
    y = module(normal(3, 80).requires_grad_()).sum()
    module.store(normal(24, 80, seed=9))
    with pytest.raises(RuntimeError, match="inplace"):
        y.backward()


def test_derivatives_of_the_gradient_exist() -> None:
    module = made(dtype=torch.float64, shape=(6, 16))

    def energy(x: Tensor) -> Any:
        return torch.tanh(module(x))

    x = normal(2, 16, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(energy, (x,))
    assert torch.autograd.gradgradcheck(energy, (x,))


def test_x_of_another_dtype_is_cast_and_the_result_cast_back() -> None:
    module = made(dtype=torch.bfloat16)
    x = normal(3, 80).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.dtype == torch.float32 and x.grad is not None and x.grad.dtype == torch.float32
    assert torch.equal(y, F.linear(x.bfloat16(), module.dense(), module.bias).float())


def test_under_autocast_it_is_a_dense_linear_under_autocast() -> None:
    module = made()
    dense = nn.Linear(80, 24)
    with torch.no_grad():
        dense.weight.copy_(module.dense())
        dense.bias.copy_(module.bias)
    found = []
    for layer in (module, dense):
        x = normal(3, 80).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        found.append((y.detach(), x.grad))
    assert found[0][0].dtype == torch.bfloat16
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["nf4", "nvfp4", "uniform3"])
def test_a_change_of_dtype_changes_the_rounding_and_no_stored_bit(kind: str) -> None:
    module = made(kind)
    before, dense = bits(module), module.dense()
    for cast in (module.half, module.bfloat16, lambda: module.to(torch.bfloat16), module.float, module.double):
        cast()
        assert same(bits(module), before)
        assert module.weight.dtype == module.dtype == module.bias.dtype
        assert torch.equal(module.dense(), dense.to(module.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_state_dicts_hold_the_same_bits(kind: str) -> None:
    module = made(kind)
    other = QuantizedLinear(
        packed_as(format_of(kind), torch.zeros(24, 80)), nn.Parameter(torch.zeros(24)), dtype=torch.float32
    )
    other.load_state_dict(module.state_dict())
    stored = io.BytesIO()
    torch.save(module, stored)  # plain pickle cannot hold torch's 8-bit floats
    stored.seek(0)
    for found in (copy.deepcopy(module), torch.load(stored, weights_only=False), other):
        assert same(bits(found), bits(module)) and torch.equal(found.bias, module.bias)
        assert found.packed.parts["codes"].data_ptr() != module.packed.parts["codes"].data_ptr()


def test_the_keys_of_nf4_are_those_of_bitsandbytes_and_of_nvfp4_those_of_modelopt() -> None:
    assert list(made("nf4").state_dict()) == [
        *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *("weight.quant_state.bitsandbytes__nf4", "bias"),
    ]
    assert list(made("nvfp4").state_dict())[:3] == ["weight", "weight_scale", "weight_scale_2"]
    assert made("nf4").state_dict()["weight"].shape == (24 * 80 // 2, 1)


def test_a_state_dict_of_something_else_is_refused() -> None:
    module = made("nf4")
    for state, message in (
        ({"weight": normal(24, 80), "bias": normal(24)}, "dense"),
        (made("nvfp4").state_dict(), "missing"),
        (made("nf4", shape=(24, 64)).state_dict(), "shape"),
        ({"bias": normal(24)}, "Missing key"),
    ):
        before = bits(module)
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict(state)
        assert same(bits(module), before)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_the_formula_and_a_fraction_of_bf16(kind: str) -> None:
    module = made(kind, torch.bfloat16, bias=False, shape=(256, 512))
    held = sum(t.numel() * t.element_size() for t in module.buffers()) + sum(p.numel() for p in module.parameters())
    assert held == module.form.nbytes((256, 512)) == module.packed.nbytes
    assert held < 0.29 * 2 * 256 * 512


def test_store_quantises_another_weight_in_place() -> None:
    module, weight = made("nf4"), normal(24, 80, seed=5)
    places = {name: part.data_ptr() for name, part in module.packed.parts.items()}
    module.store(weight)
    assert torch.equal(module.dense(), packed_as(format_of("nf4"), weight).dense())
    assert {name: part.data_ptr() for name, part in module.packed.parts.items()} == places


def test_a_module_moves_to_the_meta_device_and_is_made_empty_from_it() -> None:
    module = made("nf4").to("meta")
    assert module.device.type == "meta" and module.weight.is_meta and module(torch.empty(2, 80, device="meta")).is_meta
    empty = module.to_empty(device="cpu")
    assert {n: (t.shape, t.dtype) for n, t in empty.packed.parts.items()} == {
        n: (t.shape, t.dtype) for n, t in made("nf4").packed.parts.items()
    }


def test_one_that_stands_for_a_conv1d_shows_its_weight_transposed() -> None:
    packed = packed_as(format_of("nf4"), normal(24, 80))
    module = QuantizedLinear(packed, None, dtype=torch.float32, transposed=True)
    assert module.weight.shape == (80, 24) and module.dense().shape == (24, 80)
    assert module(normal(3, 80)).shape == (3, 24)
