"""A layout gives every trained tensor a place of its own in one row, without gaps."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.adapters.layout import GLOBAL, Layout
from lorica.adapters.targets import Targets, select
from lorica.core.site import Site
from lorica.methods import all_methods, make_method
from tests.contract.cases import backbone, places, small

shapes = st.tuples(st.integers(4, 9), st.integers(4, 9))


@given(st.lists(shapes, min_size=1, max_size=6), st.sampled_from(["lora", "dora", "vera", "ia3", "pissa", "delta"]))
def test_places_tile_the_row_without_gaps_or_overlaps(sizes: list[tuple[int, int]], name: str) -> None:
    sites = {f"layers.{i}.fc": Site(f"layers.{i}.fc", "linear", shape, layer=i) for i, shape in enumerate(sizes)}
    layout = Layout(small(name), select(sites, small(name), Targets(include=("fc",))))
    spans = sorted(
        (place.offset, place.offset + place.size) for owned in layout.places.values() for place in owned.values()
    )
    assert spans[0][0] == 0 and spans[-1][1] == layout.size == layout.trainable_count()
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("name", list(all_methods()))
@pytest.mark.parametrize("family", ["gpt2", "qwen3-moe"])
def test_groups_are_runs_of_one_decay_and_cover_the_row(name: str, family: str) -> None:
    base, method = backbone(family), small(name)
    names = places(base, method)
    if not names:
        return
    layout = Layout(method, select(base.sites, method, Targets(include=names)))
    assert layout.groups[0].start == 0 and layout.groups[-1].stop == layout.size
    assert all(a.stop == b.start for a, b in zip(layout.groups, layout.groups[1:], strict=False))
    assert len({(g.name, g.decay) for g in layout.groups}) == len(layout.groups)
    for site, owned in layout.places.items():
        for param, place in owned.items():
            spec = layout.specs[site][param]
            (home,) = [g for g in layout.groups if g.start <= place.offset and place.offset + place.size <= g.stop]
            assert (home.name, home.decay) == (spec.group, spec.decay)
            assert place.shape == spec.shape and spec.trainable


def test_frozen_tensors_have_no_place_but_are_counted() -> None:
    site = Site("fc", "linear", (8, 6))
    layout = Layout(make_method("pissa", rank=2), {"fc": (site, make_method("pissa", rank=2))})
    assert set(layout.places["fc"]) == {"A", "B"} and set(layout.frozen["fc"]) == {"A0", "B0"}
    assert layout.frozen_count() == layout.trainable_count() == 2 * (8 + 6)


def test_global_tensors_stand_once_under_a_name_of_their_own() -> None:
    sites = {f"fc{i}": Site(f"fc{i}", "linear", (8 + i, 6)) for i in range(3)}
    method = make_method("vera", rank=4)
    layout = Layout(method, {name: (site, method) for name, site in sites.items()})
    assert layout.frozen == {GLOBAL: {"A": (4, 6), "B": (10, 4)}}
    assert layout.frozen_count() == math.prod((4, 6)) + math.prod((10, 4))


def test_ranks_by_site_give_sites_their_own_shapes() -> None:
    sites = {name: Site(name, "linear", (8, 6)) for name in ("q", "v")}
    picked = select(sites, make_method("lora", rank=4), Targets(include=("q", "v"), rank_pattern={"v": 1}))
    layout = Layout(make_method("lora", rank=4), picked)
    assert layout.places["q"]["A"].shape == (4, 6) and layout.places["v"]["A"].shape == (1, 6)
    assert layout.size == 5 * (8 + 6)


def test_keys_of_layouts_are_equal_exactly_when_methods_and_sites_are() -> None:
    site = Site("fc", "linear", (8, 6))

    def made(rank: int, where: Site = site) -> Layout:
        method = make_method("lora", rank=rank)
        return Layout(method, {where.name: (where, method)})

    assert made(2).key == made(2).key
    assert made(2).key != made(3).key
    assert made(2).key != made(2, Site("gc", "linear", (8, 6))).key
