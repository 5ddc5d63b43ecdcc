"""Directions as maths: token-weighted streaming means, differences, cosines, steering, projections, controls, files."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.adapters.analysis.directions import (
    Directions,
    RunningMean,
    cosines,
    mean_difference,
    projected_out,
    random_like,
    steered,
    turned,
)
from lorica.adapters.analysis.directions_files import load_directions, save_directions
from lorica.core.errors import ConfigError, DataError, FormatError, MethodError, MismatchError, MissingError

WIDTH = 12


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def means(*rows):
    return {0: RunningMean(rows[0].shape[-1]).add(torch.cat([r.reshape(-1, r.shape[-1]) for r in rows]))}


def some(seed=0, layers=(0, 1)):
    return Directions({layer: noise(WIDTH, seed=seed + layer) for layer in layers}, {"base": {"fingerprint": "f"}})


def test_a_mean_is_over_tokens_and_not_over_answers():
    """One answer of one token of 2, and one of three tokens of 6: 5, and not 4."""
    mean = RunningMean(1)
    for answer in (torch.full((1, 1), 2.0), torch.full((3, 1), 6.0)):
        mean.add(answer)
    assert mean.mean.item() == 5.0 and mean.count == 4


@given(cuts=st.lists(st.integers(1, 59), max_size=6), seed=st.integers(0, 99))
def test_a_mean_in_shards_is_the_mean_in_one_go(cuts, seed):
    h_ND, edges = noise(60, WIDTH, seed=seed), sorted({0, *cuts, 60})
    whole = RunningMean(WIDTH).add(h_ND)
    shards = [RunningMean(WIDTH).add(h_ND[a:b]) for a, b in pairwise(edges)]
    one = RunningMean(WIDTH)
    for a, b in pairwise(edges):
        one.add(h_ND[a:b])
    joined = sum(shards[::-1], RunningMean(WIDTH))
    for found in (one, joined):
        assert found.count == 60
        torch.testing.assert_close(found.mean, whole.mean, rtol=0, atol=1e-14)


def test_a_long_run_of_half_precision_states_loses_nothing():
    """65,536 states of 1 + 2⁻⁷ in bfloat16: a sum in their own dtype would stop at 256."""
    mean, value = RunningMean(1), torch.tensor([[1 + 2**-7]], dtype=torch.bfloat16)
    for _ in range(16):
        mean.add(value.expand(4096, 1))
    assert mean.mean.item() == 1 + 2**-7


def test_only_the_tokens_of_the_mask_count_and_none_is_an_error():
    h_ND, mask_N = noise(5, WIDTH), torch.tensor([True, False, False, True, False])
    torch.testing.assert_close(RunningMean(WIDTH).add(h_ND, mask_N).mean, h_ND[[0, 3]].mean(0))
    with pytest.raises(DataError, match="No token was counted"):
        _ = RunningMean(WIDTH).add(h_ND, torch.zeros(5, dtype=torch.bool)).mean
    with pytest.raises(MethodError, match="NaN or infinity"):
        RunningMean(2).add(torch.tensor([[0.0, float("inf")]]))


def test_a_difference_is_antisymmetric_and_zero_for_equal_sides():
    first, second = means(noise(7, WIDTH)), means(noise(4, WIDTH, seed=1))
    forth, back = mean_difference(first, second), mean_difference(second, first)
    assert torch.equal(forth.vectors[0], -back.vectors[0])
    assert not mean_difference(first, first).vectors[0].any()
    with pytest.raises(MismatchError, match=r"layers \[0\], the second of \[1\]"):
        mean_difference(first, {1: second[0]})


def test_a_projection_is_idempotent_leaves_nothing_along_it_and_spares_what_is_orthogonal():
    directions, h = some(), noise(3, 5, WIDTH, seed=3)
    unit = directions.unit(0)
    once = projected_out(h, unit)
    assert (once @ unit).abs().max() < 1e-15
    torch.testing.assert_close(projected_out(once, unit), once, rtol=0, atol=1e-15)
    torch.testing.assert_close(projected_out(once + 7 * unit, unit), once, rtol=0, atol=1e-14)


@given(kappa=st.floats(-20, 20))
def test_steering_forth_and_back_is_the_identity(kappa):
    h, v = noise(4, WIDTH), noise(WIDTH, seed=1)
    torch.testing.assert_close(steered(steered(h, v, kappa), v, -kappa), h, rtol=0, atol=1e-13)
    assert torch.equal(steered(h, v, 0.0), h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_keep_their_dtype_and_are_rounded_once(dtype):
    h, v = noise(4, WIDTH, dtype=torch.float32).to(dtype), noise(WIDTH, seed=1)
    wide = h.float()
    assert torch.equal(steered(h, v, 3.0), (wide + 3.0 * v.float()).to(dtype))
    unit = (v / v.norm()).float()
    assert torch.equal(projected_out(h, unit), (wide - (wide @ unit)[:, None] * unit).to(dtype))


@given(epsilon=st.floats(0, 1), seed=st.integers(0, 99))
def test_turning_keeps_the_norm_and_goes_as_far_as_asked(epsilon, seed):
    x = noise(3, WIDTH, seed=seed)
    found = turned(x, epsilon, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(found, x, dim=-1)
    torch.testing.assert_close(cosine, torch.full_like(cosine, (1 - epsilon**2) ** 0.5), rtol=0, atol=1e-7)


def test_nothing_turned_is_itself_and_zero_stays_zero():
    x, rng = noise(3, WIDTH), torch.Generator()
    assert torch.equal(turned(x, 0.0, rng), x)
    assert not turned(torch.zeros(WIDTH), 1.0, rng).any()
    with pytest.raises(MethodError, match="epsilon is 1.5"):
        turned(x, 1.5, rng)
    with pytest.raises(MethodError, match="one element"):
        turned(x[:, :1], 0.5, rng)


def test_random_directions_are_as_long_and_depend_on_seed_and_layer_alone():
    directions = some(layers=(0, 1, 5))
    control = random_like(directions, 3)
    assert control.norms() == pytest.approx(directions.norms())
    assert torch.equal(random_like(directions.only([5]), 3).vectors[5], control.vectors[5])
    assert not torch.equal(random_like(directions, 4).vectors[5], control.vectors[5])
    assert control.about["random"] == 3 and control.base == "f"


def test_cosines_are_of_all_pairs_at_the_layers_that_all_have():
    first, second = some(layers=(0, 1, 2)), some(seed=9, layers=(1, 2, 3))
    opposite = Directions({n: -3 * v for n, v in first.vectors.items()})
    found = cosines([first, second, opposite])
    assert sorted(found) == [1, 2]
    expected = torch.nn.functional.cosine_similarity(first.vectors[1], second.vectors[1], dim=0)
    assert found[1][0, 1] == pytest.approx(expected.item()) and found[1][0, 2] == pytest.approx(-1.0)
    assert torch.equal(found[2], found[2].T)
    for wrong, said in (([first, some(layers=(7,))], "no layer in common"), ([], "no layer in common"),
                        ([first, Directions({0: torch.ones(3)})], r"widths \[3, 12\]")):  # fmt: skip
        with pytest.raises(MismatchError, match=said):
            cosines(wrong)
    with pytest.raises(MismatchError, match="of different bases: f, g"):
        cosines([first, Directions(first.vectors, {"base": {"fingerprint": "g"}})])
    with pytest.raises(MethodError, match="layer 0 is zero"):
        cosines([first, Directions({0: torch.zeros(WIDTH)})])


def test_a_layer_that_is_not_there_and_vectors_that_are_none_are_one_sentence():
    with pytest.raises(MethodError, match="no direction of layer 4; the layers are 0, 1"):
        some().only([0, 4])
    for vectors in ({}, {2: torch.tensor([1.0, float("nan")])}, {2: torch.ones(2, 2)}):
        with pytest.raises(MethodError, match="Directions are vectors of finite values"):
            Directions(vectors)


def test_a_folder_gives_the_same_directions_back_bit_for_bit(tmp_path):
    directions = Directions(some().vectors, {"settings": {"header_in_answer": False}, "base": {"fingerprint": "f"}})
    found = load_directions(save_directions(directions, tmp_path / "d"))
    assert found.layers == (0, 1) and found.about == directions.about
    assert all(torch.equal(found.vectors[n], directions.vectors[n]) for n in found.layers)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["directions.json", "directions.safetensors"]


def test_a_folder_that_is_absent_or_broken_is_one_sentence(tmp_path):
    with pytest.raises(MissingError, match="no directions at"):
        load_directions(tmp_path)
    path = save_directions(some(), tmp_path / "d")
    record = json.loads((path / "directions.json").read_text())
    for changed, said in (
        ({"format": 9}, "format 9"),
        ({"layers": [0]}, "does not describe"),
        ({"about": 3}, "does not"),
    ):
        (path / "directions.json").write_text(json.dumps({**record, **changed}))
        with pytest.raises(FormatError, match=said):
            load_directions(path)
    (path / "directions.json").write_text(json.dumps(record))
    (path / "directions.safetensors").write_bytes(b"short")
    with pytest.raises(FormatError, match="corrupt"):
        load_directions(path)
    with pytest.raises(ConfigError, match=r"directions\.json"):
        save_directions(Directions(some().vectors, {"x": {1, 2}}), tmp_path / "e")
