"""How many components hold a share of a change's variance: known spectra, invariances, the short way for factors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.adapters.analysis.spectrum import components_for, components_of, count_for, singular_values
from lorica.core.errors import MethodError
from lorica.core.update import LinearUpdate
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import tiny
from tests.methods.one import SITE, hosted, linear, matrix, same


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(matrix(size, size, seed=seed)).Q


@pytest.mark.parametrize(
    ("values", "count"), [((3, 1, 1), 2), ((1,) * 10, 9), ((3, 0.5, 0.5), 1), ((1,), 1), ((0, 0), 0), ((2, 0, 0), 1)]
)
def test_known_spectra_have_their_counts(values: tuple[float, ...], count: int) -> None:
    assert count_for(torch.tensor(values)) == count
    assert components_for(torch.diag(torch.tensor(values, dtype=torch.float64))) == count


@pytest.mark.parametrize("noise", [0.0, 1e-4])
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_a_matrix_of_known_rank_keeps_its_count_under_small_noise(rank: int, noise: float) -> None:
    u, v = orthogonal(64, 1), orthogonal(48, 2)
    change = u[:, :rank] @ v[:rank] + noise * matrix(64, 48, seed=3)
    assert components_for(change, 0.999) == rank
    assert components_for(change) == math.ceil(0.9 * rank)


def test_noise_alone_takes_most_components() -> None:
    assert components_for(matrix(64, 48)) > 24


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=12),
    st.floats(0.01, 1.0),
    st.integers(0, 1000),
    st.floats(1e-6, 1e6),
)
@settings(max_examples=60, deadline=None)
def test_the_count_is_the_smallest_that_reaches_the_share_and_bears_scale_and_rotation(
    values: list[float], share: float, seed: int, factor: float
) -> None:
    spectrum = torch.tensor(values, dtype=torch.float64)
    count = count_for(spectrum, share)
    energy = spectrum.square().sort(descending=True).values
    total = float(energy.sum())
    assert 1 <= count <= len(values)
    assert float(energy[:count].sum()) >= share * total * (1 - 1e-9)
    assert float(energy[: count - 1].sum()) < share * total
    size = len(values)
    turned = factor * orthogonal(size, seed) @ torch.diag(spectrum) @ orthogonal(size, seed + 1)
    slack = share * total * 1e-9
    near = any(abs(float(energy[:k].sum()) - share * total) < slack for k in range(1, size + 1))
    assert near or components_for(turned, share) == count


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(MethodError, match="above 0 and at most 1"):
        count_for(torch.ones(3), share)


def test_vectors_and_changes_that_are_not_finite_have_no_spectrum() -> None:
    with pytest.raises(MethodError, match="needs rows and columns"):
        components_for(torch.ones(3))
    with pytest.raises(MethodError, match="NaN or infinity"):
        components_for(torch.full((2, 2), math.nan))


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize(("name", "more"), [("lora", {}), ("pissa", {}), ("multilora", {"modules": 2}), ("dora", {})])
def test_the_way_over_small_factors_gives_the_singular_values_of_the_dense_change(
    name: str, more: dict[str, int], rank: int
) -> None:
    host = hosted(linear(matrix(9, 8)), make_method(name, rank=rank, **more))
    adapter, weight = host.adapter("a"), host.backbone.weight(SITE)
    for place, (param, value) in enumerate(adapter.tensors(SITE).items()):
        if value.requires_grad:
            adapter.set(SITE, param, matrix(*value.shape, seed=place + 20))
    update = adapter.update(SITE, weight)
    assert isinstance(update, LinearUpdate)
    dense = torch.linalg.svdvals((update.effective(weight.matrix()) - weight.matrix()).detach())
    found = singular_values(update, weight)
    same(found, dense[: len(found)], 1e-9)
    assert not dense[len(found) :].abs().gt(1e-9).any()


def test_components_of_an_adapter_are_listed_by_site_and_never_exceed_the_rank() -> None:
    backbone = tiny("llama")
    host = Host(backbone)
    low = host.add("low", make_method("lora", rank=3))
    full = host.add("full", make_method("delta"), "all")
    with torch.no_grad():
        for adapter in (low, full):
            adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(0)))
    found = components_of(low, backbone)
    assert [row.site for row in found] == list(low.layout.sites) and all(1 <= row.count <= 3 for row in found)
    wide = {row.site: row for row in components_of(full, backbone)}
    assert not any("norm" in name for name in wide)  # a vector has no spectrum
    q = wide["model.layers.1.self_attn.q_proj"]
    assert (q.role, q.layer, q.most) == ("q_proj", 1, 64) and q.count > 20
    assert q.count == components_for(full.values(q.site)["delta"])


def test_an_untrained_adapter_has_no_components() -> None:
    backbone = tiny("llama")
    adapter = Host(backbone).add("a", make_method("lora", rank=2))
    assert {row.count for row in components_of(adapter, backbone)} == {0}
