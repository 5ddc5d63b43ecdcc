"""Formats of a few bits as pure functions: tables from their rules, golden bytes, exactness, errors, sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorica.core.errors import ConfigError, FormatError
from lorica.models.quantize.bits import pack, packed_size, unpack
from lorica.models.quantize.blocks import absmax, nearest, scaled
from lorica.models.quantize.codebooks import dynamic_8bit, e2m1, midpoints, normal_float
from lorica.models.quantize.functions import dequantize, format_of, quantize
from lorica.models.quantize.nvfp4 import NVFP4, encode_e2m1

NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
KINDS = ["nf4", "nf3", "nf2", "nvfp4", "uniform8", "uniform4", "uniform3", "uniform2"]
SHAPES = [(10, 7), (5, 65), (1, 1), (3, 16), (64, 64), (40, 96), (2, 3, 5)]


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, found: Tensor) -> float:
    return float((weight - found).norm() / weight.norm())


def test_the_nf4_table_follows_from_its_rule_bit_for_bit() -> None:
    assert torch.equal(normal_float(4), torch.tensor(NF4))


def test_the_decision_boundaries_are_the_published_ones() -> None:
    published = [
        *(-0.848096, -0.610633, -0.459995, -0.339679, -0.234607, -0.137912, -0.045525, 0.039790, 0.120255),
        *(0.203521, 0.292014, 0.389313, 0.501663, 0.642787, 0.861478),
    ]
    assert midpoints("nf").tolist() == pytest.approx(published, abs=1e-6)


def test_the_nf2_and_nf3_tables_follow_from_the_same_rule() -> None:
    assert normal_float(2).tolist() == pytest.approx([-1, 0, 0.33791519, 1], abs=1e-7)
    wanted = [-1, -0.47862916, -0.21714182, 0, 0.16093017, 0.33791519, 0.56261697, 1]
    assert normal_float(3).tolist() == pytest.approx(wanted, abs=1e-7)


def test_the_dynamic_map_is_sorted_with_one_zero_and_an_open_lower_end() -> None:
    values = dynamic_8bit()
    assert len(values) == 256 and bool((values.diff() > 0).all())
    assert values[-1] == 1 and values[127] == 0
    assert float(values[0]) == pytest.approx(-0.99297, abs=1e-5)
    assert torch.equal(values[:127], -values[128:255].flip(0))


def test_golden_bytes_of_nf4() -> None:
    block = [1, -1, -0.85, -0.8, -0.5, -0.3, -0.2, -0.1, -0.05, -0.04, 0, 0.03, 0.05, 0.2, 0.4, 0.7]
    packed = quantize(torch.tensor(block + [0.0] * 48), "nf4")
    assert packed.parts["codes"].flatten().tolist() == list(bytes.fromhex("f00124566777 89ce") + b"\x77" * 24)
    assert packed.parts["absmax"].tolist() == [1.0]


def test_golden_bytes_of_nvfp4() -> None:
    row = torch.arange(1.0, 17.0)
    packed = quantize(torch.cat([row, row / 4])[None], "nvfp4")
    assert float(packed.parts["tensor_scale"]) == pytest.approx(0.0059523810, abs=1e-9)
    assert packed.parts["scale"].float().tolist() == [[448.0, 112.0]]
    assert packed.parts["codes"].tolist() == [[33, 50, 68, 85, 101, 102, 118, 119] * 2]
    first = 4 / 3 * torch.tensor([1, 2, 2, 3, 4, 4, 6, 6, 6, 8, 8, 8, 8, 12, 12, 12.0])
    torch.testing.assert_close(packed.dense(), torch.cat([first, first / 4])[None], rtol=1e-6, atol=0)


def test_e2m1_rounds_ties_to_the_even_code_and_saturates() -> None:
    assert e2m1()[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e9])
    for sign in (1.0, -1.0):
        found = e2m1()[encode_e2m1(sign * ties).long()]
        assert found.tolist() == [sign * v for v in (0.0, 1, 1, 2, 2, 4, 4, 6, 6)]
    below, above = torch.nextafter(ties[:7], ties.new_tensor(0)), torch.nextafter(ties[:7], ties.new_tensor(9.0))
    assert e2m1()[encode_e2m1(below).long()].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4]
    assert e2m1()[encode_e2m1(above).long()].tolist() == [0.5, 1, 1.5, 2, 3, 4, 6]
    assert torch.equal(encode_e2m1(e2m1()), torch.arange(16, dtype=torch.uint8)), "each value has its own code"


def test_nvfp4_gives_its_own_output_again_under_the_same_tensor_scale() -> None:
    weight = normal(24, 80)
    packed = quantize(weight, "nvfp4")
    again = NVFP4().pack(packed.dense(), packed.parts["tensor_scale"])
    assert torch.equal(again["codes"], packed.parts["codes"])
    assert torch.equal(again["scale"].view(torch.uint8), packed.parts["scale"].view(torch.uint8))


def test_the_largest_block_scale_of_nvfp4_is_448_and_zeros_stay_zeros() -> None:
    assert quantize(normal(8, 64), "nvfp4").parts["scale"].float().max() == 448
    assert not quantize(torch.zeros(4, 20), "nvfp4").dense().any()


def test_nvfp4_errors_on_normal_weights_are_the_known_ones() -> None:
    weight = normal(512, 512)
    assert error(weight, quantize(weight, "nvfp4").dense()) == pytest.approx(0.0955, abs=0.0015)
    single = NVFP4(two_level=False)
    found = single.unpack(single.pack(weight), (512, 512))
    assert error(weight, found) == pytest.approx(0.0950, abs=0.001)


@pytest.mark.parametrize("double", [False, True])
def test_nf4_error_on_normal_weights_is_the_known_one(double: bool) -> None:
    weight = normal(1024, 1024)
    found = quantize(weight, "nf4", double=double).dense()
    assert error(weight, found) == pytest.approx(0.0920, abs=0.0006)
    assert float((weight - found).square().mean()) == pytest.approx(0.00848, abs=0.0001)


def test_uniform_and_e2m1_levels_in_blocks_are_worse_than_nf4() -> None:
    flat = normal(2**18)
    scale = absmax(flat, 64)
    for table, wanted in ((torch.linspace(-1, 1, 16), 0.1008), ((e2m1() / 6).sort().values, 0.1057)):
        codes = nearest(flat, scale, 64, (table[:-1] + table[1:]) / 2)
        assert error(flat, scaled(table[codes.long()], scale, 64)) == pytest.approx(wanted, abs=0.001)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("half", [False, True])
def test_quantising_a_dequantised_weight_gives_the_same_codes_and_scales(width: int, half: bool) -> None:
    packed = quantize(normal(100, 64, std=0.05), f"nf{width}")
    dense = packed.dense().bfloat16().float() if half else packed.dense()
    again = quantize(dense, f"nf{width}")
    assert torch.equal(again.parts["codes"], packed.parts["codes"])
    if not half:
        assert torch.equal(again.parts["absmax"], packed.parts["absmax"])


def test_the_scale_of_a_weight_is_the_scale_of_its_quantised_form_but_its_sign_is_not() -> None:
    weight = normal(32, 64)
    packed = quantize(weight, "nf4")
    for factor in (2.0**-20, 0.25, 1024.0):  # powers of two, so that nothing rounds
        other = quantize(factor * weight, "nf4")
        assert torch.equal(other.parts["codes"], packed.parts["codes"])
        assert torch.equal(other.dense(), factor * packed.dense())
    assert not torch.equal(quantize(-weight, "nf4").dense(), -packed.dense())


@given(st.integers(1, 300), st.sampled_from([32, 64, 128]), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_largest_magnitude_of_every_block_is_exact(count: int, block: int, seed: int) -> None:
    weight = normal(count, seed=seed)
    packed = quantize(weight, "nf4", block=block)
    found = packed.dense()
    for start in range(0, count, block):
        part = weight[start : start + block]
        assert found[start + part.abs().argmax()] == part[part.abs().argmax()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_round_trips_and_takes_the_bytes_that_the_formula_says(kind: str, shape: tuple[int, ...]) -> None:
    weight = normal(*shape, std=0.1)
    for double in (False, True):
        packed = quantize(weight, kind, double=double)
        assert dequantize(packed).shape == shape
        assert packed.nbytes == packed.format.nbytes(shape)
        assert {n: (tuple(t.shape), t.dtype) for n, t in packed.parts.items()} == packed.format.sizes(shape)
        assert torch.equal(dequantize(packed, torch.float64), dequantize(packed).double())
        assert torch.equal(dequantize(packed, torch.bfloat16), dequantize(packed).bfloat16())
        assert error(weight, dequantize(packed)) < 0.75


def test_bits_a_weight_are_the_published_ones() -> None:
    count = 4096 * 4096
    bits = {kind: 8 * format_of(kind).nbytes((4096, 4096)) / count for kind in KINDS}
    assert bits["nf4"] == pytest.approx(4.127, abs=1e-3)
    assert 8 * format_of("nf4", double=False).nbytes((4096, 4096)) / count == 4.5
    assert bits["nvfp4"] == pytest.approx(4.5, abs=1e-4)
    assert bits["uniform3"] == pytest.approx(3.0, abs=1e-4)


@given(st.integers(1, 8), st.integers(0, 50), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_codes_of_any_width_come_back_from_their_bytes(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    stored = pack(codes, bits)
    assert stored.numel() == packed_size(count, bits)
    assert torch.equal(unpack(stored, bits, count), codes)


def test_the_first_code_is_in_the_high_bits_or_with_low_first_in_the_low_ones() -> None:
    codes = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [0x12, 0x30]
    assert pack(codes, 4, fill=7).tolist() == [0x12, 0x37]
    assert pack(codes, 4, low_first=True).tolist() == [0x21, 0x03]
    assert pack(codes, 2).tolist() == [0b01101100]
    with pytest.raises(ConfigError, match="high bits first"):
        pack(codes, 3, low_first=True)


def test_an_all_zero_block_is_code_seven_with_scale_zero() -> None:
    packed = quantize(torch.zeros(2, 64), "nf4")
    assert set(packed.parts["codes"].flatten().tolist()) == {0x77}
    assert packed.parts["absmax"].tolist() == [0.0, 0.0]
    mixed = quantize(torch.cat([torch.zeros(64), normal(640)]), "nf4", double=True)
    assert not mixed.dense()[:64].any(), "its scale is off under double quantisation, and stands before zeros"


def test_uniform_levels_span_the_clipped_range_end_to_end() -> None:
    weight = normal(256, 256)
    for width in (2, 3, 4, 8):
        levels = quantize(weight, f"uniform{width}").dense().unique()
        reach = 2 * weight.std()
        assert len(levels) == 2**width
        torch.testing.assert_close(levels.diff(), torch.full((2**width - 1,), float(levels[1] - levels[0])))
        assert float(levels[0]) == pytest.approx(float(weight.mean() - reach), abs=1e-5)
        assert float(levels[-1]) == pytest.approx(float(weight.mean() + reach), abs=1e-5)
    assert torch.equal(quantize(torch.full((3, 3), 0.5), "uniform4").dense(), torch.full((3, 3), 0.5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(kind: str, bad: float) -> None:
    weight = normal(4, 64)
    weight[1, 2] = bad
    with pytest.raises(FormatError, match="NaN or infinity"):
        quantize(weight, kind)


def test_an_unknown_kind_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match="nf4"):
        quantize(normal(4, 4), "nf5")


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_device_gets_tensors_of_the_right_sizes(kind: str) -> None:
    packed = quantize(torch.empty(6, 40, device="meta"), kind)
    assert packed.nbytes == packed.format.nbytes((6, 40)) and all(t.is_meta for t in packed.parts.values())


def test_a_view_in_another_order_is_read_row_by_row() -> None:
    weight = normal(40, 33)
    for kind in KINDS:
        assert torch.equal(quantize(weight.T, kind).dense(), quantize(weight.T.contiguous(), kind).dense())
